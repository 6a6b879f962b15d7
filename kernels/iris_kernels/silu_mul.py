"""The gate of a SwiGLU, from gates and ups in one tensor or in two; differentiable.

    out_i = silu(gate_i) * up_i,  silu(x) = x s(x),  s(x) = 1 / (1 + exp(-x))
    d_gate_i = d_out_i up_i s(gate_i) (1 + gate_i (1 - s(gate_i))),  d_up_i = d_out_i silu(gate_i)

Computed in fp32; silu(gate) is rounded to the dtype of the input before it is multiplied, as by the
two separate operations. Backward keeps nothing but the inputs.

Bytes moved for b-byte elements: 3 b I per row; one kernel launch instead of two. Backward: 5 b I
per row (both inputs and the gradient read, two gradients written), one launch.

Shapes: (..., 2 I), I gates and then I ups, or two tensors (..., I).
"""

import torch
from torch import Tensor

from . import cpp
from ._backend import backend, direct_backend, jit, needs_gradient, tl
from ._checks import LOGIT_DTYPES, check_contiguous
from ._ops import add_op_namespace_prefix
from ._overlap import overlap_options, wait_for_previous_kernel

BLOCK = 2048


# --- Triton kernel --------------------------------------------------------------------------------


@jit
def _silu_mul_kernel(
    gates, ups, out,  # [R, I] each; gates and ups have rows STRIDE I apart
    I,
    STRIDE: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_previous_kernel(OVERLAP)  # it wrote gates and ups
    row = tl.program_id(0).to(tl.int64)  # the axis without a limit of 65535
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < I
    gate = tl.load(gates + row * STRIDE * I + i, mask=inside, other=0.0)
    up = tl.load(ups + row * STRIDE * I + i, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    product = silu.to(tl.float32) * up.to(tl.float32)
    tl.store(out + row * I + i, product.to(gate.dtype), mask=inside)


@jit
def _silu_mul_backward_kernel(
    gates, ups, d_out,  # [R, I] each; all but d_out have rows STRIDE I apart
    d_gates, d_ups,
    I,
    STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < I
    place = row * STRIDE * I + i
    gate = tl.load(gates + place, mask=inside, other=0.0)
    up = tl.load(ups + place, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(d_out + row * I + i, mask=inside, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-wide))
    silu = (wide * share).to(gate.dtype).to(tl.float32)
    d_gate = upstream * up * (share * (1.0 + wide * (1.0 - share)))
    tl.store(d_gates + place, d_gate.to(gate.dtype), mask=inside)
    tl.store(d_ups + place, (upstream * silu).to(gate.dtype), mask=inside)


# --- Launchers ------------------------------------------------------------------------------------


def silu_mul_triton(gate_up: Tensor, up: Tensor | None = None) -> Tensor:
    """One launch, 8 elements of each half per thread."""
    gate, up = halves(gate_up, up)
    width = gate.shape[-1]
    out = gate_up.new_empty(gate.shape)
    _silu_mul_kernel[_grid(out)](
        gate, up, out, width,
        STRIDE=gate_up.shape[-1] // width, BLOCK=BLOCK, num_warps=8, enable_fp_fusion=True,
        **overlap_options(),
    )  # fmt: skip
    return out


def silu_mul_backward_triton(
    gate_up: Tensor, up: Tensor | None, d_out: Tensor
) -> tuple[Tensor, Tensor | None]:
    """One launch; gradients of both arguments."""
    gate, ups = halves(gate_up, up)
    width = gate.shape[-1]
    gradients = torch.empty_like(gate_up), None if up is None else torch.empty_like(up)
    _silu_mul_backward_kernel[_grid(d_out)](
        gate, ups, d_out, *halves(*gradients), width,
        STRIDE=gate_up.shape[-1] // width, BLOCK=BLOCK, num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    return gradients


def _grid(out: Tensor) -> tuple[int, int]:
    width = out.shape[-1]
    return out.numel() // width, -(-width // BLOCK)


def halves(gate_up: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gates and ups (..., I)."""
    if up is not None:
        return gate_up, up
    gate, up = gate_up.chunk(2, dim=-1)
    return gate, up


# --- The C++ path ---------------------------------------------------------------------------------

_forward = cpp.function(
    "iris_silu_mul", None, cpp.INT, cpp.POINTER, cpp.POINTER, cpp.LONG, cpp.POINTER, cpp.LONG,
    cpp.LONG, cpp.INT,
)  # fmt: skip
_backward = cpp.function(
    "iris_silu_mul_backward", None, cpp.INT, *[cpp.POINTER] * 3, cpp.LONG, cpp.POINTER,
    cpp.POINTER, cpp.LONG, cpp.LONG, cpp.INT,
)  # fmt: skip


def silu_mul_cpp(gate_up: Tensor, up: Tensor | None = None) -> Tensor:
    """One pass over gates and ups."""
    # `empty_like` takes half the time of `new_empty`.
    out = torch.empty_like(up) if up is not None else gate_up.new_empty(_out_shape(gate_up, up))
    gates, ups, rows, width = _halves_cpp(gate_up, up)
    _forward()(
        gate_up.dtype == torch.bfloat16, gates, ups, 2 * width, out.data_ptr(), rows, width,
        cpp.threads(rows * width),
    )  # fmt: skip
    return out


def silu_mul_backward_cpp(
    gate_up: Tensor, up: Tensor | None, d_out: Tensor
) -> tuple[Tensor, Tensor | None]:
    """One pass over gates, ups and their gradients."""
    gradients = torch.empty_like(gate_up), None if up is None else torch.empty_like(up)
    gates, ups, rows, width = _halves_cpp(gate_up, up)
    d_gates, d_ups, _, _ = _halves_cpp(*gradients)
    _backward()(
        gate_up.dtype == torch.bfloat16, gates, ups, d_out.data_ptr(), 2 * width, d_gates, d_ups,
        rows, width, cpp.threads(rows * width),
    )  # fmt: skip
    return gradients


def _halves_cpp(gate_up: Tensor, up: Tensor | None) -> tuple[int, int, int, int]:
    """Addresses of gates and ups, number of rows, and columns in each; two tensors are one row."""
    gates = gate_up.data_ptr()
    if up is not None:
        return gates, up.data_ptr(), 1, gate_up.numel()
    width = gate_up.shape[-1] // 2
    return gates, gates + width * gate_up.element_size(), gate_up.numel() // (2 * width), width


# --- The torch path -------------------------------------------------------------------------------


def silu_mul_torch(gate_up: Tensor, up: Tensor | None = None) -> Tensor:
    """The same in torch."""
    gate, up = halves(gate_up, up)
    return torch.nn.functional.silu(gate).mul_(up)


def silu_mul_backward_torch(
    gate_up: Tensor, up: Tensor | None, d_out: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The same in torch."""
    gate, ups = halves(gate_up, up)
    wide, upstream = (t if t.dtype == torch.float64 else t.float() for t in (gate, d_out))
    share = wide.sigmoid()
    silu = (wide * share).to(gate.dtype)
    gradients = torch.empty_like(gate_up), None if up is None else torch.empty_like(up)
    d_gate, d_up = halves(*gradients)
    d_gate.copy_(upstream * ups * (share * (1 + wide * (1 - share))))
    d_up.copy_(upstream * silu)
    return gradients


FORWARD = {"triton": silu_mul_triton, "cpp": silu_mul_cpp, "torch": silu_mul_torch}
BACKWARD = {
    "triton": silu_mul_backward_triton,
    "cpp": silu_mul_backward_cpp,
    "torch": silu_mul_backward_torch,
}


# --- Custom ops and autograd ----------------------------------------------------------------------


@torch.library.custom_op(add_op_namespace_prefix("silu_mul"), mutates_args=())
def _silu_mul_op(gate_up: Tensor, up: Tensor | None) -> Tensor:
    if not gate_up.numel():
        return gate_up.new_empty(_out_shape(gate_up, up))
    return FORWARD[backend(gate_up)](gate_up, up)


@_silu_mul_op.register_fake
def _(gate_up, up):
    return gate_up.new_empty(_out_shape(gate_up, up))


def _out_shape(gate_up: Tensor, up: Tensor | None) -> tuple[int, ...]:
    return (*gate_up.shape[:-1], gate_up.shape[-1] // 2) if up is None else gate_up.shape


@torch.library.custom_op(add_op_namespace_prefix("silu_mul_backward"), mutates_args=())
def _backward_op(gate_up: Tensor, up: Tensor | None, d_out: Tensor) -> tuple[Tensor, Tensor]:
    """The second gradient is empty if gates and ups are one tensor."""
    if gate_up.numel():
        d_gate_up, d_up = BACKWARD[backend(gate_up)](gate_up, up, d_out)
    else:
        d_gate_up, d_up = torch.empty_like(gate_up), None if up is None else torch.empty_like(up)
    return d_gate_up, gate_up.new_empty(0) if d_up is None else d_up


@_backward_op.register_fake
def _(gate_up, up, d_out):
    d_up = gate_up.new_empty(0) if up is None else torch.empty_like(up)
    return torch.empty_like(gate_up), d_up


def _autograd_backward(ctx, d_out):
    (gate_up, up), d_out = ctx.saved_tensors, d_out.contiguous()
    path = direct_backend(gate_up, up, d_out)
    if path and gate_up.numel():
        return BACKWARD[path](gate_up, up, d_out)
    d_gate_up, d_up = _backward_op(gate_up, up, d_out)
    return d_gate_up, None if up is None else d_up


_silu_mul_op.register_autograd(
    _autograd_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


# --- Eager mode on a CPU, without the custom ops --------------------------------------------------


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, up, path):
        ctx.save_for_backward(gate_up, up)
        return FORWARD[path](gate_up, up)

    @staticmethod
    def backward(ctx, d_out):
        return *_autograd_backward(ctx, d_out), None


# --- Public ---------------------------------------------------------------------------------------


def silu_mul(gate_up: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up. Differentiable with respect to both.

    Args:
        gate_up: (..., 2 I) float32, bfloat16 or float16 (float64 on the torch path), contiguous: I
            gates, then I ups. With `up`, (..., I): the gates alone.
        up: the ups, of the shape and dtype of the gates.

    Returns:
        (..., I) in the dtype of `gate_up`.

    Raises:
        ValueError: an odd last dimension, a tensor that is not contiguous, or another shape or
            dtype.
    """
    check_contiguous("gate_up", gate_up, dtypes=LOGIT_DTYPES)
    if up is not None:
        check_contiguous("up", up, gate_up.shape, gate_up, dtypes=LOGIT_DTYPES)
    elif gate_up.shape[-1] % 2:
        raise ValueError(
            f"gate_up has {gate_up.shape[-1]} columns: pass gate and up of equal width"
        )
    path = direct_backend(gate_up, up, with_gradient=True)
    if path is None or not gate_up.numel():
        return _silu_mul_op(gate_up, up)
    if needs_gradient(gate_up, up):
        return _SiluMul.apply(gate_up, up, path)
    return FORWARD[path](gate_up, up)


def silu_mul_reference(gate_up: Tensor, up: Tensor | None = None) -> Tensor:
    """`silu_mul` in eager torch."""
    gate, up = halves(gate_up, up)
    return gate * gate.sigmoid() * up
