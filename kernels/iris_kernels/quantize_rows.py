"""Rows in 8 bits, each with a scale of its own, as an fp8 matrix product wants them.

    scales_r = max_i |x_ri| / 448        values_ri = x_ri / scales_r in float8_e4m3fn

448 is the largest float8_e4m3fn. A row of zeros, or of less than float32 can scale, has scale 1.

Bytes moved for b-byte elements: (b + 1) D a row, in one launch where the plain operations take
seven.

Shapes: (R, D), D channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._backend import jit, tl, triton, use_triton
from ._checks import check_contiguous
from ._eight_bits import FP8, LARGEST
from ._ops import add_op_namespace_prefix

MOST_CHANNELS = 32768  # one program holds a row


class QuantizedRows(NamedTuple):
    """x = values * scales: `values` (R, D) float8_e4m3fn, `scales` (R, 1) float32."""

    values: Tensor
    scales: Tensor


# --- Triton kernel --------------------------------------------------------------------------------


@jit
def _quantize_rows_kernel(x, values, scales, D, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    wide = tl.load(x + r * D + d, mask=inside, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(wide), axis=0), 1.0 * LARGEST)
    scale = tl.where(scale == 0.0, 1.0, scale)
    tl.store(scales + r, scale)
    # The largest quotient is LARGEST to a rounding, and what rounds to LARGEST reaches farther.
    tl.store(values + r * D + d, tl.div_rn(wide, scale).to(values.dtype.element_ty), mask=inside)


# --- Launcher -------------------------------------------------------------------------------------


def quantize_rows_triton(x: Tensor) -> tuple[Tensor, Tensor]:
    """One launch, a program a row."""
    R, D = x.shape
    values = torch.empty_like(x, dtype=FP8)
    scales = x.new_empty(R, 1, dtype=torch.float32)
    block = triton.next_power_of_2(D)
    _quantize_rows_kernel[(R,)](
        x, values, scales, D, LARGEST=LARGEST,
        BLOCK=block, num_warps=min(max(block // 512, 1), 16), enable_fp_fusion=True,
    )  # fmt: skip
    return values, scales


# --- The torch path -------------------------------------------------------------------------------


def quantize_rows_torch(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same in torch's operations."""
    wide = x.float()
    scales = wide.abs().amax(dim=-1, keepdim=True) / LARGEST
    scales = torch.where(scales == 0, 1.0, scales)
    return (wide / scales).to(FP8), scales


# --- Custom op ------------------------------------------------------------------------------------


@torch.library.custom_op(add_op_namespace_prefix("quantize_rows"), mutates_args=())
def _quantize_rows_op(x: Tensor) -> tuple[Tensor, Tensor]:
    if not x.numel():
        return torch.empty_like(x, dtype=FP8), x.new_ones(len(x), 1, dtype=torch.float32)
    return (quantize_rows_triton if use_triton(x) else quantize_rows_torch)(x)


@_quantize_rows_op.register_fake
def _(x):
    return torch.empty_like(x, dtype=FP8), x.new_empty(len(x), 1, dtype=torch.float32)


# --- Public ---------------------------------------------------------------------------------------


def quantize_rows(x: Tensor) -> QuantizedRows:
    """float8_e4m3fn values and a float32 scale a row, whose product is `x` to 3 bits of mantissa.

    scales = amax(|x|) / 448 over the row (1 for a row of zeros), values = x / scales. Rows do not
    depend on each other, bit for bit. Not differentiable.

    Args:
        x: (R, D) float32, bfloat16 or float16, contiguous, D up to 32768.

    Returns:
        QuantizedRows(values (R, D), scales (R, 1)), as `torch.nn.functional.scaled_mm` takes them.

    Raises:
        ValueError: an argument of the wrong shape, strides or dtype.
    """
    check_contiguous("x", x)
    if x.dim() != 2 or x.shape[-1] > MOST_CHANNELS:
        raise ValueError(f"x has shape {tuple(x.shape)}: pass (R, D), D up to {MOST_CHANNELS}")
    return QuantizedRows(*_quantize_rows_op(x))
