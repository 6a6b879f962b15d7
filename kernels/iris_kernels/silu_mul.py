"""The gate of a SwiGLU, from one matrix product that holds gates and ups.

    out_i = silu(gate_i) * up_i,  silu(x) = x / (1 + exp(-x))

Computed in fp32; silu(gate) is rounded to the dtype of the input before it is multiplied by `up`,
as by the two separate operations.

Bytes moved for b-byte elements: 3 b I per row; one kernel launch instead of two.

Shapes: (..., 2 I), I gates and then I ups.
"""

import torch
from torch import Tensor

from ._backend import jit, tl, uses_triton
from ._checks import check_contiguous
from ._ops import add_op_namespace_prefix
from ._overlap import overlap_options, wait_for_previous_kernel

BLOCK = 2048


# --- Triton kernel --------------------------------------------------------------------------------


@jit
def _silu_mul_kernel(
    gate_up, out,  # [R, 2 I], [R, I]
    I,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_previous_kernel(OVERLAP)  # it wrote `gate_up`
    row = tl.program_id(0).to(tl.int64)  # the axis without a limit of 65535
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < I
    gate = tl.load(gate_up + row * 2 * I + i, mask=inside, other=0.0)
    up = tl.load(gate_up + row * 2 * I + I + i, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    product = silu.to(tl.float32) * up.to(tl.float32)
    tl.store(out + row * I + i, product.to(gate.dtype), mask=inside)


# --- Launcher -------------------------------------------------------------------------------------


def silu_mul_triton(gate_up: Tensor) -> Tensor:
    """One launch, 8 elements of each half per thread."""
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    grid = (out.numel() // width, -(-width // BLOCK))
    _silu_mul_kernel[grid](
        gate_up, out, width, BLOCK=BLOCK, num_warps=8, enable_fp_fusion=True, **overlap_options()
    )
    return out


# --- The torch path -------------------------------------------------------------------------------


def silu_mul_torch(gate_up: Tensor) -> Tensor:
    """The same in torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


# --- Custom op ------------------------------------------------------------------------------------


@torch.library.custom_op(add_op_namespace_prefix("silu_mul"), mutates_args=())
def _silu_mul_op(gate_up: Tensor) -> Tensor:
    if not gate_up.numel():
        return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    return (silu_mul_triton if uses_triton(gate_up) else silu_mul_torch)(gate_up)


@_silu_mul_op.register_fake
def _(gate_up):
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


# --- Public ---------------------------------------------------------------------------------------


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, of gates and ups next to each other. Not differentiable.

    Args:
        gate_up: (..., 2 I) float32, bfloat16 or float16, contiguous: I gates, then I ups.

    Returns:
        (..., I) in the dtype of `gate_up`.

    Raises:
        ValueError: an odd last dimension, a tensor that is not contiguous, or another dtype.
    """
    check_contiguous("gate_up", gate_up)
    if gate_up.shape[-1] % 2:
        raise ValueError(
            f"gate_up has {gate_up.shape[-1]} columns: pass gate and up of equal width"
        )
    return _silu_mul_op(gate_up)


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """`silu_mul` in eager torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * gate.sigmoid() * up
