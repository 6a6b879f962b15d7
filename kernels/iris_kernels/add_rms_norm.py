"""Residual addition and the RMSNorm that follows it, in one pass over the row.

    residual_i <- residual_i + delta_i
    out_i = weight_i * residual_i / sqrt(mean_j residual_j^2 + eps)

Computed in fp32. The sum is rounded to the dtype of `residual` before it is squared, and the
normalized row before it is multiplied by the weight, as by the two separate operations.

Bytes moved for b-byte elements: 4 b D per row (both addends read, sum and norm written), b D
for the weight; one kernel launch instead of the nine of separate operations.

Shapes: (..., D), D channels.
"""

import torch
from torch import Tensor

from . import cpp
from ._backend import backend, direct_backend, jit, tl, triton
from ._checks import check_contiguous
from ._ops import add_op_namespace_prefix
from ._overlap import (
    LINE_BYTES,
    overlap_options,
    prefetch_to_l2,
    prefetched_lines,
    wait_for_previous_kernel,
)

MAX_CHANNELS = 32768  # one program holds a row
# Of the next product's weight, by a program: 64 KB, for 128 rows 8 MB together. So long the product
# before the norm, bound by the L2 cache, leaves memory idle.
AHEAD_LINES = 512
FEW_CHANNELS = 4096  # up to here in 8 warps, which leave registers to the product that overlaps


# --- Triton kernel --------------------------------------------------------------------------------


@jit
def scaled_norm(x, weight, d, inside, eps, D):
    """The norm of a row in its dtype."""
    wide = x.to(tl.float32)
    normed = (wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / D + eps)).to(x.dtype)
    scaled = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32) * normed.to(tl.float32)
    return scaled.to(x.dtype)


@jit
def _add_rms_norm_kernel(
    # residual [R, D], overwritten unless delta [R, D] is None; weight [D]; out [R, D]
    # or delta is PARTS fp32 partial sums [PARTS, R, D], `part` elements apart, if PARTS is not 0
    residual, delta, weight, out,
    # [N, K] of the next product or None, of whose rows FROM_LINE lines are left to the product
    ahead, N, K,
    eps, D, part,
    BLOCK: tl.constexpr, PARTS: tl.constexpr,
    LINE: tl.constexpr, LINES: tl.constexpr, FROM_LINE: tl.constexpr, AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK)
    inside = d < D
    # No kernel of a decoding step writes the weight: it is read while the previous kernel ends.
    lines = tl.arange(0, LINES) * LINE
    prefetch_to_l2(weight + tl.minimum(lines, D - 1), OVERLAP)
    if ahead is not None:
        # The first tiles of the product, all its rows before the next lines of them.
        line = tl.program_id(0) * AHEAD + tl.arange(0, AHEAD)
        column = tl.minimum((FROM_LINE + line // N) * LINE, K - 1)
        prefetch_to_l2(ahead + (line % N).to(tl.int64) * K + column, OVERLAP)
    wait_for_previous_kernel(OVERLAP)  # it wrote `residual` and `delta`, and may have read `out`
    row = tl.program_id(0).to(tl.int64) * D
    x = tl.load(residual + row + d, mask=inside, other=0.0)
    if delta is not None:
        added = tl.load(delta + row + d, mask=inside, other=0.0).to(tl.float32)
        for p in tl.static_range(1, PARTS):
            place = tl.cast(part, tl.int64) * p + row
            added += tl.load(delta + place + d, mask=inside, other=0.0)
        if PARTS:
            added = added.to(x.dtype).to(tl.float32)  # as a product is rounded
        x = (x.to(tl.float32) + added).to(x.dtype)
        tl.store(residual + row + d, x, mask=inside)
    tl.store(out + row + d, scaled_norm(x, weight, d, inside, eps, D), mask=inside)


# --- Launcher -------------------------------------------------------------------------------------


def add_rms_norm_triton(
    residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float, ahead: Tensor | None = None
) -> Tensor:
    """One launch, one program per row, 8 or more elements per thread."""
    D = residual.shape[-1]
    out = torch.empty_like(residual)
    block = triton.next_power_of_2(D)
    parts = len(delta) if _is_partial(residual, delta) else 0
    line, overlap = LINE_BYTES // weight.element_size(), overlap_options()
    most = 8 if overlap["OVERLAP"] and D <= FEW_CHANNELS else 16
    if ahead is not None and not ahead.numel():
        ahead = None
    N, K = (1, 1) if ahead is None else ahead.shape
    _add_rms_norm_kernel[(out.numel() // D,)](
        residual, delta, weight, out, ahead, N, K, eps, D, out.numel(),
        BLOCK=block, PARTS=parts, LINE=line, LINES=max(block // line, 1),
        FROM_LINE=prefetched_lines(N, 1, K), AHEAD=AHEAD_LINES,
        num_warps=min(max(block // 256, 1), most), enable_fp_fusion=True, **overlap,
    )  # fmt: skip
    return out


def _is_partial(residual: Tensor, delta: Tensor | None) -> bool:
    """Whether `delta` holds partial sums."""
    return delta is not None and delta.dim() > residual.dim()


# --- The C++ path ---------------------------------------------------------------------------------

_norm = cpp.function(
    "iris_add_rms_norm", None, cpp.INT, cpp.POINTER, cpp.POINTER, cpp.LONG, *[cpp.POINTER] * 3,
    cpp.LONG, cpp.LONG, cpp.FLOAT, cpp.INT,
)  # fmt: skip


def norm_cpp(
    residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float, total: Tensor
) -> Tensor:
    """The norm of the sum, which is written to `total` if there is a delta."""
    D, elements = residual.shape[-1], residual.numel()
    norm = torch.empty_like(residual)
    _norm()(
        residual.dtype == torch.bfloat16, residual.data_ptr(), cpp.address(delta),
        len(delta) if _is_partial(residual, delta) else 0, weight.data_ptr(), total.data_ptr(),
        norm.data_ptr(), elements // D, D, eps, cpp.threads(elements),
    )  # fmt: skip
    return norm


def add_rms_norm_cpp(residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """One pass over each row, and one over its sum."""
    norm = norm_cpp(residual, delta, weight, eps, residual)
    if delta is not None:
        torch.autograd.graph.increment_version(residual)
    return norm


# --- The torch path -------------------------------------------------------------------------------


def add_rms_norm_torch(
    residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> Tensor:
    """The same in torch."""
    if _is_partial(residual, delta):
        delta = sum(delta[1:], delta[0]).to(residual.dtype)  # in their order
    if delta is not None:
        residual += delta
    wide = residual.float()
    normed = wide * wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return normed.to(residual.dtype).mul_(weight)


PATHS = {"triton": add_rms_norm_triton, "cpp": add_rms_norm_cpp, "torch": add_rms_norm_torch}


# --- Custom op ------------------------------------------------------------------------------------


@torch.library.custom_op(add_op_namespace_prefix("add_rms_norm"), mutates_args=("residual",))
def _add_rms_norm_op(
    residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float, ahead: Tensor | None = None
) -> Tensor:
    if not residual.numel():
        return torch.empty_like(residual)
    path = backend(residual)
    if path == "triton":
        return add_rms_norm_triton(residual, delta, weight, eps, ahead)
    return PATHS[path](residual, delta, weight, eps)


@_add_rms_norm_op.register_fake
def _(residual, *_):
    return torch.empty_like(residual)


# --- Public ---------------------------------------------------------------------------------------


def add_rms_norm(
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float,
    delta: Tensor | None = None,
    ahead: Tensor | None = None,
) -> Tensor:
    """RMSNorm of `residual`, after adding `delta` to it IN PLACE.

    out = weight * residual / sqrt(mean(residual^2) + eps) over the last dimension, as in
    transformers' LlamaRMSNorm. A row's result does not depend on the other rows, bit for bit. Not
    differentiable: `residual_rms_norm` is. `add_rms_norm_reference` is the same in eager torch.

    Args:
        residual: (..., D) float32, bfloat16 or float16, contiguous, D up to 32768. Overwritten with
            the sum if `delta` is given.
        weight: (D) of the same dtype.
        eps: added to the mean square.
        delta: what to add, of the same shape and dtype; or (S, ..., D) float32, partial sums as
            those of `decode_linear_partials`, which are added in their order and rounded to the
            dtype of `residual` first; None adds nothing.
        ahead: (N, K) of the dtype of `residual`, contiguous: the weight of the `decode_linear` that
            follows. From sm_90 on part of it is fetched into the L2 cache while the previous kernel
            ends; otherwise it is not read.

    Returns:
        The norm, in the shape and dtype of `residual`.

    Raises:
        ValueError: an argument of the wrong shape, strides, dtype or device.
    """
    check_contiguous("residual", residual)
    if residual.shape[-1] > MAX_CHANNELS:
        raise ValueError(
            f"residual has {residual.shape[-1]} channels: pass {MAX_CHANNELS} or fewer"
        )
    check_contiguous("weight", weight, residual.shape[-1:], residual)
    if _is_partial(residual, delta):
        shape = (max(len(delta), 1), *residual.shape)
        check_contiguous("delta", delta, torch.Size(shape), residual, torch.float32)
    elif delta is not None:
        check_contiguous("delta", delta, residual.shape, residual)
    if ahead is not None:
        check_contiguous("ahead", ahead)
        check_contiguous("ahead", ahead, torch.Size((len(ahead), ahead.shape[-1])), residual)
    path = direct_backend(residual, delta, weight) if residual.numel() else None
    if path is None:
        return _add_rms_norm_op(residual, delta, weight, float(eps), ahead)
    return PATHS[path](residual, delta, weight, eps)


def add_rms_norm_reference(
    residual: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None
) -> Tensor:
    """`add_rms_norm` in eager torch, in the dtype of its inputs; overwrites nothing."""
    total = residual if delta is None else residual + delta
    return torch.nn.functional.rms_norm(total, weight.shape, weight, eps)
