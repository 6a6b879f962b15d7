"""`token_stats` of hidden @ weight.T + bias, without ever holding the [R, V] logits.

Logits are computed tile by tile [C rows, B columns] by torch's matrix product, accumulated and kept
in fp32, and a row's sums are carried from one tile to the next. Backward computes every tile again,
turns it into its gradient G, and from it

    d hidden = G @ weight        d weight = G.T @ hidden        d bias = sum over rows of G

Sums over tiles are accumulated in fp32, also for half-precision gradients: for `hidden` one row
chunk at a time; for a half-precision `weight` one column block at a time, in a second loop over the
tiles. Backward thus costs three products of R V D multiply-adds, four if such a weight is trained,
two if the weight is frozen; forward costs one. Memory besides inputs and gradients stays under
64 MB for any R and V. On a CPU, fp32 logits of up to `KEPT_LOGITS_BYTES` are kept where a gradient
is needed, and backward saves the product that computes them again.

Shapes: R rows, D hidden width, V columns (classes), tiles [C, B].
"""

import math

import torch
from torch import Tensor

from .._backend import calls_directly
from .._checks import (
    LOGIT_DTYPES,
    check_ids_in_range,
    check_temperature,
    check_token_ids,
    check_vocab_size,
)
from .._ops import add_op_namespace_prefix
from .._row_stats import compute_dtype
from .._scalars import to_scalar_tensor
from ..token_stats import TokenStats, token_stats, token_stats_reference
from .tiles import backward_tiles, flatten, forward_tiles

KEPT_LOGITS_BYTES = 32 << 20  # on a CPU: logits up to here are kept for the backward pass

# --- Custom ops and autograd ----------------------------------------------------------------------


@torch.library.custom_op(add_op_namespace_prefix("linear_token_stats"), mutates_args=())
def _linear_token_stats_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, mask: Tensor | None,
    temperature: Tensor, vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    outputs = _empty_outputs(hidden, token_ids)
    check_ids_in_range(token_ids, mask, vocab_size)
    if token_ids.numel():
        head = flatten(hidden, weight, bias, token_ids, mask, temperature, vocab_size)
        with torch.autocast(hidden.device.type, enabled=False):
            forward_tiles(head, [out.reshape(-1) for out in outputs])
    return outputs


@_linear_token_stats_op.register_fake
def _(hidden, weight, bias, token_ids, *_):
    return _empty_outputs(hidden, token_ids)


def _empty_outputs(hidden: Tensor, token_ids: Tensor) -> tuple[Tensor, ...]:
    return tuple(hidden.new_empty(token_ids.shape, dtype=compute_dtype(hidden)) for _ in range(6))


@torch.library.custom_op(add_op_namespace_prefix("linear_token_stats_backward"), mutates_args=())
def _backward_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, mask: Tensor | None,
    temperature: Tensor, vocab_size: int,
    row_max: Tensor, sum_exp: Tensor, entropy: Tensor,
    grad_logprob: Tensor | None, grad_nsc: Tensor | None,
    grad_entropy: Tensor | None, grad_lse: Tensor | None,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    gradients = _zero_gradients(hidden, weight, needed)
    if token_ids.numel():
        upstream = (grad_logprob, grad_nsc, grad_entropy, grad_lse)
        d_hidden, d_weight, d_bias = (
            g if is_needed else None for g, is_needed in zip(gradients, needed, strict=True)
        )
        with torch.autocast(hidden.device.type, enabled=False):
            backward_tiles(
                flatten(hidden, weight, bias, token_ids, mask, temperature, vocab_size),
                [t.reshape(-1) for t in (row_max, sum_exp, entropy)],
                [None if g is None else g.reshape(-1).contiguous() for g in upstream],
                None if d_hidden is None else d_hidden.view(-1, hidden.shape[-1]),
                None if d_weight is None else d_weight[:vocab_size],
                None if d_bias is None else d_bias[:vocab_size],
            )
    return gradients


@_backward_op.register_fake
def _(hidden, weight, *rest):
    return _zero_gradients(hidden, weight, rest[-1])


def _zero_gradients(hidden, weight, needed) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias (fp32), empty where not needed."""
    d_hidden, d_weight, d_bias = needed
    return (
        hidden.new_zeros(hidden.shape if d_hidden else 0),
        weight.new_zeros(weight.shape if d_weight else 0),
        hidden.new_zeros(weight.shape[0] if d_bias else 0, dtype=compute_dtype(hidden)),
    )


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.vocab_size = inputs
    _, _, entropy, _, row_max, sum_exp = output
    ctx.mark_non_differentiable(row_max, sum_exp)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, row_max, sum_exp, entropy)


def _autograd_backward(ctx, *upstream):
    *inputs, row_max, sum_exp, entropy = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:3])
    gradients = _backward_op(
        *inputs, ctx.vocab_size, row_max, sum_exp, entropy, *upstream[:4], needed
    )
    returned = (g if is_needed else None for g, is_needed in zip(gradients, needed, strict=True))
    return *returned, None, None, None, None


_linear_token_stats_op.register_autograd(_autograd_backward, setup_context=_setup_context)


# --- Public ---------------------------------------------------------------------------------------


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
) -> TokenStats:
    """`token_stats(hidden @ weight.T + bias, token_ids)` without holding the logits.

    The logits are accumulated and kept in float32, also for half-precision inputs, so the results
    are more exact than those of half-precision logits. Memory besides inputs and gradients stays
    under 64 MB. Differentiable with respect to `hidden`, `weight` and `bias`; each gradient is
    computed only if it is required, so a frozen `weight` costs no matrix product.
    `linear_token_stats_reference` is the same in eager torch.

    Args:
        hidden: (..., D) float32, bfloat16 or float16 (float64 on the torch path).
        weight: (V_held, D), a plain tensor of the same dtype; with FSDP2, the gathered one.
        token_ids: (...) int64 or int32 in [0, vocab_size); -100 for a row without a token.
        bias: (V_held), of the same dtype, or None.
        temperature, mask, vocab_size: as for `token_stats`; classes from vocab_size on are
            padding, and their rows of `weight` get gradient 0.

    Under torch.autocast the inputs are first cast to its dtype, as for torch.nn.functional.linear.
    A row's result does not depend on the values of other rows, but torch's matrix product may round
    a row differently for another number of rows.

    Returns:
        TokenStats(logprob, nsc, entropy, lse), each float32 (...), as `token_stats`.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range; token ids out of range
            as in `token_stats`.
    """
    _check_head(hidden, weight, bias)
    check_token_ids(token_ids, mask, hidden)
    check_temperature(temperature, hidden)
    vocab_size = check_vocab_size(vocab_size, weight.shape[0])
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"weight has dtype {weight.dtype} but hidden has {hidden.dtype}: cast one of them"
        )
    if _keeps_logits(hidden, vocab_size):
        return _with_logits(hidden, weight, bias, token_ids, mask, temperature, vocab_size)
    temperature = to_scalar_tensor(temperature, hidden)
    out = _linear_token_stats_op(hidden, weight, bias, token_ids, mask, temperature, vocab_size)
    return TokenStats(*out[:4])


def _keeps_logits(hidden: Tensor, vocab_size: int) -> bool:
    """Whether all logits are computed at once, and kept until their gradient overwrites them: in
    eager mode on a CPU, if they take at most `KEPT_LOGITS_BYTES`."""
    kept_bytes = math.prod(hidden.shape[:-1]) * vocab_size * hidden.element_size()
    return (
        kept_bytes <= KEPT_LOGITS_BYTES
        and hidden.dtype == compute_dtype(hidden)
        and calls_directly(hidden, with_gradient=True)
    )


def _with_logits(hidden, weight, bias, token_ids, mask, temperature, vocab_size) -> TokenStats:
    """The same by one product, whose result the backward pass overwrites by its gradient."""
    if vocab_size < weight.shape[0]:
        weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
    with torch.autocast(hidden.device.type, enabled=False):
        logits = torch.nn.functional.linear(hidden, weight, bias)
        return token_stats(
            logits, token_ids, temperature=temperature, mask=mask, inplace_backward=True
        )


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in LOGIT_DTYPES:
            raise ValueError(
                f"{name} has dtype {tensor.dtype}: cast it to float32, bfloat16 or float16"
            )
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"{name} is on {tensor.device} but hidden is on {hidden.device}: move it"
            )
    matching = hidden.dim() > 0 and weight.dim() == 2 and weight.shape[1] == hidden.shape[-1]
    if not matching or 0 in weight.shape:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} but hidden has {tuple(hidden.shape)}: "
            "pass (V, D) and (..., D), V and D at least 1"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)} but weight has {weight.shape[0]} rows: "
            "pass one number per class"
        )


def linear_token_stats_reference(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
) -> TokenStats:
    """`linear_token_stats` in eager torch; holds all logits, in the dtype of `hidden`."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return token_stats_reference(logits, token_ids, temperature=temperature)
