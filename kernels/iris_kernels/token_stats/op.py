"""`token_stats`: custom ops, autograd, the public function and its eager reference.

With x = logits / temperature over V classes, p = softmax(x) and the row's token a:

    lse     = logsumexp(x)                               d/dx_j = p_j
    logprob = x_a - lse                                  d/dx_j = 1[j = a] - p_j
    nsc     = mean(x) - lse + log V = -KL(uniform || p)  d/dx_j = 1/V - p_j
    entropy = lse - sum_j p_j x_j                        d/dx_j = -p_j (log p_j + entropy)

Bytes moved for R rows of b-byte logits: forward R V b (one read), backward 2 R V b (one read, one
write). Saved for backward besides the logits: five fp32 numbers per row.

`_row_stats` describes the arithmetic and how it keeps its precision.

Shapes: R rows, V columns (classes that exist), V_held columns in memory.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._backend import backend, calls_directly, prefer_huge_pages
from .._checks import (
    check_ids_in_range,
    check_logits,
    check_temperature,
    check_token_ids,
    check_vocab_size,
    last_dim_contiguous,
)
from .._ops import add_op_namespace_prefix
from .._row_stats import compute_dtype
from .._scalars import to_kernel_argument, to_scalar_tensor
from .columns import Columns
from .cpp_path import backward_cpp, forward_cpp
from .torch_path import backward_torch, forward_torch
from .triton_path import backward_triton, forward_triton


class TokenStats(NamedTuple):
    """Per-row statistics, each float32 and shaped like `token_ids`."""

    logprob: Tensor
    nsc: Tensor
    entropy: Tensor
    lse: Tensor


# --- Custom ops and autograd ----------------------------------------------------------------------


@torch.library.custom_op(add_op_namespace_prefix("token_stats"), mutates_args=())
def _token_stats_op(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: Tensor, vocab_size: int,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _forward(logits, token_ids, mask, to_kernel_argument(temperature), vocab_size)


def _forward(logits, token_ids, mask, temperature, vocab_size) -> tuple[Tensor, ...]:
    """The six outputs of the custom op, in the shape of `token_ids`."""
    outputs, path = _empty_outputs(logits, token_ids), backend(logits)
    if not token_ids.numel():
        return outputs
    per_row = _flat(token_ids), _flat(mask)
    flat_outputs = [_flat(out) for out in outputs]
    if path == "cpp":
        forward_cpp(logits, *per_row, float(temperature), vocab_size, flat_outputs)
        return outputs
    check_ids_in_range(token_ids, mask, vocab_size)
    run = forward_triton if path == "triton" else forward_torch
    run(logits, *per_row, temperature, Columns(vocab_size), flat_outputs)
    return outputs


@_token_stats_op.register_fake
def _(logits, token_ids, *_):
    return _empty_outputs(logits, token_ids)


def _empty_outputs(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, ...]:
    first = torch.empty(token_ids.shape, dtype=compute_dtype(logits), device=logits.device)
    return first, *(torch.empty_like(first) for _ in range(5))


def _flat(per_row: Tensor | None) -> Tensor | None:
    if per_row is None or (per_row.dim() == 1 and per_row.is_contiguous()):
        return per_row
    return per_row.reshape(-1).contiguous()  # also if expanded


@torch.library.custom_op(add_op_namespace_prefix("token_stats_backward"), mutates_args=())
def _backward_op(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None,
    row_max: Tensor, sum_exp: Tensor, entropy: Tensor,
    grad_logprob: Tensor | None, grad_nsc: Tensor | None,
    grad_entropy: Tensor | None, grad_lse: Tensor | None,
    temperature: Tensor, vocab_size: int,
) -> Tensor:  # fmt: skip
    grad = prefer_huge_pages(torch.empty(logits.shape, dtype=logits.dtype, device=logits.device))
    _run_backward(
        logits, grad, token_ids, mask, (row_max, sum_exp, entropy),
        (grad_logprob, grad_nsc, grad_entropy, grad_lse),
        to_kernel_argument(temperature), vocab_size,
    )  # fmt: skip
    return grad


@_backward_op.register_fake
def _(logits, *_):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.custom_op(add_op_namespace_prefix("token_stats_backward_"), mutates_args={"logits"})
def _backward_inplace_op(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None,
    row_max: Tensor, sum_exp: Tensor, entropy: Tensor,
    grad_logprob: Tensor | None, grad_nsc: Tensor | None,
    grad_entropy: Tensor | None, grad_lse: Tensor | None,
    temperature: Tensor, vocab_size: int,
) -> None:  # fmt: skip
    _run_backward(
        logits, logits, token_ids, mask, (row_max, sum_exp, entropy),
        (grad_logprob, grad_nsc, grad_entropy, grad_lse),
        to_kernel_argument(temperature), vocab_size,
    )  # fmt: skip


@_backward_inplace_op.register_fake
def _(*_):
    return None


def _run_backward(logits, grad, token_ids, mask, saved, upstream, temperature, vocab_size) -> None:
    if not token_ids.numel():
        return
    per_row = [_flat(t) for t in saved], [_flat(g) for g in upstream]
    arguments = (logits, grad, _flat(token_ids), _flat(mask), *per_row)
    path = backend(logits)
    if path == "cpp":
        backward_cpp(*arguments, float(temperature), vocab_size)
    else:
        run = backward_triton if path == "triton" else backward_torch
        run(*arguments, temperature, Columns(vocab_size))


def _setup_context(ctx, inputs, output) -> None:
    logits, token_ids, mask, temperature, ctx.vocab_size, ctx.inplace = inputs
    _, _, entropy, _, row_max, sum_exp = output
    ctx.mark_non_differentiable(row_max, sum_exp)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(temperature, logits, token_ids, mask, row_max, sum_exp, entropy)


def _backward(ctx, *upstream):
    temperature, logits, *saved = ctx.saved_tensors
    arguments = (*saved, *upstream[:4], temperature, ctx.vocab_size)
    if ctx.inplace:
        logits = logits.detach()  # shares the version counter: autograd detects other readers
        _backward_inplace_op(logits, *arguments)
        return logits, None, None, None, None, None
    return _backward_op(logits, *arguments), None, None, None, None, None


_token_stats_op.register_autograd(_backward, setup_context=_setup_context)


# --- Eager mode on a CPU, without the custom ops --------------------------------------------------


class _TokenStats(torch.autograd.Function):
    """The same tensors are saved and returned as by the custom ops."""

    @staticmethod
    def forward(ctx, logits, token_ids, mask, temperature, vocab_size, inplace):
        out = _forward(logits, token_ids, mask, temperature, vocab_size)
        ctx.mark_non_differentiable(*out[4:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, token_ids, mask, out[4], out[5], out[2])
        ctx.temperature, ctx.vocab_size, ctx.inplace = temperature, vocab_size, inplace
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream):
        logits, token_ids, mask, *saved = ctx.saved_tensors
        if not calls_directly(logits, *upstream[:4], with_gradient=True):
            temperature = to_scalar_tensor(ctx.temperature, logits)
            grad = _backward_op(
                logits, token_ids, mask, *saved, *upstream[:4], temperature, ctx.vocab_size
            )
            return grad, None, None, None, None, None
        # A graph that is kept is run again, and needs the logits then.
        if ctx.inplace and not torch._C._autograd._get_current_graph_task_keep_graph():
            grad = logits = logits.detach()
        else:
            grad = prefer_huge_pages(logits.new_empty(logits.shape))
        _run_backward(
            logits, grad, token_ids, mask, saved, upstream[:4], ctx.temperature, ctx.vocab_size
        )
        return grad, None, None, None, None, None


# --- Public ---------------------------------------------------------------------------------------


def token_stats(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
) -> TokenStats:
    """Log-probability of `token_ids`, negative self-certainty, entropy and logsumexp of each row.

    With x = logits / temperature, p = softmax(x), V = vocab_size: logprob = x_a - lse,
    nsc = mean(x) - lse + log V = -KL(uniform || p), entropy = lse - sum(p x), lse = logsumexp(x).
    All four are differentiable with respect to `logits`, alone or together. Backward computes from
    the logits again; besides them, five numbers per row are saved. `token_stats_reference` is the
    same in eager torch.

    Args:
        logits: (..., V_held) float32, bfloat16 or float16, computed in float32; float64 is computed
            in float64, on the torch path only. Any strides; if those of the last dimension are not
            1, a contiguous copy is made.
        token_ids: (...) int64 or int32 in [0, vocab_size); -100 for a row without a token.
        temperature: a positive number; a run-time value, so a new one compiles nothing. A 0-dim
            tensor is read again in every replay of a captured graph; it gets no gradient.
        mask: (...) bool; rows that are False give 0 and get gradient 0, like rows of -100; their
            logits are not used.
        vocab_size: columns from here on are padding; their gradient is 0. None: no padding.
        inplace_backward: write the gradient over the logits, which saves R * V_held elements.
            Autograd then refuses the backward of any other operation that saved those logits. In
            eager mode on a CPU, a backward pass with retain_graph=True writes a new gradient.

    Returns:
        TokenStats(logprob, nsc, entropy, lse), each float32 (...).
        A logit of -inf masks a class: nsc is -inf (the uniform distribution has mass there), the
        others are as without the class, and the gradient of nsc remains (1/V - p_j) / temperature.
        A row in which every logit is -inf has logprob, nsc and lse -inf, and entropy 0. NaN stays
        NaN.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range. A token id out of range
            is detected on the CPU only, because on a GPU the check would cost a sync; there nothing
            is read out of bounds, and the row's statistics and gradients are NaN.
    """
    check_logits("logits", logits)
    check_token_ids(token_ids, mask, logits)
    check_temperature(temperature, logits)
    vocab_size = check_vocab_size(vocab_size, logits.shape[-1])
    logits = last_dim_contiguous(logits)
    if inplace_backward:
        _check_overwritable(logits)
    if calls_directly(logits, token_ids, mask, with_gradient=True):
        arguments = (logits, token_ids, mask, float(temperature), vocab_size)
        if torch.is_grad_enabled() and logits.requires_grad:
            return TokenStats(*_TokenStats.apply(*arguments, inplace_backward)[:4])
        return TokenStats(*_forward(*arguments)[:4])
    temperature = to_scalar_tensor(temperature, logits)
    out = _token_stats_op(logits, token_ids, mask, temperature, vocab_size, inplace_backward)
    return TokenStats(*out[:4])


def is_leaf_memory(logits: Tensor) -> bool:
    """Whether the logits are a leaf that requires gradients, or a view of one."""
    base = logits
    # In a compiled graph tensors have no base, and the compiler handles in-place writes itself.
    if not torch.compiler.is_compiling() and logits._is_view():
        base = logits._base
    return base.is_leaf and base.requires_grad


def _check_overwritable(logits: Tensor) -> None:
    if is_leaf_memory(logits):
        raise ValueError(
            "inplace_backward=True, but logits is a leaf, or a view of one, whose values would be "
            "overwritten: pass the output of an operation, or inplace_backward=False"
        )
    extent = 1  # elements spanned by the dimensions with smaller strides
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1 and stride < extent:
            raise ValueError(
                "inplace_backward=True, but rows of logits share memory (an expanded tensor, or "
                "overlapping windows): pass logits.contiguous(), or inplace_backward=False"
            )
        extent += (size - 1) * stride


def token_stats_reference(
    logits: Tensor, token_ids: Tensor, *, temperature: float = 1.0
) -> TokenStats:
    """`token_stats` in eager torch; holds several (..., V) tensors, no mask, no -inf."""
    logprobs = torch.log_softmax(logits.to(compute_dtype(logits)) / temperature, -1)
    return TokenStats(
        logprob=logprobs.gather(-1, token_ids[..., None])[..., 0],
        nsc=logprobs.mean(-1) + math.log(logits.shape[-1]),
        entropy=-(logprobs.exp() * logprobs).sum(-1),
        lse=torch.logsumexp(logits.to(compute_dtype(logits)) / temperature, -1),
    )
