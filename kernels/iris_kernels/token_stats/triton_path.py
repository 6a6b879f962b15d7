"""`token_stats` in Triton: forward over whole rows or blocks of their columns, and backward.

Shapes: R rows, V columns of the block, `row_width` columns of the whole row, tiles of L lanes x K
columns.
"""

import math

from torch import Tensor

from .._backend import jit, tl, triton
from .._checks import fold_rows, row_parts
from .._row_stats import (
    as_float32,
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
        x = as_float32(tl.load(logits + columns, mask=columns < V, other=float("-inf")))
        if bias is not None:
            x += as_float32(tl.load(bias + columns, mask=columns < V, other=0.0))
    else:
        x = as_float32(tl.load(logits + columns))
        if bias is not None:
            x += as_float32(tl.load(bias + columns))
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
    logits, bias, start, columns, V,  # the tile: where it starts, its first columns [L, K]
    has_token,  # [L]: whether the token is among the lane's columns of this tile
    m, sum_exp_others, sum_exp_d, sum_d,  # the running sums [L]
    scale, min_d,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add a tile of four times [L, K] logits to the running sums of its L lanes.

    Per lane, with d = x - m and e = exp(d / T): m the maximum so far; sum_exp_others = sum e and
    sum_exp_d = sum e d, both without the lane's columns of this tile if the token is among them;
    sum_d = sum d. A lane is one thread, which thus has four 16-byte loads in flight, keeps one
    maximum for all of them, and exchanges nothing with others before the row ends. The four are
    variables, not a dimension: Triton would spread that over threads.
    """
    L: tl.constexpr = columns.shape[0]
    STEP: tl.constexpr = L * columns.shape[1]
    x0 = _load(logits, bias, columns, V, MASKED)
    x1 = _load(logits, bias, columns + STEP, V, MASKED)
    x2 = _load(logits, bias, columns + 2 * STEP, V, MASKED)
    x3 = _load(logits, bias, columns + 3 * STEP, V, MASKED)
    m_new = tl.max(tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3)), axis=1)
    m_new = tl.maximum(m, m_new)
    m_safe, shift = _update_max(m, m_new)
    d0, clamped0, e0 = shifted_exp(x0, m_safe[:, None], scale, min_d)
    d1, clamped1, e1 = shifted_exp(x1, m_safe[:, None], scale, min_d)
    d2, clamped2, e2 = shifted_exp(x2, m_safe[:, None], scale, min_d)
    d3, clamped3, e3 = shifted_exp(x3, m_safe[:, None], scale, min_d)
    if MASKED:
        d0 = tl.where(columns < V, d0, 0.0)
        d1 = tl.where(columns + STEP < V, d1, 0.0)
        d2 = tl.where(columns + 2 * STEP < V, d2, 0.0)
        d3 = tl.where(columns + 3 * STEP < V, d3, 0.0)
    sum_exp_others, sum_exp_d = _rescale(sum_exp_others, sum_exp_d, shift, scale, min_d)
    # Every tile before this one was full, so a lane's number of columns is start / L.
    sum_d += shift * (start // L) + tl.sum(d0 + d1 + d2 + d3, axis=1)
    # Leaving out the token's lane, not its element, costs nothing per element.
    e_clamped = e0 * clamped0 + e1 * clamped1 + e2 * clamped2 + e3 * clamped3
    sum_exp_others += tl.where(has_token, 0.0, tl.sum(e0 + e1 + e2 + e3, axis=1))
    sum_exp_d += tl.where(has_token, 0.0, tl.sum(e_clamped, axis=1))
    return m_new, sum_exp_others, sum_exp_d, sum_d


@jit
def _lane_columns(count, L: tl.constexpr, K: tl.constexpr):
    """How many of the first `count` columns of a tile belong to each lane [L]."""
    rest = count - tl.arange(0, L) * K
    columns = tl.minimum(tl.maximum(rest, 0), K)
    for i in tl.static_range(1, 4):
        columns += tl.minimum(tl.maximum(rest - i * L * K, 0), K)
    return columns


@jit
def _sum_columns(
    logits, bias, token, V, scale, min_d,
    PARTIAL: tl.constexpr, L: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Of a row's V columns: sum_exp_others, sum_exp_d, sum_d, maximum, the token's logit.

    The first two leave the token out; its logit is NaN if it is not among the columns. PARTIAL:
    whether the last tile is partial.
    """
    TILE: tl.constexpr = 4 * L * K
    has_token = (token >= 0) & (token < V)
    token_column = tl.where(has_token, token, 0)
    token_tile = tl.where(has_token, token // TILE * TILE, -1)
    token_lane = token_column % (L * K) // K
    lanes = tl.arange(0, L)
    columns = lanes[:, None] * K + tl.arange(0, K)[None, :]
    m = tl.full([L], float("-inf"), tl.float32)
    sum_exp_others = tl.zeros([L], tl.float32)
    sum_exp_d = tl.zeros([L], tl.float32)
    sum_d = tl.zeros([L], tl.float32)
    full_tiles = V // TILE * TILE
    for start in range(0, full_tiles, TILE):
        m, sum_exp_others, sum_exp_d, sum_d = _accumulate(
            logits, bias, start, start + columns, V, (lanes == token_lane) & (start == token_tile),
            m, sum_exp_others, sum_exp_d, sum_d, scale, min_d, False,
        )  # fmt: skip
    count = full_tiles // L
    if PARTIAL:
        m, sum_exp_others, sum_exp_d, sum_d = _accumulate(
            logits, bias, full_tiles, full_tiles + columns, V,
            (lanes == token_lane) & (full_tiles == token_tile),
            m, sum_exp_others, sum_exp_d, sum_d, scale, min_d, True,
        )  # fmt: skip
        count += _lane_columns(V - full_tiles, L, K)
    row_max = tl.max(m, axis=0)
    m_safe, shift = _update_max(m, row_max)
    sum_exp_others, sum_exp_d = _rescale(sum_exp_others, sum_exp_d, shift, scale, min_d)
    # The columns that the sums left out, one per lane, but not the token's.
    columns = tl.maximum(token_tile, 0) + token_lane * K + lanes // K * (L * K) + lanes % K
    is_other = has_token & (lanes < 4 * K) & (columns != token_column)
    _, clamped, e = shifted_exp(_load(logits, bias, columns, V, True), m_safe, scale, min_d)
    e = tl.where(is_other, e, 0.0)
    sum_exp_others = tl.sum(sum_exp_others + e, axis=0)
    sum_exp_d = tl.sum(sum_exp_d + e * clamped, axis=0)
    sum_d = tl.sum(sum_d + shift * count, axis=0)
    x_token = _load(logits, bias, token_column, V, True)
    x_token = tl.where(has_token, x_token, float("nan"))
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
    # Constants: FIRST and LAST block of columns, a PARTIAL last tile, tiles of four times L x K
    T_IN_MEMORY: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    PARTIAL: tl.constexpr, L: tl.constexpr, K: tl.constexpr,
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
        logits, bias, token - first_column, V, scale, min_d, PARTIAL, L, K
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
    # Constants: PADDED if columns_held > V, blocks of G x K columns
    T_IN_MEMORY: tl.constexpr, PADDED: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    groups = tl.program_id(1) * G + tl.arange(0, G)
    columns = groups[:, None] * K + tl.arange(0, K)[None, :]
    grad += row_offset(row, grad_inner, grad_stride_outer, grad_stride_inner)
    token = tl.load(token_ids + row).to(tl.int32)
    kept = token != -100
    if mask is not None:
        kept = kept & tl.load(mask + row)
    if not kept:
        tl.store(grad + columns, tl.zeros([G, K], grad.dtype.element_ty), columns < columns_held)
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
    coef_all /= row_width
    # The comparison is split, so that one per group of K columns is enough.
    token -= first_column
    at_token = tl.where(groups == token // K, coef_all + coef_token, coef_all)[:, None]
    constant = tl.where(tl.arange(0, K)[None, :] == token % K, at_token, coef_all)
    g = e * (coef_e - coef_ed * clamped) + constant
    if PADDED:
        g = tl.where(columns < V, g, 0.0)
    tl.store(grad + columns, g.to(grad.dtype.element_ty), mask=columns < columns_held)


# --- Launchers ------------------------------------------------------------------------------------


def forward_launch(columns: int, itemsize: int) -> dict[str, int | bool]:
    """One thread per lane, 16 bytes per load; warps enough that a row is not a chain of loads.

    Fewer warps repeat less of what every warp does once per row: two issue a third fewer
    instructions than eight at 16384 columns.
    """
    per_lane = 16 // itemsize
    warps = 1 if columns <= 4096 else 2 if columns <= 32768 else 4
    return {
        "PARTIAL": columns % (4 * 32 * warps * per_lane) != 0,
        "L": 32 * warps,
        "K": per_lane,
        "num_warps": warps,
        "enable_fp_fusion": True,
    }


def backward_launch(columns_held: int, columns: int, itemsize: int) -> dict[str, int | bool]:
    """32 elements per thread, over which it shares what every thread computes once.

    Nothing is reduced: a row is as many programs as it has blocks.
    """
    per_lane = 16 // itemsize
    block = min(max(triton.next_power_of_2(columns_held), 64), 4096)
    return {
        "PADDED": columns_held > columns,
        "G": block // per_lane,
        "K": per_lane,
        "num_warps": max(1, block // 1024),
        "enable_fp_fusion": True,
    }


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
        itemsize = min(part.element_size(), grad_part.element_size())
        launch = backward_launch(columns_held, columns.count, itemsize)
        blocks = triton.cdiv(columns_held, launch["G"] * launch["K"])
        _backward_kernel[(outer * inner, blocks)](
            part, columns.bias, grad_part, token_ids[rows], None if mask is None else mask[rows],
            *(t[rows] for t in saved), *(None if g is None else g[rows] for g in upstream),
            inner, *strides, grad_inner, *grad_strides,
            columns_held, columns.first, columns.count, columns.row_width, temperature,
            T_IN_MEMORY=isinstance(temperature, Tensor), **launch,
        )  # fmt: skip
