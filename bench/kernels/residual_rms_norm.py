"""residual_rms_norm: add to the residual stream [R, D], and RMSNorm of the sum; with gradients.

Rows of a training pass, widths of Janus-Pro-1B and 7B. Minimum bytes: both addends read, sum and
norm written; backward, the sum and two gradients read, one written; the weight read twice, its
gradient written. On a GPU only: the training pass on a CPU does not use it.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from iris_kernels import residual_rms_norm
from iris_kernels.residual_rms_norm import (
    PROGRAMS,
    residual_rms_norm_backward_triton,
    residual_rms_norm_reference,
    residual_rms_norm_triton,
)
from torch import Tensor

from bench.harness import peers
from bench.harness.case import Call, Case
from bench.harness.gates import DTYPES, ISSUE_LIMIT, WIDTHS, GateCase, Work, meta
from bench.harness.gradients import check_gradients, forward_backward

SUITE = "kernels"
EPS = 1e-6
ROWS, GPU_WIDTHS = 40320, (2048, 4096)

# (residual, delta, weight) -> (sum, norm)
Compute = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def cases(device: torch.device) -> Iterator[Case]:
    dtype = torch.bfloat16
    for D in GPU_WIDTHS if device.type == "cuda" else ():
        yield Case(
            case="residual_rms_norm",
            shape={"R": ROWS, "D": D},
            dtype=dtype,
            metric="forward+backward",
            unit="us",
            bytes=(8 * ROWS + 3) * D * dtype.itemsize,
            flops=0,
            make_inputs=partial(make_inputs, ROWS, D, dtype, device),
            candidates={name: partial(_prepare, load, device) for name, load in CANDIDATES.items()},
            check=check,
        )


def make_inputs(
    R: int, D: int, dtype: torch.dtype, device: torch.device, seed: int
) -> list[Tensor]:
    """Residual stream, addend, weight, and the gradients of sum and norm."""
    generator = torch.Generator(device).manual_seed(seed)
    shapes = [(R, D), (R, D), (D,), (R, D), (R, D)]
    return [torch.randn(s, dtype=dtype, device=device, generator=generator) for s in shapes]


def _prepare(load: Callable, device: torch.device, inputs: list[Tensor]) -> Call:
    return forward_backward(load(device), inputs[:3], inputs[3:])


def ours(device: torch.device) -> Compute:
    def compute(residual: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return residual_rms_norm(residual, weight, eps=EPS, delta=delta)

    return compute


def plain(residual: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of transformers' Llama, with its roundings."""
    total = residual + delta
    wide = total.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return total, weight * normed.to(total.dtype)


def liger(device: torch.device) -> Compute:
    """Liger's fused addition and norm, with Llama's roundings."""
    module = peers.load("liger_kernel.ops.fused_add_rms_norm", device)
    function = module.LigerFusedAddRMSNormFunction

    def compute(residual: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        norm, total = function.apply(delta, residual, weight, EPS, 0.0, "llama", False)
        return total, norm

    return compute


CANDIDATES = {"ours": ours, **peers.in_torch(plain), "liger": liger}


def check(inputs: list[Tensor], result: tuple[list[Tensor], list[Tensor]]) -> None:
    def reference(residual: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return residual_rms_norm_reference(residual, weight, EPS, delta)

    named = dict(zip(("residual", "delta", "weight"), inputs[:3], strict=True))
    check_gradients(reference, named, inputs[3:], result)


def gate_cases(vocabularies: Sequence[int]) -> Iterator[GateCase]:
    for name, dtype in DTYPES.items():
        for D, _ in WIDTHS:
            rows, weight = [meta(ROWS, D, dtype=dtype) for _ in range(3)], meta(D, dtype=dtype)
            elements, moved = ROWS * D, 4 * ROWS * D * dtype.itemsize
            forward = partial(residual_rms_norm_triton, *rows[:2], weight, EPS)
            work = Work(elements, moved, issue_limit=ISSUE_LIMIT)
            yield GateCase(f"residual_rms_norm D={D} {name}", forward, [work])
            arguments = (rows[0], weight, *rows[1:], EPS, True)
            backward = partial(residual_rms_norm_backward_triton, *arguments)
            work = Work(elements, moved, (ROWS / PROGRAMS,), ISSUE_LIMIT)
            yield GateCase(f"residual_rms_norm backward D={D} {name}", backward, [work])
