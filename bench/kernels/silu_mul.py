"""silu_mul: gate and up projections [R, 2 I] of one matmul -> [R, I].

Shapes of a decoding step of Janus-Pro-1B and 7B. Minimum bytes: input once, output once. At these
sizes the launch takes longer than moving the bytes; on a GPU timed inside a CUDA graph, as in a
decoding loop.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

import torch
from iris_kernels import silu_mul
from iris_kernels.silu_mul import silu_mul_reference, silu_mul_triton
from torch import Tensor

from bench.harness import peers
from bench.harness.case import Call, Case, check_close
from bench.harness.gates import DTYPES, WIDTHS, GateCase, Work, meta

SUITE = "kernels"
GPU_GRID = ((64, 256), (5632, 11008), torch.bfloat16)
CPU_GRID = ((64,), (5632,), torch.float32)

Compute = Callable[[Tensor], Tensor]


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


def _prepare(load: Callable[[torch.device], Compute], device: torch.device, inputs: Tensor) -> Call:
    compute = load(device)
    return lambda: compute(inputs)


def ours(device: torch.device) -> Compute:
    return silu_mul


def plain(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def _liger(device: torch.device, inputs: Tensor) -> Call:
    """Liger's kernel, forward only; it takes contiguous halves, which are made beforehand."""
    forward = peers.load("liger_kernel.ops.swiglu", device).swiglu_forward
    gate, up = (half.contiguous() for half in inputs.chunk(2, dim=-1))
    return lambda: forward(gate, up)[2]


CANDIDATES = {
    name: partial(_prepare, load) for name, load in {"ours": ours, **peers.in_torch(plain)}.items()
} | {"liger": _liger}


def check(inputs: Tensor, result: Tensor) -> None:
    check_close("product", result, silu_mul_reference(inputs.double()))


def gate_cases(vocabularies: Sequence[int]) -> Iterator[GateCase]:
    for dtype_name, dtype in DTYPES.items():
        for _, inner in WIDTHS:
            launch = partial(silu_mul_triton, meta(64, 2 * inner, dtype=dtype))
            work = Work(64 * inner, 3 * 64 * inner * dtype.itemsize)
            yield GateCase(f"silu_mul I={inner} {dtype_name}", launch, [work])
