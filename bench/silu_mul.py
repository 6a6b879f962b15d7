"""silu_mul: gates and ups [R, 2 I] of one product -> [R, I].

Shapes of a decoding step of Janus-Pro-1B and 7B. Least bytes: input once, output once. At these
sizes a launch takes longer than the bytes do; on a GPU timed inside a CUDA graph, as a decoding
loop runs it.
"""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from iris_kernels import silu_mul
from torch import Tensor

from bench import _peers
from bench._case import Call, Case, check_close

SUITE = "kernels"
GPU_GRID = ((64, 256), (5632, 11008), torch.bfloat16)
CPU_GRID = ((64,), (5632,), torch.float32)


def cases(device: torch.device) -> Iterator[Case]:
    rows, widths, dtype = GPU_GRID if device.type == "cuda" else CPU_GRID
    for R, width in product(rows, widths):
        yield Case(
            case="silu_mul",
            shape={"R": R, "I": width},
            dtype=dtype,
            metric="forward",
            unit="us",
            bytes=3 * R * width * dtype.itemsize,
            flops=0,
            make_inputs=partial(make_inputs, R, width, dtype, device),
            candidates={name: partial(prepare, device) for name, prepare in CANDIDATES.items()},
            check=check,
            in_graph=True,
        )


def make_inputs(R: int, width: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(R, 2 * width, dtype=dtype, device=device, generator=generator) * 2


def ours(device: torch.device, inputs: Tensor) -> Call:
    return lambda: silu_mul(inputs)


def plain(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def eager(device: torch.device, inputs: Tensor) -> Call:
    return lambda: plain(inputs)


def compiled(device: torch.device, inputs: Tensor) -> Call:
    function = _peers.compiled(plain, device)
    return lambda: function(inputs)


def liger(device: torch.device, inputs: Tensor) -> Call:
    """Its kernel, forward only, on halves that are laid apart beforehand: it takes no others."""
    forward = _peers.load("liger_kernel.ops.swiglu", device).swiglu_forward
    gate, up = (half.contiguous() for half in inputs.chunk(2, dim=-1))
    return lambda: forward(gate, up)[2]


CANDIDATES = {"ours": ours, "eager": eager, "torch.compile": compiled, "liger": liger}


def check(inputs: Tensor, result: Tensor) -> None:
    check_close("product", result, plain(inputs.double()))
