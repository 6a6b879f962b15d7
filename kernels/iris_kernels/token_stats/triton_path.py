"""`token_stats` in Triton: forward over whole rows or blocks of their columns, and backward.

Shapes: R rows, V columns of the block, `row_width` columns of the whole row, tiles of L lanes x K
columns.
"""

import math

from torch import Tensor

from .._backend import jit, tl, triton
from .._checks import fold_rows, row_parts
from .._row_stats import (
    log_one_plus,
    row_offset,
    safe_max,
    shifted_exp,
    stats_from_sums,
    temperature_factors,
)
from .._scalars import load_scalar
from .columns import Columns


@jit
def _load(logits, bias, columns, V, MASKED: tl.constexpr):
    """Logits plus their bias, if there is one, in fp32; -inf beyond V."""
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
def _update_max(m, m_new):
    """The safe maximum after `m` became `m_new`, and by how much (<= 0) every d changes."""
    m_safe = safe_max(m_new)
    return m_safe, tl.where(m == float("-inf"), 0.0, m - m_safe)


@jit
def _rescale(sum_exp, sum_exp_d, shift, scale, min_d):
    """sum e and sum e d after every d changed by `shift` (<= 0)."""
    shift = tl.maximum(shift, min_d)
    factor = tl.exp2(shift * scale)
    return sum_exp * factor, (sum_exp_d + shift * sum_exp) * factor


@jit
def _accumulate(
    logits, bias, start, offsets, token_group, V,  # the tile
    m, sum_exp_others, sum_exp_d, sum_d, count,  # the running sums [L]
    scale, min_d,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Add the tile of logits [L, K] at `start` to the running sums of its L lanes.

    Per lane, with d = x - m and e = exp(d / T): m the maximum so far; sum_exp_others = sum e and
    sum_exp_d = sum e d, both without the token's group of K columns; sum_d = sum d; count = columns
    so far. A lane's group is the 16-byte load of one thread, so that threads exchange nothing
    before the row ends.
    """
    K: tl.constexpr = offsets.shape[1]
    columns = start + offsets
    x = _load(logits, bias, columns, V, TAIL)
    m_new = tl.maximum(m, tl.max(x, axis=1))
    m_safe, shift = _update_max(m, m_new)
    d, clamped, e = shifted_exp(x, m_safe[:, None], scale, min_d)
    sum_exp_others, sum_exp_d = _rescale(sum_exp_others, sum_exp_d, shift, scale, min_d)
    sum_d += shift * count
    if TAIL:
        d = tl.where(columns < V, d, 0.0)
        count += tl.sum((columns < V).to(tl.float32), axis=1)
    else:
        count += K
    # Leaving out the token's group, not its element, costs one comparison for K elements.
    is_other = start // K + tl.arange(0, offsets.shape[0]) != token_group
    sum_exp_others += tl.where(is_other, tl.sum(e, axis=1), 0.0)
    sum_exp_d += tl.where(is_other, tl.sum(e * clamped, axis=1), 0.0)
    return m_new, sum_exp_others, sum_exp_d, sum_d + tl.sum(d, axis=1), count


@jit
def _sum_columns(
    logits, bias, token, V, scale, min_d, L: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """Of a row's V columns: sum_exp_others, sum_exp_d, sum_d, maximum, the token's logit.

    The first two leave the token out; its logit is NaN if it is not among the columns.
    """
    has_token = (token >= 0) & (token < V)
    token_column = tl.where(has_token, token, 0)
    token_group = tl.where(has_token, token // K, -1)
    offsets = tl.arange(0, L)[:, None] * K + tl.arange(0, K)[None, :]
    m = tl.full([L], float("-inf"), tl.float32)
    sum_exp_others = tl.zeros([L], tl.float32)
    sum_exp_d = tl.zeros([L], tl.float32)
    sum_d = tl.zeros([L], tl.float32)
    count = tl.zeros([L], tl.float32)
    full_tiles = V // (L * K) * (L * K)
    for start in range(0, full_tiles, L * K):
        m, sum_exp_others, sum_exp_d, sum_d, count = _accumulate(
            logits, bias, start, offsets, token_group, V,
            m, sum_exp_others, sum_exp_d, sum_d, count, scale, min_d, False,
        )  # fmt: skip
    if full_tiles < V:
        m, sum_exp_others, sum_exp_d, sum_d, count = _accumulate(
            logits, bias, full_tiles, offsets, token_group, V,
            m, sum_exp_others, sum_exp_d, sum_d, count, scale, min_d, True,
        )  # fmt: skip
    row_max = tl.max(m, axis=0)
    m_safe, shift = _update_max(m, row_max)
    sum_exp_others, sum_exp_d = _rescale(sum_exp_others, sum_exp_d, shift, scale, min_d)
    sum_exp_others, sum_exp_d = tl.sum(sum_exp_others, axis=0), tl.sum(sum_exp_d, axis=0)
    sum_d = tl.sum(sum_d + shift * count, axis=0)

    # The token's group, which the sums left out: its other columns, and the token's logit.
    columns = token_column // K * K + tl.arange(0, K)
    x = _load(logits, bias, columns, V, True)
    _, clamped, e = shifted_exp(x, m_safe, scale, min_d)
    e = tl.where(columns == token_column, 0.0, tl.where(has_token, e, 0.0))
    x_token = tl.sum(tl.where(columns == token_column, x, 0.0), axis=0)
    x_token = tl.where(has_token, x_token, float("nan"))
    sum_exp_others += tl.sum(e, axis=0)
    sum_exp_d += tl.sum(e * clamped, axis=0)
    return sum_exp_others, sum_exp_d, sum_d, row_max, x_token


@jit
def _forward_kernel(
    # Inputs: logits [R, V_held], bias [V], token_ids [R], mask [R]; bias and mask may be None
    logits, bias, token_ids, mask,
    # Sums of the columns so far [5, R], or None; read unless FIRST, written unless LAST
    state,
    # Outputs [R], written if LAST
    logprob, nsc, entropy, lse, row_max, sum_exp,
    # Layout of the rows of logits, see `fold_rows`
    inner, stride_outer, stride_inner,
    # Sizes: R, the first column's number, V, row_width and its logarithm
    rows, first_column, V, row_width, log_row_width,
    # Number, or pointer if T_IN_MEMORY
    temperature,
    # Constants: FIRST and LAST block of columns, tile of L x K
    T_IN_MEMORY: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    L: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    token = tl.load(token_ids + row).to(tl.int32)
    kept = token != -100
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
    T = load_scalar(temperature, T_IN_MEMORY)
    scale, inv_temperature, min_d = temperature_factors(T)
    sum_exp_others, sum_exp_d, sum_d, m, x_token = _sum_columns(
        logits, bias, token - first_column, V, scale, min_d, L, K
    )
    if not FIRST:  # merge with the sums of the columns before
        sum_exp_others_0 = tl.load(state + row)
        sum_exp_d_0 = tl.load(state + rows + row) * T
        sum_d_0 = tl.load(state + 2 * rows + row) * T
        m_0 = tl.load(state + 3 * rows + row)
        x_token_0 = tl.load(state + 4 * rows + row)
        m_both = tl.maximum(m, m_0)
        _, shift = _update_max(m, m_both)
        _, shift_0 = _update_max(m_0, m_both)
        sum_exp_others, sum_exp_d = _rescale(sum_exp_others, sum_exp_d, shift, scale, min_d)
        sum_exp_others_0, sum_exp_d_0 = _rescale(
            sum_exp_others_0, sum_exp_d_0, shift_0, scale, min_d
        )
        sum_exp_others += sum_exp_others_0
        sum_exp_d += sum_exp_d_0
        m = m_both
        sum_d += shift * V + sum_d_0 + shift_0 * first_column
        x_token = tl.where(x_token != x_token, x_token_0, x_token)
    if LAST:
        m_safe = safe_max(m)
        d_token, clamped, e_token = shifted_exp(x_token, m_safe, scale, min_d)
        sum_exp_d += e_token * clamped
        out = stats_from_sums(
            d_token, e_token, m, m_safe, sum_exp_others, sum_exp_d, sum_d,
            inv_temperature, row_width, log_row_width,
        )  # fmt: skip
        tl.store(logprob + row, out[0])
        tl.store(nsc + row, out[1])
        tl.store(entropy + row, out[2])
        tl.store(lse + row, out[3])
        tl.store(row_max + row, m)
        tl.store(sum_exp + row, out[4])
    else:
        tl.store(state + row, sum_exp_others)
        tl.store(state + rows + row, sum_exp_d * inv_temperature)
        tl.store(state + 2 * rows + row, sum_d * inv_temperature)
        tl.store(state + 3 * rows + row, m)
        tl.store(state + 4 * rows + row, x_token)


@jit
def _upstream(grad, row, factor):
    """An upstream gradient times `factor`, 0 if autograd sent none."""
    return 0.0 if grad is None else tl.load(grad + row) * factor


@jit
def _backward_kernel(
    # Inputs: logits [R, V_held], bias [V] or None
    logits, bias,
    # Output [R, V_held]; may be the logits
    grad,
    # Inputs [R]; mask may be None
    token_ids, mask,
    # Saved by forward [R]
    row_max, sum_exp, entropy,
    # Upstream gradients [R], each may be None
    grad_logprob, grad_nsc, grad_entropy, grad_lse,
    # Layouts of the rows of logits and of grad, see `fold_rows`
    inner, stride_outer, stride_inner, grad_inner, grad_stride_outer, grad_stride_inner,
    # Sizes: V_held, the first column's number, V, row_width
    columns_held, first_column, V, row_width,
    # Number, or pointer if T_IN_MEMORY
    temperature,
    # Constants
    T_IN_MEMORY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    grad += row_offset(row, grad_inner, grad_stride_outer, grad_stride_inner)
    token = tl.load(token_ids + row).to(tl.int32)
    kept = token != -100
    if mask is not None:
        kept = kept & tl.load(mask + row)
    if not kept:
        tl.store(grad + columns, tl.zeros([BLOCK], grad.dtype.element_ty), columns < columns_held)
        return
    logits += row_offset(row, inner, stride_outer, stride_inner)
    x = _load(logits, bias, columns, V, True)
    scale, inv_temperature, min_d = temperature_factors(load_scalar(temperature, T_IN_MEMORY))
    s = tl.load(sum_exp + row)
    # gradient_j = e_j (coef_e - coef_ed d_j) + coef_all / row_width + 1[j = a] coef_token
    coef_token = _upstream(grad_logprob, row, inv_temperature)
    coef_all = _upstream(grad_nsc, row, inv_temperature)
    coef_e = _upstream(grad_lse, row, inv_temperature) - coef_token - coef_all
    coef_entropy = _upstream(grad_entropy, row, inv_temperature)
    coef_e = (coef_e + coef_entropy * (log_one_plus(s - 1.0) - tl.load(entropy + row))) / s
    coef_ed = coef_entropy * inv_temperature / s
    m = tl.load(row_max + row)
    _, clamped, e = shifted_exp(x, safe_max(m), scale, min_d)
    g = e * (coef_e - coef_ed * clamped) + coef_all / row_width
    g += tl.where(columns == token - first_column, coef_token, 0.0)
    g = tl.where(columns < V, g, 0.0)
    tl.store(grad + columns, g.to(grad.dtype.element_ty), mask=columns < columns_held)


# --- Launchers ------------------------------------------------------------------------------------


def forward_launch(vocab_size: int, itemsize: int) -> dict[str, int | bool]:
    """Lanes of 16 bytes, four per thread once the vocabulary is large enough; 8 warps."""
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
            columns.first, columns.count, columns.row_width, math.log(columns.row_width),
            temperature, T_IN_MEMORY=isinstance(temperature, Tensor),
            FIRST=columns.is_first, LAST=columns.is_last,
            **forward_launch(columns.count, logits.element_size()),
        )  # fmt: skip


def backward_triton(logits, grad, token_ids, mask, saved, upstream, temperature, columns: Columns):
    """Fill `grad`: `logits` itself, or contiguous. `saved` and `upstream` are flat [R]."""
    for rows, part in row_parts(logits, levels=2):
        grad_part = part if grad is logits else grad.view(-1, grad.shape[-1])[rows]
        outer, inner, *strides = fold_rows(part)
        _, grad_inner, *grad_strides = fold_rows(grad_part)
        columns_held = part.shape[-1]
        launch = backward_launch(columns_held)
        _backward_kernel[(outer * inner, triton.cdiv(columns_held, launch["BLOCK"]))](
            part, columns.bias, grad_part, token_ids[rows], None if mask is None else mask[rows],
            *(t[rows] for t in saved), *(None if g is None else g[rows] for g in upstream),
            inner, *strides, grad_inner, *grad_strides,
            columns_held, columns.first, columns.count, columns.row_width, temperature,
            T_IN_MEMORY=isinstance(temperature, Tensor), **launch,
        )  # fmt: skip
