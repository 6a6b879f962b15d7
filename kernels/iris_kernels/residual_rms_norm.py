"""Residual addition and the RMSNorm that follows it, in one pass over the row; differentiable.

    total_i = residual_i + delta_i
    norm_i = weight_i * total_i / sqrt(mean_j total_j^2 + eps)

With r = 1 / sqrt(mean(total^2) + eps) and the upstream gradients d_total and d_norm,

    d_residual = d_delta = d_total + r (g - total r^2 mean(g total)),  g = d_norm weight
    d_weight = sum over rows of d_norm total r

Computed in fp32. The sum is rounded to the dtype of `residual` before it is squared, and the
normalized row before it is multiplied by the weight, as by the two separate operations. Backward
keeps nothing but the sum. The weight's gradient is summed in a fixed order: each program adds up
every `PROGRAMS`-th row in fp32, and torch adds the programs' sums. `add_rms_norm` is the op for
decoding, which writes the sum over the residual stream.

Bytes moved for b-byte elements: 4 b D per row (both addends read, sum and norm written; without an
addend 2 b D), b D for the weight; one kernel launch instead of the nine of separate operations.
Backward: 4 b D per row (sum and both gradients read, one written; 3 b D without d_total), and
8 D PROGRAMS for the weight's gradient; two launches.

Shapes: (..., D), D channels, R rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import cpp
from ._backend import backend, direct_backend, jit, needs_gradient, tl, triton
from ._checks import LOGIT_DTYPES, check_contiguous
from ._ops import add_op_namespace_prefix
from .add_rms_norm import MAX_CHANNELS, norm_cpp, scaled_norm

PROGRAMS = 512  # of the backward pass, each with its own sum for the weight's gradient
CPP_PROGRAMS = 64  # the same in C++, of at least CPP_ROWS rows
CPP_ROWS = 8


class ResidualNorm(NamedTuple):
    """`total`, the new residual stream, and its `norm`."""

    total: Tensor
    norm: Tensor


# --- Triton kernels -------------------------------------------------------------------------------


@jit
def _residual_rms_norm_kernel(
    # residual [R, D]; delta [R, D] or None; weight [D]
    residual, delta, weight,
    # total [R, D], written if there is a delta; norm [R, D]
    total, norm,
    eps, D,
    BLOCK: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK)
    inside = d < D
    row = tl.program_id(0).to(tl.int64) * D
    x = tl.load(residual + row + d, mask=inside, other=0.0)
    if delta is not None:
        added = tl.load(delta + row + d, mask=inside, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) + added).to(x.dtype)
        tl.store(total + row + d, x, mask=inside)
    tl.store(norm + row + d, scaled_norm(x, weight, d, inside, eps, D), mask=inside)


@jit
def _residual_rms_norm_backward_kernel(
    # total, d_norm [R, D]; weight [D]; d_total [R, D] or None
    total, weight, d_norm, d_total,
    # d_x [R, D]; partial sums of the weight's gradient [PROGRAMS, D] fp32, or None
    d_x, partial,
    eps, R, D,
    PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every PROGRAMS-th row, from that of the program's number on."""
    program = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    inside = d < D
    w = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    d_weight = tl.zeros([BLOCK], tl.float32)
    for r in range(program, R, PROGRAMS):
        row = tl.cast(r, tl.int64) * D
        x = tl.load(total + row + d, mask=inside, other=0.0)
        upstream = tl.load(d_norm + row + d, mask=inside, other=0.0).to(tl.float32)
        wide = x.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / D + eps)
        if partial is not None:
            d_weight += upstream * (wide * scale).to(x.dtype).to(tl.float32)
        gradient = upstream * w
        share = tl.sum(gradient * wide, axis=0) / D * scale * scale
        gradient = scale * (gradient - wide * share)
        if d_total is not None:
            gradient += tl.load(d_total + row + d, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_x + row + d, gradient.to(x.dtype), mask=inside)
    if partial is not None:
        tl.store(partial + tl.cast(program, tl.int64) * D + d, d_weight, mask=inside)


# --- Launchers ------------------------------------------------------------------------------------


def residual_rms_norm_triton(
    residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """One launch, one program per row, 8 elements per thread; the sum is `residual` itself without
    an addend."""
    D = residual.shape[-1]
    total = residual if delta is None else torch.empty_like(residual)
    norm = torch.empty_like(residual)
    block = triton.next_power_of_2(D)
    _residual_rms_norm_kernel[(norm.numel() // D,)](
        residual, delta, weight, total, norm, eps, D,
        BLOCK=block, num_warps=_warps(block), enable_fp_fusion=True,
    )  # fmt: skip
    return total, norm


def residual_rms_norm_backward_triton(
    total: Tensor, weight: Tensor, d_norm: Tensor, d_total: Tensor | None, eps: float, trained: bool
) -> tuple[Tensor, Tensor | None]:
    """One launch, and the sum over the programs; gradients of the row and of the weight."""
    D = total.shape[-1]
    rows, d_x = total.numel() // D, torch.empty_like(total)
    programs = min(rows, PROGRAMS)
    partial = total.new_empty(programs, D, dtype=torch.float32) if trained else None
    block = triton.next_power_of_2(D)
    _residual_rms_norm_backward_kernel[(programs,)](
        total, weight, d_norm, d_total, d_x, partial, eps, rows, D,
        PROGRAMS=PROGRAMS, BLOCK=block, num_warps=_warps(block), enable_fp_fusion=True,
    )  # fmt: skip
    return d_x, None if partial is None else partial.sum(0).to(weight.dtype)


def _warps(block: int) -> int:
    return min(max(block // 256, 1), 16)


# --- The C++ path ---------------------------------------------------------------------------------

_backward = cpp.function(
    "iris_residual_rms_norm_backward", None, cpp.INT, *[cpp.POINTER] * 6, cpp.LONG, cpp.POINTER,
    cpp.LONG, cpp.LONG, cpp.FLOAT, cpp.INT,
)  # fmt: skip


def residual_rms_norm_cpp(
    residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The same as the Triton path."""
    total = residual if delta is None else torch.empty_like(residual)
    return total, norm_cpp(residual, delta, weight, eps, total)


def residual_rms_norm_backward_cpp(
    total: Tensor, weight: Tensor, d_norm: Tensor, d_total: Tensor | None, eps: float, trained: bool
) -> tuple[Tensor, Tensor | None]:
    """The same as the Triton path; the programs have neighbouring rows, and their number does not
    depend on that of the threads."""
    D, elements = total.shape[-1], total.numel()
    rows, d_x = elements // D, torch.empty_like(total)
    programs = min(-(-rows // CPP_ROWS), CPP_PROGRAMS)
    partial = d_weight = None
    if trained:
        partial = total.new_empty(programs, D, dtype=torch.float32)
        d_weight = torch.empty_like(weight)
    _backward()(
        total.dtype == torch.bfloat16, total.data_ptr(), weight.data_ptr(), d_norm.data_ptr(),
        cpp.address(d_total), d_x.data_ptr(), cpp.address(partial), programs,
        cpp.address(d_weight), rows, D, eps, cpp.threads(elements),
    )  # fmt: skip
    return d_x, d_weight


# --- The torch path -------------------------------------------------------------------------------


def residual_rms_norm_torch(
    residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Sum and norm in torch; the sum is `residual` itself without an addend."""
    total = residual if delta is None else residual + delta
    normed, _ = _normalize(total, eps)
    return total, weight * normed


def residual_rms_norm_backward_torch(
    total: Tensor, weight: Tensor, d_norm: Tensor, d_total: Tensor | None, eps: float, trained: bool
) -> tuple[Tensor, Tensor | None]:
    """The same as the Triton backward, in torch."""
    normed, scale = _normalize(total, eps)
    wide, upstream = total.to(scale.dtype), d_norm.to(scale.dtype)
    gradient = upstream * weight
    share = (gradient * wide).mean(-1, keepdim=True) * scale * scale
    gradient = scale * (gradient - wide * share)
    if d_total is not None:
        gradient += d_total
    d_weight = None
    if trained:
        d_weight = (upstream * normed).reshape(-1, len(weight)).sum(0).to(weight.dtype)
    return gradient.to(total.dtype), d_weight


def _normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normalized rows in the dtype of `x`, and their scales in fp32 (fp64 for fp64)."""
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype), scale


FORWARD = {
    "triton": residual_rms_norm_triton,
    "cpp": residual_rms_norm_cpp,
    "torch": residual_rms_norm_torch,
}
BACKWARD = {
    "triton": residual_rms_norm_backward_triton,
    "cpp": residual_rms_norm_backward_cpp,
    "torch": residual_rms_norm_backward_torch,
}


# --- Custom ops and autograd ----------------------------------------------------------------------


# Two ops, because one without an addend would have to return its input.
@torch.library.custom_op(add_op_namespace_prefix("residual_rms_norm"), mutates_args=())
def _residual_norm_op(
    residual: Tensor, delta: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    if not residual.numel():
        return torch.empty_like(residual), torch.empty_like(residual)
    return FORWARD[backend(residual)](residual, delta, weight, eps)


@torch.library.custom_op(add_op_namespace_prefix("rms_norm"), mutates_args=())
def _norm_op(residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not residual.numel():
        return torch.empty_like(residual)
    return FORWARD[backend(residual)](residual, None, weight, eps)[1]


@torch.library.custom_op(add_op_namespace_prefix("residual_rms_norm_backward"), mutates_args=())
def _backward_op(
    total: Tensor, weight: Tensor, d_norm: Tensor, d_total: Tensor | None, eps: float, trained: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of the weight is empty unless it is `trained`."""
    if not total.numel():
        return torch.empty_like(total), weight.new_zeros(weight.shape if trained else 0)
    run = BACKWARD[backend(total)]
    d_x, d_weight = run(total, weight, d_norm, d_total, eps, trained)
    return d_x, weight.new_empty(0) if d_weight is None else d_weight


@_residual_norm_op.register_fake
def _(residual, *_):
    return torch.empty_like(residual), torch.empty_like(residual)


@_norm_op.register_fake
def _(residual, *_):
    return torch.empty_like(residual)


@_backward_op.register_fake
def _(total, weight, d_norm, d_total, eps, trained):
    return torch.empty_like(total), weight.new_empty(weight.shape if trained else 0)


def _differentiate(ctx, d_total: Tensor | None, d_norm: Tensor | None, trained: bool):
    """Gradients of the sum and of the weight."""
    if d_norm is None:
        return d_total, None
    total, weight = ctx.saved_tensors
    d_norm, d_total = d_norm.contiguous(), None if d_total is None else d_total.contiguous()
    path = direct_backend(total, weight, d_norm, d_total)
    if path and total.numel():
        return BACKWARD[path](total, weight, d_norm, d_total, ctx.eps, trained)
    d_x, d_weight = _backward_op(total, weight, d_norm, d_total, ctx.eps, trained)
    return d_x, d_weight if trained else None


def _setup_residual_norm(ctx, inputs, output) -> None:
    *_, weight, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], weight)


def _setup_norm(ctx, inputs, output) -> None:
    residual, weight, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(residual, weight)


def _residual_norm_backward(ctx, d_total, d_norm):
    d_x, d_weight = _differentiate(ctx, d_total, d_norm, ctx.needs_input_grad[2])
    return d_x, d_x, d_weight, None


def _norm_backward(ctx, d_norm):
    return *_differentiate(ctx, None, d_norm, ctx.needs_input_grad[1]), None


_residual_norm_op.register_autograd(_residual_norm_backward, setup_context=_setup_residual_norm)
_norm_op.register_autograd(_norm_backward, setup_context=_setup_norm)


# --- Eager mode on a CPU, without the custom ops --------------------------------------------------


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual, delta, weight, eps, path):
        total, norm = FORWARD[path](residual, delta, weight, eps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        return total, norm

    @staticmethod
    def backward(ctx, d_total, d_norm):
        return *_residual_norm_backward(ctx, d_total, d_norm), None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual, weight, eps, path):
        ctx.save_for_backward(residual, weight)
        ctx.eps = eps
        return FORWARD[path](residual, None, weight, eps)[1]

    @staticmethod
    def backward(ctx, d_norm):
        return *_norm_backward(ctx, d_norm), None


def _directly(path: str, residual, delta, weight, eps) -> tuple[Tensor, Tensor]:
    if not needs_gradient(residual, delta, weight):
        return FORWARD[path](residual, delta, weight, eps)
    if delta is None:
        return residual, _Norm.apply(residual, weight, eps, path)
    return _ResidualNorm.apply(residual, delta, weight, eps, path)


# --- Public ---------------------------------------------------------------------------------------


def residual_rms_norm(
    residual: Tensor, weight: Tensor, *, eps: float, delta: Tensor | None = None
) -> ResidualNorm:
    """The sum of `residual` and `delta`, and the RMSNorm of that sum. Overwrites nothing.

    total = residual + delta, norm = weight * total / sqrt(mean(total^2) + eps). Differentiable with
    respect to `residual`, `delta` and `weight`, from either result or both; a frozen weight costs
    nothing. A row's results do not depend on the other rows, bit for bit, and the weight's gradient
    is the same in every run. `residual_rms_norm_reference` is the same in eager torch.

    Args:
        residual: (..., D) float32, bfloat16 or float16 (float64 on the torch path), contiguous, D
            up to 32768.
        weight: (D) of the same dtype.
        eps: added to the mean square.
        delta: what to add, of the same shape and dtype; None adds nothing.

    Returns:
        ResidualNorm(total, norm), in the shape and dtype of `residual`; without `delta`, the total
        is `residual` itself.

    Raises:
        ValueError: an argument of the wrong shape, strides, dtype or device.
    """
    check_contiguous("residual", residual, dtypes=LOGIT_DTYPES)
    if residual.shape[-1] > MAX_CHANNELS:
        raise ValueError(
            f"residual has {residual.shape[-1]} channels: pass {MAX_CHANNELS} or fewer"
        )
    check_contiguous("weight", weight, residual.shape[-1:], residual, dtypes=LOGIT_DTYPES)
    if delta is not None:
        check_contiguous("delta", delta, residual.shape, residual, dtypes=LOGIT_DTYPES)
    path = direct_backend(residual, delta, weight, with_gradient=True)
    if path and residual.numel():
        return ResidualNorm(*_directly(path, residual, delta, weight, eps))
    if delta is None:
        return ResidualNorm(residual, _norm_op(residual, weight, float(eps)))
    return ResidualNorm(*_residual_norm_op(residual, delta, weight, float(eps)))


def residual_rms_norm_reference(
    residual: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`residual_rms_norm` in eager torch, in the dtype of its inputs."""
    total = residual if delta is None else residual + delta
    return total, torch.nn.functional.rms_norm(total, weight.shape, weight, eps)
