"""Classifier-free guidance, sampling and the sampled token's statistics, in one launch.

    mixed_j = uncond_j + cfg_weight (cond_j - uncond_j)
    token   ~ softmax(mixed / temperature), after top_k, top_p and min_p
    conditional = token_stats(cond, token)                 at temperature 1
    guided      = token_stats(mixed, token, temperature)   before truncation

Bytes moved for R rows of b-byte logits: 2 R V b; the second pass over a row finds it in the cache.

Sampling is the inverse CDF over integer weights, so that equal logits and an equal uniform give
the equal token, bit for bit, whatever the backend, the block size and the rows beside it:
`_inverse_cdf` tells how.

Shapes: R rows, V columns, chunk C rows.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._backend import jit, tl, triton, use_triton
from ._checks import (
    check_logits,
    check_per_row,
    check_range,
    check_same_kind,
    check_scalar,
    check_temperature,
    check_vocab_size,
    fold_rows,
    last_dim_contiguous,
)
from ._inverse_cdf import draw, kernel_weights, truncation_threshold
from ._ops import add_op_namespace_prefix
from ._row_math import (
    CHUNK_ELEMENTS,
    chunk_sums,
    finish,
    finish_rows,
    number,
    row_offset,
    run_time,
    scalar,
    scalars,
    terms,
)
from .token_stats import TokenStats

# Torch path: drawing holds more buffers than the statistics do, some of them of 64 bits.
DRAWN_ELEMENTS = CHUNK_ELEMENTS // 4


class GuidedSample(NamedTuple):
    """Sampled tokens (int64) and their statistics under both distributions."""

    token_ids: Tensor
    conditional: TokenStats
    guided: TokenStats


# --- Triton kernel --------------------------------------------------------------------------------


@jit
def _load_pair(cond, uncond, columns, V, GUIDED: tl.constexpr):
    """Raw cond and uncond logits, -inf beyond V; cond twice where there is no uncond."""
    c = tl.load(cond + columns, mask=columns < V, other=float("-inf"))
    if not GUIDED:
        return c, c
    return c, tl.load(uncond + columns, mask=columns < V, other=float("-inf"))


@jit
def _mix(c, u, cfg_weight, GUIDED: tl.constexpr):
    """u + cfg_weight (c - u), -inf where either is; each operation rounded by itself."""
    c = c.to(tl.float32)
    if not GUIDED:
        return c
    u = u.to(tl.float32)
    ruled_out = (c == float("-inf")) | (u == float("-inf"))
    return tl.where(ruled_out, float("-inf"), u + cfg_weight * (c - u))


@jit
def _lane_sums(x, reference, in_row, scale, floor):
    """Per lane: sum of e below the maximum, how many are at it, sum e d, sum d."""
    d, bounded, e = terms(x, reference, scale, floor)
    at_max = d == 0.0
    return (
        tl.sum(tl.where(at_max, 0.0, e), axis=1),
        tl.sum(at_max.to(tl.float32), axis=1),
        tl.sum(e * bounded, axis=1),
        tl.sum(tl.where(in_row, d, 0.0), axis=1),
    )


@jit
def _store_stats(
    out, row, rows, x, m, below, at_max, sd, d_sum, scale, inv_temperature, floor, V, log_V
):  # fmt: skip
    """Finish one distribution's sums at the token's logit `x`, into the four planes of `out`."""
    reference = tl.where(m == float("-inf"), 0.0, m)
    d_target, _, e_target = terms(x, reference, scale, floor)
    is_max = d_target == 0.0  # then it is one of those in `at_max`, which keep `others` exact
    others = tl.sum(at_max, axis=0) - tl.where(is_max, 1.0, 0.0)
    others += tl.sum(below, axis=0) - tl.where(is_max, 0.0, e_target)
    sd, d_sum = tl.sum(sd, axis=0), tl.sum(d_sum, axis=0)
    stats = finish(d_target, e_target, m, reference, others, sd, d_sum, inv_temperature, V, log_V)
    for i in tl.static_range(4):
        tl.store(out + i * rows + row, stats[i])


@jit
def _sample_kernel(
    cond, uncond, uniform, threshold, token_ids, conditional, guided,
    cond_inner, cond_stride_outer, cond_stride_inner,
    uncond_inner, uncond_stride_outer, uncond_stride_inner,
    rows, V, log_V, cfg_weight, temperature, Q,
    W_IN_MEMORY: tl.constexpr, T_IN_MEMORY: tl.constexpr, GREEDY: tl.constexpr,
    L: tl.constexpr, K: tl.constexpr, Q_POW2: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    GUIDED: tl.constexpr = uncond is not None
    cond += row_offset(row, cond_inner, cond_stride_outer, cond_stride_inner)
    if GUIDED:
        uncond += row_offset(row, uncond_inner, uncond_stride_outer, uncond_stride_inner)
    cfg_weight = scalar(cfg_weight, W_IN_MEMORY)
    scale, inv_temperature, floor = scalars(scalar(temperature, T_IN_MEMORY))
    unit_scale, _, unit_floor = scalars(scalar(1.0, False))
    lanes = tl.arange(0, L)
    tile = lanes[:, None] * Q + tl.arange(0, K)[None, :]  # lane l owns columns [l Q, (l + 1) Q)

    m_c = tl.full([L], float("-inf"), tl.float32)
    m_g = tl.full([L], float("-inf"), tl.float32)
    for step in range(0, Q, K):
        c, u = _load_pair(cond, uncond, tile + step, V, GUIDED)
        m_c = tl.maximum(m_c, tl.max(c.to(tl.float32), axis=1))
        m_g = tl.maximum(m_g, tl.max(_mix(c, u, cfg_weight, GUIDED), axis=1))
    m_c, m_g = tl.max(m_c, axis=0), tl.max(m_g, axis=0)
    reference_c = tl.where(m_c == float("-inf"), 0.0, m_c)
    reference_g = tl.where(m_g == float("-inf"), 0.0, m_g)

    lowest_kept = float("-inf") if threshold is None else tl.load(threshold + row)
    weight = tl.zeros([L], tl.int64)
    zero = tl.zeros([L], tl.float32)
    below_c, at_max_c, sd_c, d_c = zero, zero, zero, zero
    below_g, at_max_g, sd_g, d_g = zero, zero, zero, zero
    for step in range(0, Q, K):
        c, u = _load_pair(cond, uncond, tile + step, V, GUIDED)
        mixed = _mix(c, u, cfg_weight, GUIDED)
        weight += tl.sum(kernel_weights(mixed, m_g, lowest_kept, scale, GREEDY), axis=1)
        in_row = tile + step < V
        sums = _lane_sums(c.to(tl.float32), reference_c, in_row, unit_scale, unit_floor)
        below_c, at_max_c, sd_c, d_c = (
            below_c + sums[0], at_max_c + sums[1], sd_c + sums[2], d_c + sums[3]
        )  # fmt: skip
        sums = _lane_sums(mixed, reference_g, in_row, scale, floor)
        below_g, at_max_g, sd_g, d_g = (
            below_g + sums[0], at_max_g + sums[1], sd_g + sums[2], d_g + sums[3]
        )  # fmt: skip

    # The first column whose cumulated weight exceeds `wanted`: first its lane, then its place in
    # the lane. Each is as far in as there are cumulated weights that do not exceed `wanted`.
    total = tl.sum(weight, axis=0)
    if GREEDY:
        wanted = total * 0
    else:
        wanted = (tl.load(uniform + row).to(tl.float64) * total.to(tl.float64)).to(tl.int64)
        wanted = tl.minimum(wanted, total - 1)
    passed = tl.cumsum(weight, axis=0) <= wanted
    lane = tl.sum(passed.to(tl.int32), axis=0)
    wanted -= tl.sum(tl.where(passed, weight, 0), axis=0)
    places = tl.arange(0, Q_POW2)
    columns = lane * Q + places
    in_lane = tl.where(places < Q, V, 0)
    c, u = _load_pair(cond, uncond, columns, in_lane, GUIDED)
    weights = kernel_weights(_mix(c, u, cfg_weight, GUIDED), m_g, lowest_kept, scale, GREEDY)
    passed = (tl.cumsum(weights, axis=0) <= wanted) & (places < Q)
    token = tl.where(total == 0, 0, lane * Q + tl.sum(passed.to(tl.int32), axis=0))
    tl.store(token_ids + row, token.to(tl.int64))

    c, u = _load_pair(cond, uncond, token, V, GUIDED)
    mixed = _mix(c, u, cfg_weight, GUIDED)
    _store_stats(
        conditional, row, rows, c.to(tl.float32), m_c, below_c, at_max_c, sd_c, d_c,
        unit_scale, 1.0, unit_floor, V, log_V,
    )  # fmt: skip
    _store_stats(
        guided, row, rows, mixed, m_g, below_g, at_max_g, sd_g, d_g,
        scale, inv_temperature, floor, V, log_V,
    )  # fmt: skip


# --- Launcher -------------------------------------------------------------------------------------


def sample_launch(vocab_size: int, itemsize: int) -> dict[str, int | bool]:
    """Up to 512 lanes of Q contiguous columns, one to a thread, which reads 16 bytes at a time."""
    lanes = min(max(triton.next_power_of_2(vocab_size) // 32, 32), 512)
    columns = triton.cdiv(triton.cdiv(vocab_size, lanes), 16) * 16  # keeps lanes 16-byte aligned
    return {
        "L": lanes,
        "K": 16 // itemsize,
        "Q": columns,
        "Q_POW2": triton.next_power_of_2(columns),
        "num_warps": lanes // 32,
        "maxnreg": 128,  # what 512 threads can have; some ptxas stop at 64 of themselves, and spill
        "enable_fp_fusion": False,  # fused multiply-adds would round differently from torch
    }


def sample_triton(cond, uncond, uniform, threshold, cfg_weight, temperature, greedy, vocab_size):
    """One launch: token_ids [R], conditional [4, R], guided [4, R]."""
    cond, uncond = (t if t is None or fold_rows(t) else t.contiguous() for t in (cond, uncond))
    outer, inner, *strides = fold_rows(cond)
    rows = outer * inner
    _, *uncond_layout = (1, 1, 0, 0) if uncond is None else fold_rows(uncond)
    token_ids = cond.new_empty(rows, dtype=torch.int64)
    conditional, guided = (cond.new_empty((4, rows), dtype=torch.float32) for _ in range(2))
    _sample_kernel[(rows,)](
        cond, uncond, uniform, threshold, token_ids, conditional, guided,
        inner, *strides, *uncond_layout, rows, vocab_size, math.log(vocab_size),
        cfg_weight, temperature, W_IN_MEMORY=isinstance(cfg_weight, Tensor),
        T_IN_MEMORY=isinstance(temperature, Tensor), GREEDY=greedy,
        **sample_launch(vocab_size, cond.element_size()),
    )  # fmt: skip
    return token_ids, conditional, guided


# --- The torch path -------------------------------------------------------------------------------


def mix(cond: Tensor, uncond: Tensor | None, cfg_weight: float | Tensor) -> Tensor:
    """uncond + cfg_weight (cond - uncond) in fp32; -inf where either is."""
    c = cond.float()
    if uncond is None:
        return c
    u = uncond.float()
    mixed = (c - u).mul_(cfg_weight).add_(u)
    return mixed.masked_fill_((c == -math.inf) | (u == -math.inf), -math.inf)


def _sample_torch(cond, uncond, uniform, threshold, cfg_weight, temperature, greedy, vocab_size):
    cond, uncond = (
        None if t is None else t.reshape(-1, t.shape[-1])[:, :vocab_size] for t in (cond, uncond)
    )
    rows = cond.shape[0]
    token_ids = cond.new_empty(rows, dtype=torch.int64)
    conditional, guided = (cond.new_empty((4, rows), dtype=torch.float32) for _ in range(2))
    chunk = max(1, DRAWN_ELEMENTS // vocab_size)
    buffers = [cond.new_empty((min(chunk, rows), vocab_size), dtype=torch.float32) for _ in "de"]
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        d, e = (b[: part.stop - start] for b in buffers)
        mixed = mix(cond[part], None if uncond is None else uncond[part], cfg_weight)
        kept_from = None if threshold is None else threshold[part]
        tokens = draw(mixed, uniform[part], kept_from, temperature, greedy)
        token_ids[part] = tokens
        for out, logits, T in ((conditional, cond[part], 1.0), (guided, mixed, temperature)):
            sums = chunk_sums(logits, tokens, T, d, e)
            out[:, part] = torch.stack(finish_rows(sums, vocab_size, T)[:4])
    return token_ids, conditional, guided


# --- Custom op ------------------------------------------------------------------------------------


@torch.library.custom_op(add_op_namespace_prefix("guided_sample"), mutates_args=())
def _guided_sample_op(
    cond: Tensor, uncond: Tensor | None, uniform: Tensor, cfg_weight: Tensor, temperature: Tensor,
    greedy: bool, top_k: int, top_p: float, min_p: float, vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if cond.is_cpu and not bool(((uniform >= 0) & (uniform < 1)).all()):
        raise ValueError("uniform holds numbers outside [0, 1): draw it with torch.rand")
    shape = cond.shape[:-1]
    if not uniform.numel():
        return _empty_outputs(cond)
    threshold, cfg_weight, temperature = None, number(cfg_weight), number(temperature)
    if not greedy and (0 < top_k < vocab_size or top_p < 1 or min_p > 0):
        rows = (
            None if t is None else t.reshape(-1, t.shape[-1])[:, :vocab_size]
            for t in (cond, uncond)
        )  # fmt: skip
        threshold = truncation_threshold(mix(*rows, cfg_weight), temperature, top_k, top_p, min_p)
    run = sample_triton if use_triton(cond) else _sample_torch
    uniform = uniform.reshape(-1).contiguous()
    token_ids, conditional, guided = run(
        cond, uncond, uniform, threshold, cfg_weight, temperature, greedy, vocab_size
    )
    return token_ids.view(shape), conditional.view(4, *shape), guided.view(4, *shape)


@_guided_sample_op.register_fake
def _(cond, *_):
    return _empty_outputs(cond)


def _empty_outputs(cond: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shape = cond.shape[:-1]
    return (
        cond.new_empty(shape, dtype=torch.int64),
        cond.new_empty((4, *shape), dtype=torch.float32),
        cond.new_empty((4, *shape), dtype=torch.float32),
    )


# --- Public ---------------------------------------------------------------------------------------


def guided_sample(
    cond_logits: Tensor,
    uncond_logits: Tensor | None,
    uniform: Tensor,
    *,
    cfg_weight: float | Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    vocab_size: int | None = None,
) -> GuidedSample:
    """Sample a token a row from guided logits, and score it under both distributions.

    mixed = uncond + cfg_weight * (cond - uncond) in float32, or cond where `uncond_logits` is
    None; the token is the inverse CDF of softmax(mixed / temperature) at `uniform`: the first
    column whose cumulated probability exceeds it. A pure function: no hidden random state, no host
    sync, safe in a CUDA graph; the same token on every backend and in every batch (how, and to what
    it is exact: the module's docstring). A class of probability 0 is never drawn.

    Truncation is that of Hugging Face's generate, in its order: top_k keeps the k largest, top_p
    the smallest set of largest ones whose probability reaches top_p, min_p those with at least
    min_p times the largest probability. Ties with the last one kept are all kept. Untruncated
    sampling is one launch on a GPU; truncation adds torch's topk or sort.

    Args:
        cond_logits: (..., V) float32, bfloat16 or float16. Strides as in `token_stats`, but a copy
            is also made where the leading dimensions do not merge into two.
        uncond_logits: the same shape, dtype and device, or None for plain sampling.
        uniform: (...) float32 in [0, 1), one number a row, drawn outside.
        cfg_weight: guidance; 1 is the conditional distribution. Like `temperature` a run-time
            value, and, as a tensor without dimensions, read again in every replay of a graph.
        temperature: a positive number; the number 0 is greedy: the first largest mixed logit,
            whatever `uniform` and the truncation (`guided` is then taken at temperature 1).
        top_k: 0 keeps all. top_p: 1 keeps all. min_p: 0 keeps all.
        vocab_size: columns from here on do not exist. None: all exist.

    Returns:
        GuidedSample(token_ids int64 (...), conditional, guided), both TokenStats of float32 (...):
        `conditional` of the cond logits at temperature 1, `guided` of mixed / temperature, each
        over all V classes: a truncated distribution has nsc -inf. No output carries gradients;
        score the tokens again with `token_stats` to train on them.
        A class that either branch holds at -inf is ruled out. A row of nothing but -inf gives
        token 0 with logprob -inf. NaN logits are never drawn, and make that row's statistics NaN.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range; `uniform` outside
            [0, 1), which is looked for on the CPU only and clamped on a GPU.
    """
    check_logits("cond_logits", cond_logits)
    if cond_logits.dtype == torch.float64:
        raise ValueError("cond_logits has dtype torch.float64: cast it with .float()")
    rows = cond_logits.shape[:-1]
    check_per_row("uniform", uniform, rows, cond_logits.device)
    if uniform.dtype != torch.float32:
        raise ValueError(f"uniform has dtype {uniform.dtype}: draw it as float32")
    if uncond_logits is not None:
        check_same_kind(cond_logits, uncond_logits)
        uncond_logits = last_dim_contiguous(uncond_logits.detach())
    check_scalar("cfg_weight", cfg_weight, cond_logits)
    if not isinstance(cfg_weight, Tensor):
        check_range("cfg_weight", cfg_weight, -math.inf < cfg_weight < math.inf, "a finite number")
    check_temperature(temperature, cond_logits, zero_allowed=True)
    greedy = not isinstance(temperature, Tensor) and temperature == 0
    check_range("top_k", top_k, top_k >= 0, "0 for all, or a positive integer")
    check_range("top_p", top_p, 0 < top_p <= 1, "a number in (0, 1]")
    check_range("min_p", min_p, 0 <= min_p <= 1, "a number in [0, 1]")
    token_ids, conditional, guided = _guided_sample_op(
        last_dim_contiguous(cond_logits.detach()), uncond_logits, uniform.detach(),
        run_time(cfg_weight, cond_logits), run_time(1.0 if greedy else temperature, cond_logits),
        greedy, top_k, float(top_p), float(min_p),
        check_vocab_size(vocab_size, cond_logits.shape[-1]),
    )  # fmt: skip
    return GuidedSample(token_ids, TokenStats(*conditional), TokenStats(*guided))


def guided_sample_reference(
    cond_logits: Tensor,
    uncond_logits: Tensor,
    uniform: Tensor,
    *,
    cfg_weight: float,
    temperature: float = 1.0,
) -> Tensor:
    """The token in plain torch: softmax, cumsum, searchsorted. Exact away from CDF steps."""
    mixed = uncond_logits + cfg_weight * (cond_logits - uncond_logits)
    cumulated = torch.softmax(mixed / temperature, -1).cumsum(-1)
    wanted = uniform[..., None] * cumulated[..., -1:]
    return torch.searchsorted(cumulated, wanted, right=True)[..., 0]
