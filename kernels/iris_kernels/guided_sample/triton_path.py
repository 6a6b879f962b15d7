"""`guided_sample` in Triton: one program per row, two passes over it.

Shapes: R rows, V columns, tiles of L lanes x K columns.
"""

import math

from torch import Tensor

from .._backend import jit, tl, triton
from .._checks import fold_rows
from .._inverse_cdf import kernel_weights
from .._row_stats import (
    row_offset,
    safe_max,
    shifted_exp,
    stats_from_sums,
    temperature_factors,
)
from .._scalars import load_scalar
from .outputs import empty_outputs


@jit
def _load_pair(cond, uncond, columns, V, GUIDED: tl.constexpr):
    """Raw cond and uncond logits, -inf beyond V; cond twice if there is no uncond."""
    c = tl.load(cond + columns, mask=columns < V, other=float("-inf"))
    if not GUIDED:
        return c, c
    return c, tl.load(uncond + columns, mask=columns < V, other=float("-inf"))


@jit
def _mix(c, u, cfg_weight, GUIDED: tl.constexpr):
    """u + cfg_weight (c - u), -inf if either is; each operation is rounded separately."""
    c = c.to(tl.float32)
    if not GUIDED:
        return c
    u = u.to(tl.float32)
    masked = (c == float("-inf")) | (u == float("-inf"))
    return tl.where(masked, float("-inf"), u + cfg_weight * (c - u))


@jit
def _accumulate(x, m_safe, in_row, scale, min_d, sum_exp_below, count_at_max, sum_exp_d, sum_d):
    """Add to the sums per lane: e below the maximum, number of columns at it, e d, and d."""
    d, clamped, e = shifted_exp(x, m_safe, scale, min_d)
    at_max = d == 0.0
    return (
        sum_exp_below + tl.sum(tl.where(at_max, 0.0, e), axis=1),
        count_at_max + tl.sum(at_max.to(tl.float32), axis=1),
        sum_exp_d + tl.sum(e * clamped, axis=1),
        sum_d + tl.sum(tl.where(in_row, d, 0.0), axis=1),
    )


@jit
def _store_stats(
    out, row, rows, x, m,  # [4, R], its row, R, the token's logit, the row's maximum
    sum_exp_below, count_at_max, sum_exp_d, sum_d,  # sums per lane, see `_accumulate`
    scale, inv_temperature, min_d, V, log_V,
):  # fmt: skip
    """Compute one distribution's statistics from its sums, and store them."""
    m_safe = safe_max(m)
    d_token, _, e_token = shifted_exp(x, m_safe, scale, min_d)
    # If the token is at the maximum, an integer is subtracted: sum_exp_others stays exact.
    is_max = d_token == 0.0
    sum_exp_others = tl.sum(count_at_max, axis=0) - tl.where(is_max, 1.0, 0.0)
    sum_exp_others += tl.sum(sum_exp_below, axis=0) - tl.where(is_max, 0.0, e_token)
    sum_exp_d, sum_d = tl.sum(sum_exp_d, axis=0), tl.sum(sum_d, axis=0)
    stats = stats_from_sums(
        d_token, e_token, m, m_safe, sum_exp_others, sum_exp_d, sum_d, inv_temperature, V, log_V
    )
    for i in tl.static_range(4):
        tl.store(out + i * rows + row, stats[i])


@jit
def _sample_kernel(
    # Logits [R, V_held], uncond may be None; uniform [R]; the smallest logit kept [R] or None
    cond, uncond, uniform, threshold,
    token_ids, conditional, guided,  # outputs [R], [4, R], [4, R]
    # Layouts of the rows of cond and uncond, see `fold_rows`
    cond_inner, cond_stride_outer, cond_stride_inner,
    uncond_inner, uncond_stride_outer, uncond_stride_inner,
    rows, V, log_V,
    # Numbers, or pointers if W_IN_MEMORY, T_IN_MEMORY; columns per lane
    cfg_weight, temperature, Q,
    W_IN_MEMORY: tl.constexpr, T_IN_MEMORY: tl.constexpr, GREEDY: tl.constexpr,
    # Lanes, columns per load, Q rounded up to a power of two
    L: tl.constexpr, K: tl.constexpr, Q_POW2: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    GUIDED: tl.constexpr = uncond is not None
    cond += row_offset(row, cond_inner, cond_stride_outer, cond_stride_inner)
    if GUIDED:
        uncond += row_offset(row, uncond_inner, uncond_stride_outer, uncond_stride_inner)
    cfg_weight = load_scalar(cfg_weight, W_IN_MEMORY)
    scale, inv_temperature, min_d = temperature_factors(load_scalar(temperature, T_IN_MEMORY))
    unit_scale, _, unit_min_d = temperature_factors(load_scalar(1.0, False))
    lanes = tl.arange(0, L)
    tile = lanes[:, None] * Q + tl.arange(0, K)[None, :]  # lane l owns columns [l Q, (l + 1) Q)

    m_c = tl.full([L], float("-inf"), tl.float32)
    m_g = tl.full([L], float("-inf"), tl.float32)
    for step in range(0, Q, K):
        c, u = _load_pair(cond, uncond, tile + step, V, GUIDED)
        m_c = tl.maximum(m_c, tl.max(c.to(tl.float32), axis=1))
        m_g = tl.maximum(m_g, tl.max(_mix(c, u, cfg_weight, GUIDED), axis=1))
    m_c, m_g = tl.max(m_c, axis=0), tl.max(m_g, axis=0)
    m_safe_c, m_safe_g = safe_max(m_c), safe_max(m_g)

    min_kept = float("-inf") if threshold is None else tl.load(threshold + row)
    weight = tl.zeros([L], tl.int64)
    zero = tl.zeros([L], tl.float32)
    below_c, at_max_c, exp_d_c, d_c = zero, zero, zero, zero
    below_g, at_max_g, exp_d_g, d_g = zero, zero, zero, zero
    for step in range(0, Q, K):
        c, u = _load_pair(cond, uncond, tile + step, V, GUIDED)
        mixed = _mix(c, u, cfg_weight, GUIDED)
        weight += tl.sum(kernel_weights(mixed, m_g, min_kept, scale, GREEDY), axis=1)
        in_row = tile + step < V
        below_c, at_max_c, exp_d_c, d_c = _accumulate(
            c.to(tl.float32), m_safe_c, in_row, unit_scale, unit_min_d,
            below_c, at_max_c, exp_d_c, d_c,
        )  # fmt: skip
        below_g, at_max_g, exp_d_g, d_g = _accumulate(
            mixed, m_safe_g, in_row, scale, min_d, below_g, at_max_g, exp_d_g, d_g
        )

    # The token is the first column whose cumulative weight exceeds `position`. First its lane, then
    # its column in the lane: the index of each is the number of cumulative weights <= `position`.
    total = tl.sum(weight, axis=0)
    if GREEDY:
        position = total * 0
    else:
        position = (tl.load(uniform + row).to(tl.float64) * total.to(tl.float64)).to(tl.int64)
        position = tl.minimum(position, total - 1)
    is_before = tl.cumsum(weight, axis=0) <= position
    lane = tl.sum(is_before.to(tl.int32), axis=0)
    position -= tl.sum(tl.where(is_before, weight, 0), axis=0)
    in_lane = tl.arange(0, Q_POW2)
    columns = lane * Q + in_lane
    end = tl.where(in_lane < Q, V, 0)
    c, u = _load_pair(cond, uncond, columns, end, GUIDED)
    weights = kernel_weights(_mix(c, u, cfg_weight, GUIDED), m_g, min_kept, scale, GREEDY)
    is_before = (tl.cumsum(weights, axis=0) <= position) & (in_lane < Q)
    token = tl.where(total == 0, 0, lane * Q + tl.sum(is_before.to(tl.int32), axis=0))
    tl.store(token_ids + row, token.to(tl.int64))

    c, u = _load_pair(cond, uncond, token, V, GUIDED)
    mixed = _mix(c, u, cfg_weight, GUIDED)
    _store_stats(
        conditional, row, rows, c.to(tl.float32), m_c, below_c, at_max_c, exp_d_c, d_c,
        unit_scale, 1.0, unit_min_d, V, log_V,
    )  # fmt: skip
    _store_stats(
        guided, row, rows, mixed, m_g, below_g, at_max_g, exp_d_g, d_g,
        scale, inv_temperature, min_d, V, log_V,
    )  # fmt: skip


# --- Launcher -------------------------------------------------------------------------------------


def sample_launch(vocab_size: int, itemsize: int) -> dict[str, int | bool]:
    """Up to 512 lanes of Q contiguous columns; one thread per lane, which loads 16 bytes."""
    lanes = min(max(triton.next_power_of_2(vocab_size) // 32, 32), 512)
    columns = triton.cdiv(triton.cdiv(vocab_size, lanes), 16) * 16  # keeps lanes 16-byte aligned
    return {
        "L": lanes,
        "K": 16 // itemsize,
        "Q": columns,
        "Q_POW2": triton.next_power_of_2(columns),
        "num_warps": lanes // 32,
        "maxnreg": 128,  # for 512 threads; some ptxas would stop at 64, and spill
        "enable_fp_fusion": False,  # fused multiply-adds would round differently from torch
    }


def sample_triton(cond, uncond, uniform, threshold, cfg_weight, temperature, greedy, vocab_size):
    """One launch: token_ids [R], conditional [4, R], guided [4, R]."""
    cond, uncond = (t if t is None or fold_rows(t) else t.contiguous() for t in (cond, uncond))
    outer, inner, *strides = fold_rows(cond)
    rows = outer * inner
    _, *uncond_layout = (1, 1, 0, 0) if uncond is None else fold_rows(uncond)
    token_ids, conditional, guided = empty_outputs(cond, (rows,))
    _sample_kernel[(rows,)](
        cond, uncond, uniform, threshold, token_ids, conditional, guided,
        inner, *strides, *uncond_layout, rows, vocab_size, math.log(vocab_size),
        cfg_weight, temperature, W_IN_MEMORY=isinstance(cfg_weight, Tensor),
        T_IN_MEMORY=isinstance(temperature, Tensor), GREEDY=greedy,
        **sample_launch(vocab_size, cond.element_size()),
    )  # fmt: skip
    return token_ids, conditional, guided
