"""Rows in fp8, each with its own scale, as an fp8 matrix product takes them.

    scales_r = max_i |x_ri| / 448        values_ri = x_ri / scales_r in float8_e4m3fn

448 is the largest float8_e4m3fn. A row whose scale underflows to 0 in float32, such as a row of
zeros, has scale 1.

Bytes moved for b-byte elements: (b + 1) D per row; one kernel launch instead of the seven of
separate operations.

Shapes: (R, D), D channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import cpp
from ._backend import backend, direct_backend, jit, tl, triton
from ._checks import check_contiguous
from ._fp8 import FP8, FP8_MAX
from ._ops import add_op_namespace_prefix
from ._overlap import overlap_options, wait_for_previous_kernel
from ._row_stats import compute_dtype

MAX_CHANNELS = 32768  # one program holds a row


class QuantizedRows(NamedTuple):
    """x = values * scales: `values` (R, D) float8_e4m3fn, `scales` (R, 1) float32."""

    values: Tensor
    scales: Tensor


# --- Triton kernel --------------------------------------------------------------------------------


@jit
def _quantize_rows_kernel(
    x, values, scales,  # [R, D], [R, D], [R]
    D,
    FP8_MAX: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_previous_kernel(OVERLAP)  # it wrote `x`
    r = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    wide = tl.load(x + r * D + d, mask=inside, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(wide), axis=0), 1.0 * FP8_MAX)
    scale = tl.where(scale == 0.0, 1.0, scale)
    tl.store(scales + r, scale)
    # No saturation needed: the largest quotient is FP8_MAX up to rounding, and rounds to FP8_MAX.
    tl.store(values + r * D + d, tl.div_rn(wide, scale).to(values.dtype.element_ty), mask=inside)


# --- Launcher -------------------------------------------------------------------------------------


def quantize_rows_triton(x: Tensor) -> tuple[Tensor, Tensor]:
    """One launch, one program per row."""
    R, D = x.shape
    values = torch.empty_like(x, dtype=FP8)
    scales = x.new_empty(R, 1, dtype=torch.float32)
    block = triton.next_power_of_2(D)
    _quantize_rows_kernel[(R,)](
        x, values, scales, D, FP8_MAX=FP8_MAX,
        BLOCK=block, num_warps=min(max(block // 512, 1), 16), enable_fp_fusion=True,
        **overlap_options(),
    )  # fmt: skip
    return values, scales


# --- The C++ path ---------------------------------------------------------------------------------

_quantize_rows = cpp.function(
    "iris_quantize_rows", None, cpp.INT, *[cpp.POINTER] * 3, cpp.LONG, cpp.LONG, cpp.INT
)


def quantize_rows_cpp(x: Tensor) -> tuple[Tensor, Tensor]:
    """The bits of the torch path."""
    R, D = x.shape
    values, scales = torch.empty_like(x, dtype=FP8), x.new_empty(R, 1, dtype=torch.float32)
    _quantize_rows()(
        x.dtype == torch.bfloat16, x.data_ptr(), values.data_ptr(), scales.data_ptr(), R, D,
        cpp.threads(R * D),
    )  # fmt: skip
    return values, scales


# --- The torch path -------------------------------------------------------------------------------


def quantize_rows_torch(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same in torch."""
    wide = x.float()
    # Two reductions are faster than a copy of the absolute values and one.
    largest = torch.maximum(wide.amax(dim=-1, keepdim=True), wide.amin(dim=-1, keepdim=True).neg_())
    scales = largest.div_(FP8_MAX)
    scales = scales.masked_fill_(scales == 0, 1.0)
    return wide.div(scales).to(FP8), scales


PATHS = {"triton": quantize_rows_triton, "cpp": quantize_rows_cpp, "torch": quantize_rows_torch}


# --- Custom op ------------------------------------------------------------------------------------


@torch.library.custom_op(add_op_namespace_prefix("quantize_rows"), mutates_args=())
def _quantize_rows_op(x: Tensor) -> tuple[Tensor, Tensor]:
    if not x.numel():
        return torch.empty_like(x, dtype=FP8), x.new_ones(len(x), 1, dtype=torch.float32)
    return PATHS[backend(x)](x)


@_quantize_rows_op.register_fake
def _(x):
    return torch.empty_like(x, dtype=FP8), x.new_empty(len(x), 1, dtype=torch.float32)


# --- Public ---------------------------------------------------------------------------------------


def quantize_rows(x: Tensor) -> QuantizedRows:
    """Float8_e4m3fn values and one float32 scale per row, whose product is `x` to 3 mantissa bits.

    scales = amax(|x|) / 448 over the row (1 for a row of zeros), values = x / scales. A row's
    result does not depend on the other rows, bit for bit. Not differentiable.

    Args:
        x: (R, D) float32, bfloat16 or float16, contiguous, D up to 32768.

    Returns:
        QuantizedRows(values (R, D), scales (R, 1)), as `torch.nn.functional.scaled_mm` takes them.

    Raises:
        ValueError: an argument of the wrong shape, strides or dtype.
    """
    check_contiguous("x", x)
    if x.dim() != 2 or x.shape[-1] > MAX_CHANNELS:
        raise ValueError(f"x has shape {tuple(x.shape)}: pass (R, D), D up to {MAX_CHANNELS}")
    path = direct_backend(x) if x.numel() else None
    return QuantizedRows(*(_quantize_rows_op(x) if path is None else PATHS[path](x)))


def quantize_rows_reference(x: Tensor) -> QuantizedRows:
    """`quantize_rows` in eager torch, for rows that are not all zeros; float64 stays float64."""
    wide = x.to(compute_dtype(x))
    scales = wide.abs().amax(dim=-1, keepdim=True) / FP8_MAX
    return QuantizedRows((wide / scales).to(FP8), scales)
