"""The statistics of one row of logits, once for Triton and once for torch.

`token_stats`, `linear_token_stats` and `guided_sample` compute them from d_j = x_j - m, where m is
the row's maximum (0 if no logit is finite), so that the size of the logits costs no precision. With
e_j = exp(d_j/T) and the token a:

    sum_exp_others = sum e_j over j != a         sum_exp = sum_exp_others + e_a
    sum_exp_d = sum e_j d_j                      sum_d = sum d_j
    log_sum_exp = log sum_exp = log1p(sum_exp_others) if d_a = 0

    logprob = d_a/T - log_sum_exp                entropy = log_sum_exp - sum_exp_d / (sum_exp T)
    lse = m/T + log_sum_exp                      nsc = sum_d/(V T) - log_sum_exp + log V

If the token is the maximum, log1p(sum_exp_others) keeps the digits of a logprob near 0 that
1 + sum_exp_others would lose. d is clamped to MIN_D * T wherever it is multiplied by e, because
-inf * 0 is NaN.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._backend import constant, jit, tl

LOG2_E = math.log2(math.e)
# exp(-1000) is 0 in float32 and in float64.
MIN_D = -1000.0
_LOG2_E, _MIN_D = constant(LOG2_E), constant(MIN_D)
CHUNK_ELEMENTS = 1 << 20  # torch path: 4 MB of fp32 per buffer, which stays in cache


# --- Triton ---------------------------------------------------------------------------------------


@jit
def as_float32(x):
    """`x` in fp32. bfloat16 by its bits: one instruction per element, where a cast takes 1.5."""
    if x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@jit
def temperature_factors(T):
    """log2(e)/T, 1/T and MIN_D * T, rounded as torch rounds them."""
    return tl.div_rn(tl.full([], _LOG2_E, tl.float32), T), 1.0 / T, _MIN_D * T


@jit
def row_offset(row, inner, stride_outer, stride_inner):
    """Where row `row` starts (see `fold_rows`); int64, because R * V exceeds 2^31."""
    row = row.to(tl.int64)
    return (row // inner) * stride_outer + (row % inner) * stride_inner


@jit
def safe_max(m):
    """The maximum `m`, or 0 if no logit is finite: -inf - -inf would be NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@jit
def shifted_exp(x, m_safe, scale, min_d):
    """d = x - m_safe, d clamped to at least `min_d`, and exp(d / T)."""
    d = x - m_safe
    clamped = tl.maximum(d, min_d, propagate_nan=tl.PropagateNan.ALL)
    return d, clamped, tl.exp2(clamped * scale)


@jit
def log_one_plus(y):
    """log(1 + y), y >= 0, to full relative precision for small y: 2 atanh(y / (2 + y))."""
    z = y / (2.0 + y)
    z2 = z * z
    series = 1.0 / 13 + z2 * (1.0 / 15)
    series = 1.0 / 9 + z2 * (1.0 / 11 + z2 * series)
    series = 1.0 + z2 * (1.0 / 3 + z2 * (1.0 / 5 + z2 * (1.0 / 7 + z2 * series)))
    return tl.where(y < 1.0, 2.0 * z * series, tl.log(1.0 + y))


@jit
def stats_from_sums(
    d_token, e_token, m, m_safe,  # the token, the row's maximum
    sum_exp_others, sum_exp_d, sum_d,  # the sums over the row
    inv_temperature, V, log_V,
):  # fmt: skip
    """A row's sums -> logprob, nsc, entropy, lse, sum_exp."""
    fully_masked = (m == float("-inf")) & (sum_d == float("-inf"))  # every logit is -inf
    sum_exp = tl.where(fully_masked, 1.0, sum_exp_others + e_token)
    # If the token is the maximum, 1 + sum_exp_others would lose the digits of a small sum.
    log_sum_exp = tl.where(
        d_token == 0.0, log_one_plus(sum_exp_others), log_one_plus(sum_exp - 1.0)
    )
    nsc = sum_d / V * inv_temperature + (log_V - log_sum_exp)
    minus_inf = float("-inf")
    return (
        tl.where(fully_masked, minus_inf, d_token * inv_temperature - log_sum_exp),
        tl.where(fully_masked, minus_inf, tl.minimum(nsc, 0.0, propagate_nan=tl.PropagateNan.ALL)),
        tl.where(fully_masked, 0.0, log_sum_exp - sum_exp_d / sum_exp * inv_temperature),
        tl.where(fully_masked, minus_inf, m_safe * inv_temperature + log_sum_exp),
        sum_exp,
    )


# --- torch ----------------------------------------------------------------------------------------


class RowSums(NamedTuple):
    """The sums over some or all columns of each row, with d = (x - maximum) / T; [R] each.

    If `maximum` is -inf, d is x / T. The first two sums leave the token out.
    """

    sum_exp_others: Tensor
    sum_exp_d: Tensor
    sum_d: Tensor
    maximum: Tensor
    x_token: Tensor  # the token's logit, NaN if the token is not among the columns


def compute_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64 logits, float32 for all others."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def distances(x: Tensor, out: Tensor, row_max: Tensor, temperature: float | Tensor) -> Tensor:
    """(x - row_max[:, None]) / temperature into `out`."""
    if x.dtype != out.dtype:  # one conversion pass is faster than mixed arithmetic
        x = out.copy_(x)
    torch.sub(x, row_max[:, None], out=out)
    return out if isinstance(temperature, float) and temperature == 1 else out.div_(temperature)


def any_row(rows: Tensor) -> bool:
    """Whether any of the boolean `rows` is set; True on a GPU, where reading it costs a sync."""
    return not rows.is_cpu or bool(rows.any())


def chunk_sums(x, token_ids, temperature, d, p) -> RowSums:
    """Sums of a chunk [C, V]; `token_ids` [C] may lie outside [0, V); `d`, `p` are buffers [C, V].

    Built on torch.softmax, which works row by row. torch's exponentials round an element
    differently in the tail of a vector loop, so a row's bits would depend on the rows before it.
    """
    last = x.shape[-1] - 1
    column = token_ids.clamp(0, last)[:, None]
    not_here = column[:, 0] != token_ids
    x_token = x.gather(1, column)[:, 0].to(d.dtype)
    maximum = x.amax(-1).to(d.dtype)
    fully_masked = maximum == -math.inf
    distances(x, d, maximum.masked_fill(fully_masked, 0.0), temperature)
    sum_d = _row_sum(d)
    if any_row(sum_d == -math.inf):
        d.clamp_(min=MIN_D)
    torch.softmax(d, -1, out=p)
    # exp(d) is 1 at the maximum, so 1 / max(p) is sum exp(d).
    sum_exp = p.amax(-1).reciprocal_().masked_fill_(fully_masked, 0.0)
    if any_row(not_here):
        p.scatter_(1, column, p.gather(1, column).masked_fill_(~not_here[:, None], 0.0))
        x_token.masked_fill_(not_here, math.nan)
    else:
        p.scatter_(1, column, 0.0)
    sum_exp_others = _row_sum(p).mul_(sum_exp)
    return RowSums(sum_exp_others, _row_sum(d.mul_(p)).mul_(sum_exp), sum_d, maximum, x_token)


def stats_from_row_sums(sums: RowSums, V: int, temperature) -> tuple[Tensor, ...]:
    """logprob, nsc, entropy, lse, maximum and sum_exp of whole rows of V columns."""
    sum_exp_others, sum_exp_d, sum_d, maximum, x_token = sums
    fully_masked = (maximum == -math.inf) & (sum_d == -math.inf)  # every logit is -inf
    m_safe = maximum.masked_fill(maximum == -math.inf, 0.0)
    d_token = (x_token - m_safe) / temperature
    e_token = d_token.exp()
    sum_exp = sum_exp_others + e_token
    log_sum_exp = torch.where(d_token == 0, _log_one_plus(sum_exp_others), sum_exp.log())
    entropy = log_sum_exp - (sum_exp_d + e_token * d_token.clamp(min=MIN_D)) / sum_exp
    nsc = sum_d / V + (math.log(V) - log_sum_exp)
    return (
        (d_token - log_sum_exp).masked_fill_(fully_masked, -math.inf),
        nsc.clamp_(max=0.0).masked_fill_(fully_masked, -math.inf),
        entropy.masked_fill_(fully_masked, 0.0),
        (m_safe / temperature + log_sum_exp).masked_fill_(fully_masked, -math.inf),
        maximum,
        sum_exp.masked_fill_(fully_masked, 1.0),
    )


def _row_sum(t: Tensor) -> Tensor:
    """Sum of each row, in an order that does not depend on the number of rows."""
    # torch splits the sum of a single row over its threads, but never a row among several.
    return t.sum(-1) if t.shape[0] > 1 else t.expand(2, -1).sum(-1)[:1]


def _log_one_plus(y: Tensor) -> Tensor:
    """log(1 + y), y >= 0, to full relative precision, each row rounded alike: torch.log1p is not
    (see `chunk_sums`)."""
    u = 1 + y.double()
    return torch.where(u == 1, y.double(), u.log() * (y / (u - 1))).to(y.dtype)
