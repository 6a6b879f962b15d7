"""Classifier-free guidance, sampling and the sampled token's statistics, in one kernel launch.

    mixed_j = uncond_j + cfg_weight (cond_j - uncond_j)
    token   ~ softmax(mixed / temperature), after top_k, top_p and min_p
    conditional = token_stats(cond, token)                 at temperature 1
    guided      = token_stats(mixed, token, temperature)   before truncation

Bytes moved for R rows of b-byte logits: 2 R V b; the second pass over a row hits the cache.

Sampling is the inverse CDF over integer weights: the same logits and uniform give the same token,
whatever the backend, the block size and the other rows (see `_inverse_cdf`).

Shapes: R rows, V columns, chunk C rows.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._backend import jit, tl, triton, uses_triton
from ._checks import (
    check_logits,
    check_per_row,
    check_range,
    check_same_layout,
    check_scalar,
    check_temperature,
    check_truncation,
    check_vocab_size,
    fold_rows,
    last_dim_contiguous,
)
from ._inverse_cdf import kernel_weights, sample_tokens, truncation_threshold
from ._ops import add_op_namespace_prefix
from ._row_stats import (
    CHUNK_ELEMENTS,
    chunk_sums,
    row_offset,
    safe_max,
    shifted_exp,
    stats_from_row_sums,
    stats_from_sums,
    temperature_factors,
)
from ._scalars import load_scalar, to_kernel_argument, to_scalar_tensor
from .token_stats import TokenStats

# Torch path: sampling holds more buffers than the statistics, some of them int64.
SAMPLE_CHUNK_ELEMENTS = CHUNK_ELEMENTS // 4


class GuidedSample(NamedTuple):
    """Sampled tokens (int64) and their statistics under both distributions."""

    token_ids: Tensor
    conditional: TokenStats
    guided: TokenStats


# --- Triton kernel --------------------------------------------------------------------------------


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
    token_ids, conditional, guided = _empty_outputs(cond, (rows,))
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
    """uncond + cfg_weight (cond - uncond) in fp32; -inf if either is."""
    c = cond.float()
    if uncond is None:
        return c
    u = uncond.float()
    mixed = (c - u).mul_(cfg_weight).add_(u)
    return mixed.masked_fill_((c == -math.inf) | (u == -math.inf), -math.inf)


def _flat_rows(logits: Tensor | None, vocab_size: int) -> Tensor | None:
    return None if logits is None else logits.reshape(-1, logits.shape[-1])[:, :vocab_size]


def sample_torch(cond, uncond, uniform, threshold, cfg_weight, temperature, greedy, vocab_size):
    """Same as `sample_triton`, in chunks of rows."""
    cond, uncond = _flat_rows(cond, vocab_size), _flat_rows(uncond, vocab_size)
    rows = cond.shape[0]
    token_ids, conditional, guided = _empty_outputs(cond, (rows,))
    chunk = max(1, SAMPLE_CHUNK_ELEMENTS // vocab_size)
    shape = (min(chunk, rows), vocab_size)
    buffers = [cond.new_empty(shape, dtype=torch.float32) for _ in range(2)]
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        d, p = (b[: part.stop - start] for b in buffers)
        mixed = mix(cond[part], None if uncond is None else uncond[part], cfg_weight)
        min_kept = None if threshold is None else threshold[part]
        tokens = sample_tokens(mixed, uniform[part], min_kept, temperature, greedy)
        token_ids[part] = tokens
        for out, logits, T in ((conditional, cond[part], 1.0), (guided, mixed, temperature)):
            sums = chunk_sums(logits, tokens, T, d, p)
            out[:, part] = torch.stack(stats_from_row_sums(sums, vocab_size, T)[:4])
    return token_ids, conditional, guided


# --- Custom op ------------------------------------------------------------------------------------


@torch.library.custom_op(add_op_namespace_prefix("guided_sample"), mutates_args=())
def _guided_sample_op(
    cond: Tensor, uncond: Tensor | None, uniform: Tensor, cfg_weight: Tensor, temperature: Tensor,
    greedy: bool, top_k: int, top_p: float, min_p: float, vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if cond.is_cpu and not bool(((uniform >= 0) & (uniform < 1)).all()):
        raise ValueError("uniform holds numbers outside [0, 1): pass the result of torch.rand")
    shape = cond.shape[:-1]
    if not uniform.numel():
        return _empty_outputs(cond, shape)
    cfg_weight, temperature = to_kernel_argument(cfg_weight), to_kernel_argument(temperature)
    threshold = None
    if not greedy and (0 < top_k < vocab_size or top_p < 1 or min_p > 0):
        mixed = mix(_flat_rows(cond, vocab_size), _flat_rows(uncond, vocab_size), cfg_weight)
        threshold = truncation_threshold(mixed, temperature, top_k, top_p, min_p)
    run = sample_triton if uses_triton(cond) else sample_torch
    uniform = uniform.reshape(-1).contiguous()
    out = run(cond, uncond, uniform, threshold, cfg_weight, temperature, greedy, vocab_size)
    return out[0].view(shape), out[1].view(4, *shape), out[2].view(4, *shape)


@_guided_sample_op.register_fake
def _(cond, *_):
    return _empty_outputs(cond, cond.shape[:-1])


def _empty_outputs(cond: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
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
    """Sample one token per row from guided logits, and score it under both distributions.

    mixed = uncond + cfg_weight * (cond - uncond) in float32, or cond if `uncond_logits` is None.
    The token is the inverse CDF of softmax(mixed / temperature) at `uniform`: the first column
    whose cumulative probability exceeds it. A pure function: no random state, no host sync, safe in
    a CUDA graph, the same token on every backend and in every batch. A class of probability 0 is
    never sampled.

    Truncation is that of Hugging Face's generate, in its order: top_k keeps the k largest, top_p
    the smallest set of the largest whose probability reaches top_p, min_p those with at least min_p
    times the largest probability. Ties with the last one kept are kept. On a GPU, untruncated
    sampling is one kernel launch; truncation adds torch's topk or sort.

    Args:
        cond_logits: (..., V) float32, bfloat16 or float16. Strides as in `token_stats`, but a copy
            is also made if the leading dimensions do not merge into two.
        uncond_logits: the same shape, dtype and device, or None for plain sampling.
        uniform: (...) float32 in [0, 1), one random number per row, from the caller.
        cfg_weight: guidance; 1 is the conditional distribution. A run-time value, as is
            `temperature`; a 0-dim tensor is read again in every replay of a graph.
        temperature: a positive number; the number 0 is greedy: the first largest mixed logit,
            whatever `uniform` and the truncation (`guided` is then taken at temperature 1).
        top_k: 0 keeps all. top_p: 1 keeps all. min_p: 0 keeps all.
        vocab_size: columns from here on are padding. None: no padding.

    Returns:
        GuidedSample(token_ids int64 (...), conditional, guided), both TokenStats of float32 (...):
        `conditional` of the cond logits at temperature 1, `guided` of mixed / temperature, each
        over all V classes: a truncated distribution has nsc -inf. No output carries gradients;
        score the tokens again with `token_stats` to train on them.
        A class at -inf in either branch is masked. A row in which every logit is -inf gives token
        0 with logprob -inf. NaN logits are never sampled, and make the row's statistics NaN.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range; `uniform` outside
            [0, 1), which is checked on the CPU only; on a GPU it is clamped.
    """
    check_logits("cond_logits", cond_logits)
    if cond_logits.dtype == torch.float64:
        raise ValueError("cond_logits has dtype torch.float64: cast it with .float()")
    rows = cond_logits.shape[:-1]
    check_per_row("uniform", uniform, rows, cond_logits.device)
    if uniform.dtype != torch.float32:
        raise ValueError(f"uniform has dtype {uniform.dtype}: pass float32")
    if uncond_logits is not None:
        check_same_layout(cond_logits, uncond_logits)
        uncond_logits = last_dim_contiguous(uncond_logits.detach())
    check_scalar("cfg_weight", cfg_weight, cond_logits)
    if not isinstance(cfg_weight, Tensor):
        check_range("cfg_weight", cfg_weight, -math.inf < cfg_weight < math.inf, "a finite number")
    check_temperature(temperature, cond_logits, zero_allowed=True)
    greedy = not isinstance(temperature, Tensor) and temperature == 0
    check_truncation(top_k, top_p, min_p)
    token_ids, conditional, guided = _guided_sample_op(
        last_dim_contiguous(cond_logits.detach()), uncond_logits, uniform.detach(),
        to_scalar_tensor(cfg_weight, cond_logits),
        to_scalar_tensor(1.0 if greedy else temperature, cond_logits),
        greedy, top_k, float(top_p), float(min_p),
        check_vocab_size(vocab_size, cond_logits.shape[-1]),
    )  # fmt: skip
    return GuidedSample(token_ids, TokenStats(*conditional), TokenStats(*guided))


def guided_sample_reference(
    cond_logits: Tensor, uncond_logits: Tensor, uniform: Tensor, *,
    cfg_weight: float, temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """The token in eager torch: softmax, cumsum, searchsorted; exact away from steps of the CDF."""
    mixed = uncond_logits + cfg_weight * (cond_logits - uncond_logits)
    cumulative = torch.softmax(mixed / temperature, -1).cumsum(-1)
    position = uniform[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, position, right=True)[..., 0]
