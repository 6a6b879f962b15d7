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
from dataclasses import dataclass

import torch
from torch import Tensor

from ._backend import calls_torch_path, uses_triton
from ._checks import (
    LOGIT_DTYPES,
    check_ids_in_range,
    check_temperature,
    check_token_ids,
    check_vocab_size,
)
from ._ops import add_op_namespace_prefix
from ._row_stats import CHUNK_ELEMENTS, compute_dtype
from ._scalars import to_kernel_argument, to_scalar_tensor
from .token_stats import (
    Columns,
    TokenStats,
    backward_torch,
    backward_triton,
    forward_torch,
    forward_triton,
    token_stats,
    token_stats_reference,
)

TILE_ELEMENTS = 1 << 22  # on a GPU: 17 MB of fp32 logits, which fit the L2 cache
SUM_ELEMENTS = 1 << 22  # of an fp32 sum over tiles: 17 MB, on a CPU as much for its summand
KEPT_LOGITS_BYTES = 32 << 20  # on a CPU: logits up to here are kept for the backward pass
MIN_TILE_SIDE = 128  # below that, a tile's matrix product is slow


# --- Tiles ----------------------------------------------------------------------------------------


def tile_shape(R: int, V: int, D: int, on_cpu: bool, *, sum_columns: bool = False):
    """Rows and columns of a tile; the sum over tiles is [rows, D], or [columns, D]."""
    elements = CHUNK_ELEMENTS if on_cpu else TILE_ELEMENTS
    summed = min(max(MIN_TILE_SIDE, SUM_ELEMENTS // D), 512 if on_cpu else 2048)
    if sum_columns:
        return min(elements // summed, max(R, 1)), min(summed, V)
    rows, columns = summed, elements // min(summed, max(R, 1))
    if columns >= V:  # few classes: take more rows
        rows = min(max(rows, elements // V), max(MIN_TILE_SIDE, SUM_ELEMENTS // D))
    return min(rows, max(R, 1)), min(columns, V)


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated and returned in fp32 (fp64 for fp64 inputs)."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the dtype of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:  # the product adds: half the traffic of a temporary, and none of its memory
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += matmul_fp32(a, b)


@dataclass(frozen=True)
class _Head:
    """The flattened arguments of forward and backward."""

    hidden: Tensor  # [R, D]
    weight: Tensor  # [V, D], without padding
    bias: Tensor | None  # [V]
    token_ids: Tensor  # [R]
    mask: Tensor | None  # [R]
    temperature: float | Tensor

    def columns(self, start: int, stop: int, state: Tensor | None = None) -> Columns:
        """The tile's columns `start` to `stop`, for the kernels."""
        V = self.weight.shape[0]
        bias = None if self.bias is None else self.bias[start:stop]
        return Columns(stop - start, start, V, bias, state, start == 0, stop == V)

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Token ids and mask of a chunk."""
        return self.token_ids[start:stop], None if self.mask is None else self.mask[start:stop]


def _flatten(hidden, weight, bias, token_ids, mask, temperature, vocab_size) -> _Head:
    return _Head(
        hidden.reshape(-1, hidden.shape[-1]),
        weight[:vocab_size],
        None if bias is None else bias[:vocab_size].contiguous(),
        token_ids.reshape(-1).contiguous(),
        None if mask is None else mask.reshape(-1).contiguous(),
        to_kernel_argument(temperature),
    )


def _spans(count: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, count)) for start in range(0, count, step)]


# --- Forward and backward over tiles --------------------------------------------------------------


def _forward(head: _Head, outputs: list[Tensor]) -> None:
    """Fill the six flat `outputs` [R] of token_stats."""
    run = forward_triton if uses_triton(head.hidden) else forward_torch
    (R, D), V = head.hidden.shape, head.weight.shape[0]
    C, B = tile_shape(R, V, D, head.hidden.is_cpu)
    for start, stop in _spans(R, C):
        state = outputs[0].new_empty(5, stop - start)
        for first, last in _spans(V, B):
            logits = matmul_fp32(head.hidden[start:stop], head.weight[first:last].t())
            run(
                logits, *head.rows(start, stop), head.temperature,
                head.columns(first, last, state), [out[start:stop] for out in outputs],
            )  # fmt: skip


def _gradient_tile(head, saved, upstream, rows, columns) -> Tensor:
    """The gradient of a tile of logits, in the dtype of the head."""
    (start, stop), (first, last) = rows, columns
    run = backward_triton if uses_triton(head.hidden) else backward_torch
    logits = matmul_fp32(head.hidden[start:stop], head.weight[first:last].t())
    same_dtype = head.hidden.dtype == logits.dtype
    gradient = logits if same_dtype else torch.empty_like(logits, dtype=head.hidden.dtype)
    run(
        logits, gradient, *head.rows(start, stop), [t[start:stop] for t in saved],
        [None if g is None else g[start:stop] for g in upstream], head.temperature,
        head.columns(first, last),
    )  # fmt: skip
    return gradient


def _backward(head: _Head, saved, upstream, d_hidden, d_weight, d_bias) -> None:
    """Add to those gradients [R, D], [V, D], [V] that are not None; they must be zeros."""
    full_precision = head.hidden.dtype == compute_dtype(head.hidden)
    if d_hidden is not None or d_bias is not None or (full_precision and d_weight is not None):
        d_w = d_weight if full_precision else None
        _backward_by_rows(head, saved, upstream, d_hidden, d_w, d_bias)
    if d_weight is not None and not full_precision:
        _backward_by_columns(head, saved, upstream, d_weight)


def _backward_by_rows(head: _Head, saved, upstream, d_hidden, d_weight, d_bias) -> None:
    """All gradients, one row of tiles at a time; that of the weight only if it can be accumulated
    in its own dtype."""
    (R, D), V = head.hidden.shape, head.weight.shape[0]
    full_precision = head.hidden.dtype == compute_dtype(head.hidden)
    C, B = tile_shape(R, V, D, head.hidden.is_cpu)
    for rows in _spans(R, C):
        h = head.hidden[slice(*rows)]
        d_h = None if d_hidden is None else _accumulator(d_hidden[slice(*rows)], full_precision)
        for columns in _spans(V, B):
            block = slice(*columns)
            g = _gradient_tile(head, saved, upstream, rows, columns)
            if d_h is not None:
                add_matmul(d_h, g, head.weight[block])
            if d_weight is not None:
                add_matmul(d_weight[block], g.t(), h)
            if d_bias is not None:
                d_bias[block] += g.sum(0, dtype=d_bias.dtype)
        if d_h is not None and not full_precision:
            d_hidden[slice(*rows)] = d_h


def _backward_by_columns(head: _Head, saved, upstream, d_weight) -> None:
    """The gradient of a half-precision weight, accumulated in fp32 one block of columns at a time.
    Tiles are computed again: by rows, the fp32 sum would be as large as the weight."""
    (R, D), V = head.hidden.shape, head.weight.shape[0]
    C, B = tile_shape(R, V, D, head.hidden.is_cpu, sum_columns=True)
    for columns in _spans(V, B):
        d_w = _accumulator(d_weight[slice(*columns)], full_precision=False)
        for rows in _spans(R, C):
            g = _gradient_tile(head, saved, upstream, rows, columns)
            add_matmul(d_w, g.t(), head.hidden[slice(*rows)])
        d_weight[slice(*columns)] = d_w


def _accumulator(gradient: Tensor, full_precision: bool) -> Tensor:
    """Where `gradient` is accumulated: itself, or an fp32 tensor."""
    return gradient if full_precision else torch.zeros_like(gradient, dtype=torch.float32)


# --- Custom ops and autograd ----------------------------------------------------------------------


@torch.library.custom_op(add_op_namespace_prefix("linear_token_stats"), mutates_args=())
def _linear_token_stats_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, mask: Tensor | None,
    temperature: Tensor, vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    outputs = _empty_outputs(hidden, token_ids)
    check_ids_in_range(token_ids, mask, vocab_size)
    if token_ids.numel():
        head = _flatten(hidden, weight, bias, token_ids, mask, temperature, vocab_size)
        with torch.autocast(hidden.device.type, enabled=False):
            _forward(head, [out.reshape(-1) for out in outputs])
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
            _backward(
                _flatten(hidden, weight, bias, token_ids, mask, temperature, vocab_size),
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
    if _keeps_logits(hidden, weight, bias, vocab_size):
        return _with_logits(hidden, weight, bias, token_ids, mask, temperature, vocab_size)
    temperature = to_scalar_tensor(temperature, hidden)
    out = _linear_token_stats_op(hidden, weight, bias, token_ids, mask, temperature, vocab_size)
    return TokenStats(*out[:4])


def _keeps_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab_size: int) -> bool:
    """Whether all logits are computed once and kept until their gradient overwrites them: in eager
    mode on a CPU, if a gradient is needed and they take at most `KEPT_LOGITS_BYTES`."""
    tensors = [t for t in (hidden, weight, bias) if t is not None]
    size = math.prod(hidden.shape[:-1]) * vocab_size * hidden.element_size()
    return (
        size <= KEPT_LOGITS_BYTES
        and hidden.dtype == compute_dtype(hidden)
        and torch.is_grad_enabled()
        and any(t.requires_grad for t in tensors)
        and calls_torch_path(hidden, with_gradient=True)
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
