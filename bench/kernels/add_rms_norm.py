"""add_rms_norm: add a block's output to the residual stream [R, D], then RMSNorm of the sum.

Shapes of a decoding step of Janus-Pro-1B and 7B. Minimum bytes: both addends read, sum and norm
written, the weight once. At these sizes the launch takes longer than moving the bytes; on a GPU
timed inside a CUDA graph, as in a decoding loop.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from iris_kernels import add_rms_norm
from iris_kernels.add_rms_norm import add_rms_norm_reference, add_rms_norm_triton
from torch import Tensor

from bench.harness import peers
from bench.harness.case import Call, Case, check_close
from bench.harness.gates import DTYPES, WIDTHS, GateCase, Work, meta

SUITE = "kernels"
EPS = 1e-6
GPU_GRID = ((64, 256), (2048, 4096), torch.bfloat16)
CPU_GRID = ((16, 64), (2048,), torch.float32)


class Inputs(NamedTuple):
    """Residual stream and addend [R, D], weight [D]."""

    residual: Tensor
    delta: Tensor
    weight: Tensor


# (residual, delta, weight) -> (norm, sum)
Compute = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def cases(device: torch.device) -> Iterator[Case]:
    rows, widths, dtype = GPU_GRID if device.type == "cuda" else CPU_GRID
    for R, D in product(rows, widths):
        yield Case(
            case="add_rms_norm",
            shape={"R": R, "D": D},
            dtype=dtype,
            metric="forward",
            unit="us",
            bytes=(4 * R + 1) * D * dtype.itemsize,
            flops=0,
            make_inputs=partial(make_inputs, R, D, dtype, device),
            candidates={name: partial(_prepare, load, device) for name, load in CANDIDATES.items()},
            check=check,
            in_graph=True,
        )


def make_inputs(R: int, D: int, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    return Inputs(randn(R, D), randn(R, D), randn(D))


def _prepare(load: Callable[[torch.device], Compute], device: torch.device, inputs: Inputs) -> Call:
    """A call on its own copy of the residual stream, since it may add to it in place."""
    compute, residual = load(device), inputs.residual.clone()
    return lambda: compute(residual, inputs.delta, inputs.weight)


def ours(device: torch.device) -> Compute:
    def compute(residual: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(residual, weight, eps=EPS, delta=delta), residual

    return compute


def plain(residual: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of transformers' Llama, with its roundings."""
    total = residual + delta
    wide = total.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return weight * normed.to(total.dtype), total


def liger(device: torch.device) -> Compute:
    """Liger's fused addition and norm, forward only, with Llama's roundings."""
    forward = peers.load("liger_kernel.ops.fused_add_rms_norm", device)
    function = forward.fused_add_rms_norm_forward

    def compute(residual: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return function(delta, residual, weight, EPS, 0.0, "llama")[:2]

    return compute


CANDIDATES = {"ours": ours, **peers.in_torch(plain), "liger": liger}


def check(inputs: Inputs, result: tuple[Tensor, Tensor]) -> None:
    norm, total = result
    residual, delta, weight = (t.double() for t in inputs)
    check_close("sum", total, residual + delta)
    check_close("norm", norm, add_rms_norm_reference(residual, weight, EPS, delta))


def gate_cases(vocabularies: Sequence[int]) -> Iterator[GateCase]:
    for dtype_name, dtype in DTYPES.items():
        for hidden, _ in WIDTHS:
            stream, delta = (meta(64, hidden, dtype=dtype) for _ in range(2))
            launch = partial(add_rms_norm_triton, stream, delta, meta(hidden, dtype=dtype), 1e-6)
            elements = 64 * hidden
            work = Work(elements, 4 * elements * dtype.itemsize)
            yield GateCase(f"add_rms_norm D={hidden} {dtype_name}", launch, [work])
    for D in (2048, 4096):
        stream, norm = (meta(*shape, dtype=torch.bfloat16) for shape in ((64, D), (D,)))
        ahead = meta(3 * D, D, dtype=torch.bfloat16)
        launch = partial(add_rms_norm_triton, stream, meta(4, 64, D), norm, 1e-6, ahead)
        # Besides the row: four partial sums in fp32 instead of the addend.
        work = Work(64 * D, 64 * D * (3 * 2 + 4 * 4))
        yield GateCase(f"add_rms_norm D={D} partial sums bfloat16", launch, [work])
