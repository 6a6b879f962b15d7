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

CHUNK_ELEMENTS = 1 << 20  # of a buffer: 4 MB of fp32


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


def chunk_rows(columns: int) -> int:
    """Rows of a chunk, whose buffers should stay in the cache."""
    return max(1, CHUNK_ELEMENTS // columns)


def distances(x: Tensor, out: Tensor, row_max: Tensor, temperature: float | Tensor) -> Tensor:
    """(x - row_max[:, None]) / temperature into `out`."""
    if x.dtype != out.dtype:  # one conversion pass is faster than mixed arithmetic
        x = out.copy_(x)
    torch.sub(x, row_max[..., None], out=out)
    return out if is_one(temperature) else out.div_(temperature)


def is_one(temperature: float | Tensor) -> bool:
    """Whether dividing by it changes nothing; a tensor is not read."""
    return not isinstance(temperature, Tensor) and temperature == 1


def rounds_alike(tensor: Tensor) -> bool:
    """Whether torch rounds the exponential or logarithm of an element alike wherever it stands.

    Without MKL, on a CPU, an element in the tail of a vector loop is rounded differently, so that a
    row's bits would depend on the rows before it.
    """
    return not tensor.is_cpu or torch.backends.mkl.is_available()


def exp_rows(d: Tensor, out: Tensor, finite: bool | None = None) -> Tensor:
    """exp(d), d <= 0, into `out`, at least the smallest normal number where d is finite; each
    element is rounded alike wherever it stands. `finite`: no d is -inf; None: not known."""
    if not rounds_alike(d):
        torch.softmax(d, -1, out=out)  # works row by row
        # It is relative to the row's maximum, which may be below 0, or -inf.
        row_max = d.amax(-1, keepdim=True)
        out.mul_(row_max.exp() / out.amax(-1, keepdim=True))
        return out.masked_fill_(row_max == -math.inf, 0.0)
    lowest = math.log(1.1 * torch.finfo(d.dtype).tiny)
    if finite is None:
        smallest = float(d.amin()) if d.is_cpu else -math.inf
        if smallest > lowest:
            return torch.exp(d, out=out)
        finite = smallest > -math.inf
    # On a CPU, an exponential that underflows takes 20 to 200 times as long as one that does not.
    torch.clamp(d, min=lowest, out=out).exp_()
    return out if finite else out.masked_fill_(d == -math.inf, 0.0)


def any_row(rows: Tensor) -> bool:
    """Whether any of the boolean `rows` is set; True on a GPU, where reading it costs a sync."""
    return not rows.is_cpu or bool(rows.any())


def all_finite(values: Tensor) -> bool:
    """Whether no value is infinite or NaN; False on a GPU, where reading it costs a sync, and if
    their sum overflows."""
    return values.is_cpu and math.isfinite(float(values.sum()))


def row_distances(x: Tensor, d: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, bool]:
    """Each row's maximum, its sum of d = (x - maximum) / temperature, which goes into `d`, and
    whether all d are finite. A maximum of -inf counts as 0."""
    maximum = x.amax(-1).to(d.dtype)
    distances(x, d, maximum, temperature)
    sum_d = row_sum(d)
    if finite := all_finite(sum_d):
        return maximum, sum_d, finite
    distances(x, d, maximum.masked_fill(maximum == -math.inf, 0.0), temperature)
    return maximum, row_sum(d), finite


def chunk_stats(x: Tensor, token_ids: Tensor, temperature: float | Tensor) -> tuple[Tensor, ...]:
    """logprob, nsc, entropy, lse, maximum and sum_exp of a chunk [C, V] of whole rows."""
    d, e = torch.empty((2, *x.shape), dtype=compute_dtype(x), device=x.device)
    sums = chunk_sums(x, token_ids, temperature, d, e, all_here=True)
    return stats_from_row_sums(sums, x.shape[-1], temperature)


def chunk_sums(x, token_ids, temperature, d, e, all_here: bool) -> RowSums:
    """Sums of a chunk [C, V]; `d`, `e` are buffers [C, V]; `all_here`: every id of `token_ids` [C]
    lies in [0, V)."""
    maximum, sum_d, finite = row_distances(x, d, temperature)
    exp_rows(d, e, finite)
    if not finite:
        d.clamp_(min=MIN_D)  # e d is then 0 where d is -inf
    column = (token_ids if all_here else token_ids.clamp(0, x.shape[-1] - 1))[:, None]
    x_token = x.gather(1, column)[:, 0].to(d.dtype)
    e_column = 0.0
    if not all_here:
        not_here = column[:, 0] != token_ids
        x_token.masked_fill_(not_here, math.nan)
        e_column = e.gather(1, column).masked_fill_(~not_here[:, None], 0.0)
    return RowSums(*sums_from_exp(d, e, column, e_column), sum_d, maximum, x_token)


def sums_from_exp(d, e, column, e_column: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """sum_exp_others and sum_exp_d from d and e = exp(d) (..., V), which is overwritten.

    `column` (..., 1) is the token's; if it is not among the columns, `e_column` is what e holds
    there.
    """
    e.scatter_(-1, column, e_column)
    return row_sum(e), row_sum(e.mul_(d))


def stats_from_row_sums(sums: RowSums, V: int, temperature) -> tuple[Tensor, ...]:
    """logprob, nsc, entropy, lse, maximum and sum_exp of whole rows of V columns."""
    m_safe, finite = sums.maximum, all_finite(sums.sum_d)
    if not finite:
        m_safe = m_safe.masked_fill(m_safe == -math.inf, 0.0)
    d_token = sums.x_token - m_safe
    if not is_one(temperature):
        d_token, m_safe = d_token / temperature, m_safe / temperature
    *stats, sum_exp = stats_from_distances(*sums[:3], d_token, m_safe, sums.maximum, V, finite)
    return *stats, sums.maximum, sum_exp


def stats_from_distances(
    sum_exp_others, sum_exp_d, sum_d, d_token, m_scaled, maximum, V: int, finite: bool
) -> tuple[Tensor, ...]:
    """logprob, nsc, entropy, lse and sum_exp from a row's sums, its token's d and maximum / T.

    `finite`: no sum_d is infinite or NaN.
    """
    dtype = sum_d.dtype
    if not rounds_alike(sum_d):  # in float64, and rounded, the difference disappears
        sum_exp_others, sum_exp_d = sum_exp_others.double(), sum_exp_d.double()
        d_token = d_token.double()
    below_one = torch.expm1(d_token)  # e_token - 1, exactly 0 if the token is the maximum
    rest = sum_exp_others + below_one  # sum_exp - 1
    log_sum_exp, sum_exp = torch.log1p(rest), rest + 1.0
    finite_d = d_token if finite else d_token.clamp(min=MIN_D)
    weighted_d = torch.addcmul(sum_exp_d, below_one + 1.0, finite_d)
    results = [
        d_token - log_sum_exp,
        torch.add(math.log(V) - log_sum_exp, sum_d, alpha=1 / V).clamp_(max=0.0),
        torch.addcdiv(log_sum_exp, weighted_d, sum_exp, value=-1),
        m_scaled + log_sum_exp,
        sum_exp,
    ]
    if not finite:
        fully_masked = (maximum == -math.inf) & (sum_d == -math.inf)  # every logit is -inf
        for i, value in enumerate((-math.inf, -math.inf, 0.0, -math.inf, 1.0)):
            results[i] = results[i].masked_fill(fully_masked, value)
    return tuple(results if rest.dtype == dtype else (result.to(dtype) for result in results))


def row_sum(t: Tensor) -> Tensor:
    """Sum of each row, in an order that does not depend on the number of rows."""
    # torch splits the sum of a single row over its threads, but never a row among several.
    return t.sum(-1) if t.numel() > t.shape[-1] else t.expand(2, *t.shape).sum(-1)[0]
