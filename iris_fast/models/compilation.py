"""`--torch_compile`: the decoder's blocks through torch.compile, one by one."""

import torch

from iris_fast.errors import UserError
from iris_fast.models.decoder import Decoder

BACKEND = "inductor"
# Policy and reference, with gradients and without, padded or not, one sequence or several: each is
# a graph of the same code. Beyond torch's limit of 8 the blocks would run uncompiled.
GRAPHS_PER_BLOCK = 32


def compile_blocks(decoder: Decoder) -> None:
    """Compile every layer of `decoder` in place; values and gradients change by rounding only.

    A graph is compiled when a block first runs in a new situation, and serves all layers and any
    number of tokens. Hooks and wrappers around a block's forward (FSDP, recomputation) stay outside
    the graph if they are added after this call.
    """
    import torch._dynamo  # here because the import takes seconds

    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, GRAPHS_PER_BLOCK)
    for layer in decoder.layers:
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=BACKEND)


def require_compiler(device: torch.device) -> None:
    """Raise UserError if `device` is the CPU and there is no C++ compiler for its kernels."""
    if device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError(
            "torch_compile: compiling for the CPU needs a C++ compiler, and neither g++ nor the "
            "value of CXX works; install g++, set CXX, or leave --torch_compile false"
        ) from None
