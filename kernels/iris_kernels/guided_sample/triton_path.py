"""`guided_sample` in Triton: one program per row, two passes over it.

A warp's loads are contiguous: the sums of integer weights do not depend on their order, and only
the search for the token goes by columns. A row of one tile is loaded once and stays in registers.

Shapes: R rows, V columns, tiles of G groups x K columns, a group being 16 bytes.
"""

import math

import torch
from torch import Tensor

from .._backend import jit, tl, triton
from .._checks import fold_rows
from .._inverse_cdf import kernel_weights
from .._row_stats import (
    as_float32,
    row_offset,
    safe_max,
    shifted_exp,
    stats_from_sums,
    temperature_factors,
)
from .._scalars import load_scalar
from .outputs import Recording, empty_outputs


@jit
def _load_pair(cond, uncond, columns, V, GUIDED: tl.constexpr, MASKED: tl.constexpr):
    """Raw cond and uncond logits, -inf beyond V; cond twice if there is no uncond."""
    if MASKED:
        c = tl.load(cond + columns, mask=columns < V, other=float("-inf"))
    else:
        c = tl.load(cond + columns)
    if not GUIDED:
        u = c
    elif MASKED:
        u = tl.load(uncond + columns, mask=columns < V, other=float("-inf"))
    else:
        u = tl.load(uncond + columns)
    return c, u


@jit
def _mix(c, u, cfg_weight, GUIDED: tl.constexpr):
    """u + cfg_weight (c - u), -inf if either is; each operation is rounded separately."""
    mixed = as_float32(c)
    if GUIDED:
        u = as_float32(u)
        masked = (mixed == float("-inf")) | (u == float("-inf"))
        mixed = tl.where(masked, float("-inf"), u + cfg_weight * (mixed - u))
    return mixed


@jit
def _accumulate(
    x, m_safe, columns, V, scale, min_d, sum_exp, sum_exp_d, sum_d, MASKED: tl.constexpr
):  # fmt: skip
    """Add to the sums per group [G]: e, e d, and d."""
    d, clamped, e = shifted_exp(x, m_safe, scale, min_d)
    if MASKED:
        d = tl.where(columns < V, d, 0.0)
    return (
        sum_exp + tl.sum(e, axis=1),
        sum_exp_d + tl.sum(e * clamped, axis=1),
        sum_d + tl.sum(d, axis=1),
    )


@jit
def _sum_pair(a, b):
    """The sums of two vectors [G]; one reduction, because every reduction has its barriers."""
    return tl.split(tl.sum(tl.join(a, b), axis=0))


@jit
def _store_stats(
    out, rows, room, inside, x, m,  # [4, R, L] at the row and step; the token's logit, the maximum
    sum_exp, sum_exp_d, sum_d,  # sums, see `_accumulate`; the first without the token's group
    x_group, is_other,  # logits of the token's group, and whether they count as others
    scale, inv_temperature, min_d, V, log_V,
):  # fmt: skip
    """Compute one distribution's statistics from its sums, and store them.

    The token's group is summed again without the token: subtracting it would lose digits.
    """
    m_safe = safe_max(m)
    _, _, e = shifted_exp(x_group, m_safe, scale, min_d)
    sum_exp_others = sum_exp + tl.sum(tl.where(is_other, e, 0.0), axis=0)
    d_token, _, e_token = shifted_exp(x, m_safe, scale, min_d)
    stats = stats_from_sums(
        d_token, e_token, m, m_safe, sum_exp_others, sum_exp_d, sum_d, inv_temperature, V, log_V
    )
    for i in tl.static_range(4):
        tl.store(out + i * rows * room, stats[i], mask=inside)


@jit
def _sample_kernel(
    # Logits [R, V_held], uncond may be None; uniform [R, L]; the smallest logit kept [R] or None
    cond, uncond, uniform, threshold,
    token_ids, conditional, guided,  # outputs [R], [4, R, L], [4, R, L]
    # The column of L that is read and written [1], and where the token is recorded [R, L]; or None
    step, recorded, room,
    # Layouts of the rows of cond and uncond, see `fold_rows`
    cond_inner, cond_stride_outer, cond_stride_inner,
    uncond_inner, uncond_stride_outer, uncond_stride_inner,
    rows, V, log_V,
    # Numbers, or pointers if W_IN_MEMORY, T_IN_MEMORY
    cfg_weight, temperature,
    W_IN_MEMORY: tl.constexpr, T_IN_MEMORY: tl.constexpr, GREEDY: tl.constexpr,
    # Groups of K columns per tile; number of tiles, that rounded up to a power of two, and whether
    # the last one is partial
    G: tl.constexpr, K: tl.constexpr,
    TILES: tl.constexpr, TILES_POW2: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    place = row.to(tl.int64) * room  # in [R, L]
    inside = True
    if step is not None:
        column = tl.load(step)
        inside = (column >= 0) & (column < room)
        place += column
    GUIDED: tl.constexpr = uncond is not None
    cond += row_offset(row, cond_inner, cond_stride_outer, cond_stride_inner)
    if GUIDED:
        uncond += row_offset(row, uncond_inner, uncond_stride_outer, uncond_stride_inner)
    cfg_weight = load_scalar(cfg_weight, W_IN_MEMORY)
    scale, inv_temperature, min_d = temperature_factors(load_scalar(temperature, T_IN_MEMORY))
    unit_scale, _, unit_min_d = temperature_factors(load_scalar(1.0, False))
    groups = tl.arange(0, G)
    tile = groups[:, None] * K + tl.arange(0, K)[None, :]

    # First pass: the maxima. A row of one tile then stays in registers.
    if TILES == 1:
        c, u = _load_pair(cond, uncond, tile, V, GUIDED, PARTIAL)
        m_c = tl.max(as_float32(c), axis=1)
        m_g = tl.max(_mix(c, u, cfg_weight, GUIDED), axis=1)
    else:
        m_c = tl.full([G], float("-inf"), tl.float32)
        m_g = tl.full([G], float("-inf"), tl.float32)
        for t in range(0, TILES):
            c, u = _load_pair(cond, uncond, tile + t * G * K, V, GUIDED, PARTIAL)
            m_c = tl.maximum(m_c, tl.max(as_float32(c), axis=1))
            m_g = tl.maximum(m_g, tl.max(_mix(c, u, cfg_weight, GUIDED), axis=1))
    # Not joined as the sums are: LLVM crashes on that for sm_100 (Triton 3.9).
    m_c, m_g = tl.max(m_c, axis=0), tl.max(m_g, axis=0)
    m_safe_c, m_safe_g = safe_max(m_c), safe_max(m_g)

    # Second pass: the sums per group, and the weight of each tile.
    min_kept = None if threshold is None else tl.load(threshold + row)
    zero = tl.zeros([G], tl.float32)
    exp_c, exp_d_c, d_c, exp_g, exp_d_g, d_g = zero, zero, zero, zero, zero, zero
    weights = tl.zeros([G], tl.int64)
    tile_weights = tl.zeros([TILES_POW2], tl.int64)
    for t in range(0, TILES):
        if TILES > 1:
            c, u = _load_pair(cond, uncond, tile + t * G * K, V, GUIDED, PARTIAL)
        mixed = _mix(c, u, cfg_weight, GUIDED)
        weights = tl.sum(kernel_weights(mixed, m_g, min_kept, scale, GREEDY), axis=1)
        if TILES > 1:
            is_tile = tl.arange(0, TILES_POW2) == t
            tile_weights = tl.where(is_tile, tl.sum(weights, axis=0), tile_weights)
        exp_c, exp_d_c, d_c = _accumulate(
            as_float32(c), m_safe_c, tile + t * G * K, V, unit_scale, unit_min_d,
            exp_c, exp_d_c, d_c, PARTIAL,
        )  # fmt: skip
        exp_g, exp_d_g, d_g = _accumulate(
            mixed, m_safe_g, tile + t * G * K, V, scale, min_d, exp_g, exp_d_g, d_g, PARTIAL
        )

    exp_d_c, exp_d_g = _sum_pair(exp_d_c, exp_d_g)
    d_c, d_g = _sum_pair(d_c, d_g)

    # The token is the first column whose cumulative weight exceeds `position`: first its tile, then
    # its group, then its column. The index of each is the number of cumulative weights <= position.
    total = tl.sum(tile_weights if TILES > 1 else weights, axis=0)
    if GREEDY:
        position = total * 0
    else:
        number = tl.load(uniform + place, mask=inside, other=0.0).to(tl.float64)
        position = (number * total.to(tl.float64)).to(tl.int64)
        position = tl.minimum(position, total - 1)
    start = 0
    if TILES > 1:
        is_before = tl.cumsum(tile_weights, axis=0) <= position
        start = tl.minimum(tl.sum(is_before.to(tl.int32), axis=0), TILES - 1) * (G * K)
        position -= tl.sum(tl.where(is_before, tile_weights, 0), axis=0)
        c, u = _load_pair(cond, uncond, start + tile, V, GUIDED, PARTIAL)
        mixed = _mix(c, u, cfg_weight, GUIDED)
        weights = tl.sum(kernel_weights(mixed, m_g, min_kept, scale, GREEDY), axis=1)
    is_before = tl.cumsum(weights, axis=0) <= position
    group, before = _sum_pair(is_before.to(tl.int64), tl.where(is_before, weights, 0))
    group = tl.minimum(group.to(tl.int32), G - 1)
    position -= before
    in_group = tl.arange(0, K)
    c, u = _load_pair(cond, uncond, start + group * K + in_group, V, GUIDED, True)
    weights = kernel_weights(_mix(c, u, cfg_weight, GUIDED), m_g, min_kept, scale, GREEDY)
    is_before = tl.cumsum(weights, axis=0) <= position
    token = start + group * K + tl.sum(is_before.to(tl.int32), axis=0)
    token = tl.where(total == 0, 0, token)
    tl.store(token_ids + row, token.to(tl.int64))
    if recorded is not None:
        tl.store(recorded + place, token.to(tl.int64), mask=inside)

    token_group = token % (G * K) // K
    is_counted = groups != token_group
    exp_c, exp_g = _sum_pair(tl.where(is_counted, exp_c, 0.0), tl.where(is_counted, exp_g, 0.0))
    others = tl.arange(0, TILES_POW2 * K)
    others = others // K * (G * K) + token_group * K + others % K
    c, u = _load_pair(cond, uncond, others, V, GUIDED, True)
    c_token, u_token = _load_pair(cond, uncond, token, V, GUIDED, True)
    _store_stats(
        conditional + place, rows, room, inside, as_float32(c_token), m_c,
        exp_c, exp_d_c, d_c, as_float32(c), others != token,
        unit_scale, 1.0, unit_min_d, V, log_V,
    )  # fmt: skip
    _store_stats(
        guided + place, rows, room, inside, _mix(c_token, u_token, cfg_weight, GUIDED), m_g,
        exp_g, exp_d_g, d_g, _mix(c, u, cfg_weight, GUIDED), others != token,
        scale, inv_temperature, min_d, V, log_V,
    )  # fmt: skip


# --- Launcher -------------------------------------------------------------------------------------


def sample_launch(vocab_size: int, itemsize: int, small: bool = False) -> dict[str, int | bool]:
    """One tile of up to 32 KB, which stays in registers; larger rows in halves of that.

    64 columns of both branches per thread leave little to compute per thread instead of per column.
    `small` tiles leave registers for a threshold, or for the addresses of rows that are not aligned
    and loaded element by element.
    """
    per_group = 16 // itemsize
    groups = max(triton.next_power_of_2(vocab_size) // per_group, 32)
    if small:
        groups = min(groups, 512)
    elif groups > 2048:
        groups = 1024
    tiles = triton.cdiv(vocab_size, groups * per_group)
    return {
        "G": groups,
        "K": per_group,
        "TILES": tiles,
        "TILES_POW2": triton.next_power_of_2(tiles),
        "PARTIAL": vocab_size != tiles * groups * per_group,
        "num_warps": min(max(1, groups // 64), 8),
        "enable_fp_fusion": False,  # fused multiply-adds would round differently from torch
    }


def sample_triton(
    cond, uncond, uniform, threshold, cfg_weight, temperature, greedy, vocab_size,
    recording: Recording | None = None,
):  # fmt: skip
    """One launch: token_ids [R], conditional [4, R], guided [4, R].

    With a `recording`, uniform is [R L], and the statistics are those of the recording.
    """
    cond, uncond = (t if t is None or fold_rows(t) else t.contiguous() for t in (cond, uncond))
    outer, inner, *strides = fold_rows(cond)
    rows = outer * inner
    _, *uncond_layout = (1, 1, 0, 0) if uncond is None else fold_rows(uncond)
    if recording is None:
        token_ids, conditional, guided = empty_outputs(cond, (rows,))
        step, recorded, room = None, None, 1
    else:
        token_ids = cond.new_empty(rows, dtype=torch.int64)
        step, recorded, conditional, guided = recording
        room = recorded.shape[1]
    aligned = all(n % 16 == 0 for n in (vocab_size, *strides, *uncond_layout[1:]))
    small = threshold is not None or not aligned
    _sample_kernel[(rows,)](
        cond, uncond, uniform.contiguous(), threshold, token_ids, conditional, guided,
        step, recorded, room,
        inner, *strides, *uncond_layout, rows, vocab_size, math.log(vocab_size),
        cfg_weight, temperature, W_IN_MEMORY=isinstance(cfg_weight, Tensor),
        T_IN_MEMORY=isinstance(temperature, Tensor), GREEDY=greedy,
        **sample_launch(vocab_size, cond.element_size(), small),
    )  # fmt: skip
    return token_ids, conditional, guided
