"""`--torch_compile`: a decoder's blocks through torch.compile, one by one."""

from __future__ import annotations

import torch

from iris_fast.errors import UserError
from iris_fast.models.decoder import Decoder

BACKEND = "inductor"
# Policy and reference, with gradients and without, padded or not, one sequence or several: each is
# a graph of the same code. Beyond torch's limit of 8 the blocks would run uncompiled.
GRAPHS_PER_BLOCK = 32


def compile_blocks(decoder: Decoder) -> None:
    """From now on every layer of `decoder` runs compiled; values and gradients change by round-off.

    A graph is made when a block first meets a new situation, for all layers and any number of
    tokens. Hooks and wrappers around a block's forward (FSDP, recomputation) stay outside it if
    they are put on after this call.
    """
    import torch._dynamo  # where compilation is wanted alone: the import takes seconds

    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, GRAPHS_PER_BLOCK)
    for layer in decoder.layers:
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=BACKEND)


def require_compiler(device: torch.device) -> None:
    """Raise UserError if blocks on the CPU cannot be compiled: for want of a C++ compiler."""
    if device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError(
            "torch_compile: compiling for the CPU needs a C++ compiler, and neither g++ nor what "
            "CXX names runs here; install g++, set CXX, or leave --torch_compile false"
        ) from None
