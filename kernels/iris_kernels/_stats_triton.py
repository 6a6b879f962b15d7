"""`token_stats` in Triton: forward over whole rows or blocks of their columns, and backward.

Shapes: R rows, V columns at hand, `total` columns of the whole row, tiles of L lanes x K columns.
"""

import math

from torch import Tensor

from ._backend import jit, tl, triton
from ._checks import fold_rows, row_parts
from ._row_math import (
    Columns,
    finish,
    log_one_plus,
    move_reference,
    rescale,
    row_offset,
    scalar,
    scalars,
    terms,
)


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
