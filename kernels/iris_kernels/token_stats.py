"""Log-probability, negative self-certainty, entropy and logsumexp of one token a row, fused.

With x = logits / temperature over V classes, p = softmax(x) and a the row's token:

    lse     = logsumexp(x)
    logprob = x_a - lse                                 d/dx_j = 1[j = a] - p_j
    nsc     = mean(x) - lse + log V = -KL(uniform || p)  d/dx_j = 1/V - p_j
    entropy = lse - sum_j p_j x_j                        d/dx_j = -p_j (log p_j + entropy)
                                                         d lse/dx_j = p_j

Bytes moved for R rows of b-byte logits: forward R V b (one read), backward 2 R V b (one read, one
write); saved for backward beside the logits: five fp32 numbers a row.

The arithmetic, and how it keeps its precision, is told in `_row_math`.

Shapes: R rows, V columns (classes that exist), chunk C rows.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._backend import jit, prefer_huge_pages, tl, triton, use_triton
from ._checks import (
    check_ids_in_range,
    check_logits,
    check_temperature,
    check_token_ids,
    check_vocab_size,
    fold_rows,
    last_dim_contiguous,
    row_parts,
)
from ._ops import add_op_namespace_prefix
from ._row_math import (
    FLOOR,
    Buffers,
    RowSums,
    any_row,
    chunk_sums,
    compute_dtype,
    distances,
    finish,
    finish_rows,
    kept_rows,
    log_one_plus,
    merge,
    move_reference,
    number,
    rescale,
    row_offset,
    run_time,
    scalar,
    scalars,
    terms,
)


class TokenStats(NamedTuple):
    """Per-row statistics, each float32 and shaped like `token_ids`."""

    logprob: Tensor
    nsc: Tensor
    entropy: Tensor
    lse: Tensor


# --- Triton kernels -------------------------------------------------------------------------------


@jit
def _load(logits, bias, columns, V, MASKED: tl.constexpr):
    """Logits, with a bias a column where there is one, in fp32; -inf beyond V."""
    if MASKED:
        x = tl.load(logits + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
        if bias is not None:
            x += tl.load(bias + columns, mask=columns < V, other=0.0).to(tl.float32)
    else:
        x = tl.load(logits + columns).to(tl.float32)
        if bias is not None:
            x += tl.load(bias + columns).to(tl.float32)
    return x


@jit
def _accumulate(
    logits, bias, start, offsets, group, V, m, s, sd, d_sum, seen, scale, floor, TAIL: tl.constexpr
):
    """Take the tile of logits [L, K] at `start` into the running sums of its L lanes.

    Per lane, with d = x - m and e = exp(d / T): m the maximum so far, s = sum e and sd = sum e d
    without the target's `group` of K columns, d_sum = sum d, seen = how many columns. A lane's
    group is one thread's 16-byte load, so that nothing crosses threads before the row ends.
    """
    K: tl.constexpr = offsets.shape[1]
    columns = start + offsets
    x = _load(logits, bias, columns, V, TAIL)
    m_new = tl.maximum(m, tl.max(x, axis=1))
    reference, shift = move_reference(m, m_new)
    d, bounded, e = terms(x, reference[:, None], scale, floor)
    s, sd = rescale(s, sd, shift, scale, floor)
    d_sum += shift * seen
    if TAIL:
        d = tl.where(columns < V, d, 0.0)
        seen += tl.sum((columns < V).to(tl.float32), axis=1)
    else:
        seen += K
    # Leaving out the group, not the element, costs one comparison for K elements.
    others = start // K + tl.arange(0, offsets.shape[0]) != group
    s += tl.where(others, tl.sum(e, axis=1), 0.0)
    sd += tl.where(others, tl.sum(e * bounded, axis=1), 0.0)
    return m_new, s, sd, d_sum + tl.sum(d, axis=1), seen


@jit
def _sum_columns(
    logits, bias, target, V, scale, floor, L: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """A row's V columns: others, sum e d, sum d, maximum, the target's logit (NaN if not there).

    The first two leave the target out.
    """
    here = (target >= 0) & (target < V)
    column = tl.where(here, target, 0)
    group = tl.where(here, target // K, -1)
    offsets = tl.arange(0, L)[:, None] * K + tl.arange(0, K)[None, :]
    m = tl.full([L], float("-inf"), tl.float32)
    s = tl.zeros([L], tl.float32)
    sd = tl.zeros([L], tl.float32)
    d_sum = tl.zeros([L], tl.float32)
    seen = tl.zeros([L], tl.float32)
    whole = V // (L * K) * (L * K)
    for start in range(0, whole, L * K):
        m, s, sd, d_sum, seen = _accumulate(
            logits, bias, start, offsets, group, V, m, s, sd, d_sum, seen, scale, floor, False
        )
    if whole < V:
        m, s, sd, d_sum, seen = _accumulate(
            logits, bias, whole, offsets, group, V, m, s, sd, d_sum, seen, scale, floor, True
        )
    row_m = tl.max(m, axis=0)
    reference, shift = move_reference(m, row_m)
    s, sd = rescale(s, sd, shift, scale, floor)
    others, sd = tl.sum(s, axis=0), tl.sum(sd, axis=0)
    d_sum = tl.sum(d_sum + shift * seen, axis=0)

    # The target's group, which the sums left out: the others in it, and the target's logit.
    columns = column // K * K + tl.arange(0, K)
    x = _load(logits, bias, columns, V, True)
    _, bounded, e = terms(x, reference, scale, floor)
    e = tl.where(columns == column, 0.0, tl.where(here, e, 0.0))
    x_target = tl.where(here, tl.sum(tl.where(columns == column, x, 0.0), axis=0), float("nan"))
    return others + tl.sum(e, axis=0), sd + tl.sum(e * bounded, axis=0), d_sum, row_m, x_target


@jit
def _forward_kernel(
    logits, bias, token_ids, mask, state, logprob, nsc, entropy, lse, row_max, sum_exp,
    inner, stride_outer, stride_inner, rows, first_column, V, total, log_total, temperature,
    T_IN_MEMORY: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    L: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    target = tl.load(token_ids + row).to(tl.int32)
    kept = target != -100
    if mask is not None:
        kept = kept & tl.load(mask + row)
    if not kept:
        if LAST:
            tl.store(logprob + row, 0.0)
            tl.store(nsc + row, 0.0)
            tl.store(entropy + row, 0.0)
            tl.store(lse + row, 0.0)
            tl.store(row_max + row, 0.0)
            tl.store(sum_exp + row, 0.0)
        else:
            for i in tl.static_range(5):
                tl.store(state + i * rows + row, 0.0)
        return
    logits += row_offset(row, inner, stride_outer, stride_inner)
    T = scalar(temperature, T_IN_MEMORY)
    scale, inv_temperature, floor = scalars(T)
    others, sd, d_sum, m, x_target = _sum_columns(
        logits, bias, target - first_column, V, scale, floor, L, K
    )
    if not FIRST:  # merge with what the columns before left
        others_0 = tl.load(state + row)
        sd_0 = tl.load(state + rows + row) * T
        d_sum_0 = tl.load(state + 2 * rows + row) * T
        m_0 = tl.load(state + 3 * rows + row)
        x_target_0 = tl.load(state + 4 * rows + row)
        m_both = tl.maximum(m, m_0)
        reference, shift = move_reference(m, m_both)
        _, shift_0 = move_reference(m_0, m_both)
        others, sd = rescale(others, sd, shift, scale, floor)
        others_0, sd_0 = rescale(others_0, sd_0, shift_0, scale, floor)
        others, sd, m = others + others_0, sd + sd_0, m_both
        d_sum += shift * V + d_sum_0 + shift_0 * first_column
        x_target = tl.where(x_target != x_target, x_target_0, x_target)
    if LAST:
        reference, _ = move_reference(m, m)
        d_target, bounded, e_target = terms(x_target, reference, scale, floor)
        sd += e_target * bounded
        out = finish(
            d_target, e_target, m, reference, others, sd, d_sum, inv_temperature, total, log_total
        )
        tl.store(logprob + row, out[0])
        tl.store(nsc + row, out[1])
        tl.store(entropy + row, out[2])
        tl.store(lse + row, out[3])
        tl.store(row_max + row, m)
        tl.store(sum_exp + row, out[4])
    else:
        tl.store(state + row, others)
        tl.store(state + rows + row, sd * inv_temperature)
        tl.store(state + 2 * rows + row, d_sum * inv_temperature)
        tl.store(state + 3 * rows + row, m)
        tl.store(state + 4 * rows + row, x_target)


@jit
def _scaled(grad, row, factor):
    """An upstream gradient times `factor`, 0 where autograd sent none."""
    return 0.0 if grad is None else tl.load(grad + row) * factor


@jit
def _backward_kernel(
    logits, bias, grad, token_ids, mask, row_max, sum_exp, entropy,
    grad_logprob, grad_nsc, grad_entropy, grad_lse,
    inner, stride_outer, stride_inner, grad_inner, grad_stride_outer, grad_stride_inner,
    columns_held, first_column, V, total, temperature,
    T_IN_MEMORY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    grad += row_offset(row, grad_inner, grad_stride_outer, grad_stride_inner)
    target = tl.load(token_ids + row).to(tl.int32)
    kept = target != -100
    if mask is not None:
        kept = kept & tl.load(mask + row)
    if not kept:
        tl.store(grad + columns, tl.zeros([BLOCK], grad.dtype.element_ty), columns < columns_held)
        return
    logits += row_offset(row, inner, stride_outer, stride_inner)
    x = _load(logits, bias, columns, V, True)
    scale, inv_temperature, floor = scalars(scalar(temperature, T_IN_MEMORY))
    s = tl.load(sum_exp + row)
    on_target = _scaled(grad_logprob, row, inv_temperature)
    on_all = _scaled(grad_nsc, row, inv_temperature)
    on_p = _scaled(grad_lse, row, inv_temperature) - on_target - on_all
    on_entropy = _scaled(grad_entropy, row, inv_temperature)
    on_p = (on_p + on_entropy * (log_one_plus(s - 1.0) - tl.load(entropy + row))) / s
    on_pd = on_entropy * inv_temperature / s
    m = tl.load(row_max + row)
    _, bounded, e = terms(x, tl.where(m == float("-inf"), 0.0, m), scale, floor)
    g = e * (on_p - on_pd * bounded) + on_all / total
    g += tl.where(columns == target - first_column, on_target, 0.0)
    g = tl.where(columns < V, g, 0.0)
    tl.store(grad + columns, g.to(grad.dtype.element_ty), mask=columns < columns_held)


# --- Launchers ------------------------------------------------------------------------------------


def forward_launch(vocab_size: int, itemsize: int) -> dict[str, int | bool]:
    """Lanes of 16 bytes, four to a thread once the vocabulary is large enough; 8 warps."""
    per_lane = 16 // itemsize
    lanes = min(max(triton.next_power_of_2(vocab_size) // per_lane, 32), 1024)
    return {
        "L": lanes,
        "K": per_lane,
        "num_warps": max(1, lanes // 128),
        "enable_fp_fusion": True,
    }


def backward_launch(columns: int) -> dict[str, int | bool]:
    """Smaller blocks than forward: nothing is reduced, so more programs hide more latency."""
    block = min(max(triton.next_power_of_2(columns), 64), 4096)
    return {"BLOCK": block, "num_warps": max(1, min(8, block // 512)), "enable_fp_fusion": True}


@dataclass(frozen=True)
class Columns:
    """Which columns of the whole rows the logits at hand are, and what to add to them."""

    count: int  # how many exist; those after them are padding
    first: int = 0
    total: int = 0  # of the whole row; 0: the same as `count`
    bias: Tensor | None = None  # [count]
    state: Tensor | None = None  # [5, R], RowSums of the columns so far; None: the row is whole
    is_first: bool = True  # nothing is in `state` yet
    is_last: bool = True  # the statistics follow; else `state` is brought up to date

    @property
    def whole(self) -> int:
        """The number of columns of the whole row."""
        return self.total or self.count


def forward_triton(logits, token_ids, mask, temperature, columns: Columns, outputs) -> None:
    """Fill the six flat `outputs` [R]; `token_ids` and `mask` are flat too."""
    for rows, part in row_parts(logits, levels=2):
        outer, inner, *strides = fold_rows(part)
        _forward_kernel[(outer * inner,)](
            part, columns.bias, token_ids[rows], None if mask is None else mask[rows],
            columns.state, *(out[rows] for out in outputs), inner, *strides, outer * inner,
            columns.first, columns.count, columns.whole, math.log(columns.whole), temperature,
            T_IN_MEMORY=isinstance(temperature, Tensor),
            FIRST=columns.is_first, LAST=columns.is_last,
            **forward_launch(columns.count, logits.element_size()),
        )  # fmt: skip


def backward_triton(logits, grad, token_ids, mask, saved, upstream, temperature, columns: Columns):
    """Fill `grad`: `logits` itself, or contiguous. `saved` and `upstream` are flat [R]."""
    for rows, part in row_parts(logits, levels=2):
        grad_part = part if grad is logits else grad.view(-1, grad.shape[-1])[rows]
        outer, inner, *strides = fold_rows(part)
        _, grad_inner, *grad_strides = fold_rows(grad_part)
        held = part.shape[-1]
        launch = backward_launch(held)
        _backward_kernel[(outer * inner, triton.cdiv(held, launch["BLOCK"]))](
            part, columns.bias, grad_part, token_ids[rows], None if mask is None else mask[rows],
            *(t[rows] for t in saved), *(None if g is None else g[rows] for g in upstream),
            inner, *strides, grad_inner, *grad_strides,
            held, columns.first, columns.count, columns.whole, temperature,
            T_IN_MEMORY=isinstance(temperature, Tensor), **launch,
        )  # fmt: skip


# --- The torch path -------------------------------------------------------------------------------


def forward_torch(logits, token_ids, mask, temperature, columns: Columns, outputs) -> None:
    """As `forward_triton`."""
    kept = kept_rows(token_ids, mask)
    ids = token_ids.long() - columns.first
    for rows, x, d, p in Buffers(logits, columns.count).chunks(logits):
        x = x[:, : columns.count] if columns.bias is None else x[:, : columns.count] + columns.bias
        sums = chunk_sums(x, ids[rows], temperature, d, p)
        if not columns.is_first:
            before = RowSums(*columns.state[:, rows])
            sums = merge(before, columns.first, sums, columns.count, temperature)
        results = finish_rows(sums, columns.whole, temperature) if columns.is_last else sums
        for out, value in zip(outputs if columns.is_last else columns.state, results, strict=True):
            out[rows] = value.masked_fill_(~kept[rows], 0.0)


def backward_torch(logits, grad, token_ids, mask, saved, upstream, temperature, columns: Columns):
    """As `backward_triton`."""
    row_max, sum_exp, entropy = saved
    V = columns.count
    kept = kept_rows(token_ids, mask)
    dead = row_max == -math.inf
    row_max = row_max.masked_fill(dead, 0.0)
    ids = token_ids.long() - columns.first
    here = (ids >= 0) & (ids < V)
    ids = ids.clamp_(0, V - 1)
    zero = torch.zeros_like(row_max)
    on_target, on_all, on_entropy, on_lse = (
        zero if g is None else torch.where(kept, g / temperature, 0.0) for g in upstream
    )
    # gradient_j = p_j (on_p - on_entropy d_j) + on_all + 1[j = a] on_target; log p_j = d_j - log s
    on_p = on_lse - on_target - on_all + on_entropy * (sum_exp.log() - entropy)
    on_all = on_all / columns.whole
    on_target = torch.where(here, on_target, 0.0)
    flat_grad = None if grad is logits else grad.view(-1, grad.shape[-1])
    for rows, part, d, p in Buffers(logits, V).chunks(logits):
        held = part if flat_grad is None else flat_grad[rows]
        out = held[:, :V]
        x = part[:, :V] if columns.bias is None else part[:, :V] + columns.bias
        distances(x, d, row_max[rows], temperature)
        torch.softmax(d, -1, out=p)
        empty = dead[rows]
        if columns.whole != V:  # softmax is over these columns alone
            best = d.amax(-1)
            p *= (best.exp() / p.amax(-1) / sum_exp[rows])[:, None]
            empty = best == -math.inf
        if any_row(empty):
            p.masked_fill_(empty[:, None], 0.0)
        factor = on_p[rows, None]
        if upstream[2] is not None:
            factor = d.clamp_(min=FLOOR).mul_(-on_entropy[rows, None]).add_(factor)
        g = out if out.dtype == p.dtype else p
        torch.mul(p, factor, out=g)
        if upstream[1] is not None:
            g += on_all[rows, None]
        at_target = g.gather(1, ids[rows, None]).add_(on_target[rows, None])
        g.scatter_(1, ids[rows, None], at_target)
        if any_row(~kept[rows]):
            g.masked_fill_(~kept[rows, None], 0.0)
        if g is not out:
            out.copy_(g)
        held[:, V:] = 0


# --- Custom ops and autograd ----------------------------------------------------------------------


@torch.library.custom_op(add_op_namespace_prefix("token_stats"), mutates_args=())
def _token_stats_op(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: Tensor, vocab_size: int,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    outputs = _empty_outputs(logits, token_ids)
    if token_ids.numel():
        run = forward_triton if use_triton(logits) else forward_torch
        if token_ids.is_cpu:
            check_ids_in_range(token_ids, kept_rows(token_ids, mask), vocab_size)
        run(
            logits, _flat(token_ids), _flat(mask), number(temperature), Columns(vocab_size),
            [_flat(out) for out in outputs],
        )  # fmt: skip
    return outputs


@_token_stats_op.register_fake
def _(logits, token_ids, *_):
    return _empty_outputs(logits, token_ids)


def _empty_outputs(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, ...]:
    return tuple(logits.new_empty(token_ids.shape, dtype=compute_dtype(logits)) for _ in range(6))


def _flat(per_row: Tensor | None) -> Tensor | None:
    return None if per_row is None else per_row.reshape(-1).contiguous()  # expanded ones too


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
        (grad_logprob, grad_nsc, grad_entropy, grad_lse), temperature, vocab_size,
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
        (grad_logprob, grad_nsc, grad_entropy, grad_lse), temperature, vocab_size,
    )  # fmt: skip


@_backward_inplace_op.register_fake
def _(*_):
    return None


def _run_backward(logits, grad, token_ids, mask, saved, upstream, temperature, vocab_size) -> None:
    if token_ids.numel():
        run = backward_triton if use_triton(logits) else backward_torch
        run(
            logits, grad, _flat(token_ids), _flat(mask), [_flat(t) for t in saved],
            [_flat(g) for g in upstream], number(temperature), Columns(vocab_size),
        )  # fmt: skip


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
        logits = logits.detach()  # shares memory and version, so other readers are found out
        _backward_inplace_op(logits, *arguments)
        return logits, None, None, None, None, None
    return _backward_op(logits, *arguments), None, None, None, None, None


_token_stats_op.register_autograd(_backward, setup_context=_setup_context)


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
    All four carry gradients to `logits`, alone or together. The gradient is computed from the
    logits again; what is kept for it are five numbers a row. See `token_stats_reference` for the
    same in plain torch.

    Args:
        logits: (..., V_held) float32, bfloat16 or float16, computed in float32 (float64 is taken
            by the torch path and computed in float64). Any strides; if those of the last dimension
            are not 1, a contiguous copy is made.
        token_ids: (...) int64 or int32 in [0, vocab_size); -100 where a row has no token.
        temperature: a positive number; a run-time value, so a new one compiles nothing. Also a
            tensor without dimensions, which a captured graph reads again in every replay; it gets
            no gradient.
        mask: (...) bool; rows that are False, like rows of -100, give 0 and get gradient 0, and
            their logits are not used.
        vocab_size: columns from here on do not exist; their gradient is 0. None: all exist.
        inplace_backward: write the gradient over the logits, which saves R * V elements. Autograd
            refuses the backward of any other operation that had kept those logits.

    Returns:
        TokenStats(logprob, nsc, entropy, lse), each float32 (...).
        A logit of -inf is a class that is ruled out: nsc is -inf (the uniform distribution has
        mass there) while the others stay as they are without it; the gradient of nsc remains
        (1/V - p_j) / temperature. A row of nothing but -inf has logprob, nsc and lse -inf,
        entropy 0. NaN stays NaN.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range. A token id out of range
            is found on the CPU; on a GPU looking would cost a sync, so nothing is read out of
            bounds and that row's statistics and gradients are NaN.
    """
    check_logits("logits", logits)
    check_token_ids(token_ids, mask, logits)
    check_temperature(temperature, logits)
    vocab_size = check_vocab_size(vocab_size, logits.shape[-1])
    logits = last_dim_contiguous(logits)
    if inplace_backward:
        _check_overwritable(logits)
    temperature = run_time(temperature, logits)
    out = _token_stats_op(logits, token_ids, mask, temperature, vocab_size, inplace_backward)
    return TokenStats(*out[:4])


def _check_overwritable(logits: Tensor) -> None:
    if logits.is_leaf and logits.requires_grad:
        raise ValueError(
            "inplace_backward=True, but logits is a leaf: its values would be replaced by its "
            "gradient; pass the output of an operation or inplace_backward=False"
        )
    if any(s == 0 and n > 1 for n, s in zip(logits.shape, logits.stride(), strict=True)):
        raise ValueError(
            "inplace_backward=True, but rows of logits share memory (an expanded tensor): "
            "pass logits.contiguous() or inplace_backward=False"
        )


def token_stats_reference(
    logits: Tensor, token_ids: Tensor, *, temperature: float = 1.0
) -> TokenStats:
    """The same in plain torch: holds several (..., V) tensors, and knows no mask and no -inf."""
    logprobs = torch.log_softmax(logits.to(compute_dtype(logits)) / temperature, -1)
    return TokenStats(
        logprob=logprobs.gather(-1, token_ids[..., None])[..., 0],
        nsc=logprobs.mean(-1) + math.log(logits.shape[-1]),
        entropy=-(logprobs.exp() * logprobs).sum(-1),
        lse=torch.logsumexp(logits.to(compute_dtype(logits)) / temperature, -1),
    )
