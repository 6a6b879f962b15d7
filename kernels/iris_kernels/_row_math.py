"""The arithmetic of one row of logits, once for Triton and once for torch.

Every op that reports `token_stats` computes them from d_j = x_j - m, where m is the row's maximum,
or 0 where no logit is finite: the size of the logits then costs no precision. With e_j = exp(d_j/T)
and a the token:

    others = sum e_j over j != a,   s = others + e_a,   log s = log1p(others) where d_a = 0
    logprob = d_a/T - log s         entropy = log s - sum(e d) / (s T)
    lse = m/T + log s               nsc = mean(d)/T - log s + log V

Where the token is the maximum, log1p(others) keeps the digits of a logprob near 0 that 1 + others
would lose. Distances are cut at FLOOR * T wherever they are multiplied by e, as -inf * 0 is NaN.
"""

import math

import torch
from torch import Tensor

from ._backend import jit, tl
from ._checks import IGNORED, row_parts

LOG2_E = math.log2(math.e)
# exp(-1000) is 0 in float32 and in float64. Distances to the maximum are cut there (in units of
# the temperature), so that -inf * 0 never arises.
FLOOR = -1000.0
CHUNK_ELEMENTS = 1 << 19  # torch path: 2 MB of fp32 a buffer, which stays in cache


# --- Triton ---------------------------------------------------------------------------------------


@jit
def row_offset(row, inner, stride_outer, stride_inner):
    """Where row `row` starts; int64, since R * V passes 2^31."""
    row = row.to(tl.int64)
    return (row // inner) * stride_outer + (row % inner) * stride_inner


@jit
def terms(x, reference, scale, floor):
    """d = x - reference, the same cut at `floor`, and exp(d / T)."""
    d = x - reference
    bounded = tl.maximum(d, floor, propagate_nan=tl.PropagateNan.ALL)
    return d, bounded, tl.exp2(bounded * scale)


@jit
def move_reference(m, m_new):
    """The reference for a maximum of `m_new`, and the way to it from that for `m`.

    While nothing finite was seen the maximum is -inf, and 0 stands in: -inf - -inf is NaN.
    """
    reference = tl.where(m_new == float("-inf"), 0.0, m_new)
    return reference, tl.where(m == float("-inf"), 0.0, m - reference)


@jit
def rescale(s, sd, shift, scale, floor):
    """sum e and sum e d when every d grows by `shift` (<= 0)."""
    shift = tl.maximum(shift, floor)
    factor = tl.exp2(shift * scale)
    return s * factor, (sd + shift * s) * factor


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
def finish(d_target, e_target, m, reference, others, sd, d_sum, inv_temperature, V, log_V):
    """A row's sums (`others`: sum e without the target) -> logprob, nsc, entropy, lse, sum e."""
    dead = (m == float("-inf")) & (d_sum == float("-inf"))  # all -inf: no distribution
    s = tl.where(dead, 1.0, others + e_target)
    # Where the token is the maximum, 1 + others would lose the digits of a small `others`.
    log_s = tl.where(d_target == 0.0, log_one_plus(others), log_one_plus(s - 1.0))
    nsc = d_sum / V * inv_temperature + (log_V - log_s)
    minus_inf = float("-inf")
    return (
        tl.where(dead, minus_inf, d_target * inv_temperature - log_s),
        tl.where(dead, minus_inf, tl.minimum(nsc, 0.0, propagate_nan=tl.PropagateNan.ALL)),
        tl.where(dead, 0.0, log_s - sd / s * inv_temperature),
        tl.where(dead, minus_inf, reference * inv_temperature + log_s),
        s,
    )


def scalars(temperature: float) -> tuple[float, float, float]:
    """What kernels take for a temperature: log2(e)/T, 1/T, FLOOR * T."""
    return LOG2_E / temperature, 1 / temperature, FLOOR * temperature


# --- torch ----------------------------------------------------------------------------------------


class Buffers:
    """Two [chunk rows, V] buffers in the compute dtype, reused by every chunk."""

    def __init__(self, logits: Tensor, vocab_size: int):
        self.rows = max(1, CHUNK_ELEMENTS // vocab_size)
        shape = (min(self.rows, max(1, math.prod(logits.shape[:-1]))), vocab_size)
        self.pair = [logits.new_empty(shape, dtype=compute_dtype(logits)) for _ in range(2)]

    def chunks(self, logits: Tensor):
        """(flat row numbers, logits [C, V_held], buffer [C, V], buffer [C, V]) of every chunk."""
        for rows, part in row_parts(logits, levels=1):
            flat = part.view(-1, part.shape[-1])
            for start in range(rows.start, rows.stop, self.rows):
                stop = min(start + self.rows, rows.stop)
                a, b = (buffer[: stop - start] for buffer in self.pair)
                yield slice(start, stop), flat[start - rows.start : stop - rows.start], a, b


def compute_dtype(logits: Tensor) -> torch.dtype:
    """float32, but float64 for float64 logits."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def distances(x: Tensor, out: Tensor, row_max: Tensor) -> Tensor:
    """x - row_max[:, None] into `out`."""
    if x.dtype != out.dtype:  # one conversion pass is faster than mixed arithmetic
        x = out.copy_(x)
    return torch.sub(x, row_max[:, None], out=out)


def bound(d: Tensor, may_be_infinite: Tensor, temperature: float) -> None:
    """Cut -inf in `d` to the floor; where looking costs no sync, only if there is any."""
    if not d.is_cpu or may_be_infinite.any():
        d.clamp_(min=FLOOR * temperature)


def chunk_stats(x, token_ids, temperature, d, e) -> tuple[Tensor, ...]:
    """Statistics of one chunk [C, V], as the ops' six outputs; `d`, `e` are buffers [C, V]."""
    row_max = x.amax(-1).to(d.dtype)
    dead = row_max == -math.inf
    row_max = row_max.masked_fill_(dead, 0.0)
    distances(x, d, row_max)
    d_sum = row_sum(d)
    d_target = d.gather(1, token_ids[:, None])[:, 0]
    bound(d, d_sum == -math.inf, temperature)
    torch.mul(d, LOG2_E / temperature, out=e).exp2_()
    sd = row_sum(d.mul_(e))
    e_target = e.gather(1, token_ids[:, None])[:, 0]
    # The sum without the target: where the target is the maximum, 1 + others would lose digits.
    others = row_sum(e.scatter_(1, token_ids[:, None], 0.0))
    s = (others + e_target).masked_fill_(dead, 1.0)
    log_s = torch.where(d_target == 0, others, s - 1).log1p_()
    logprob = (d_target / temperature - log_s).masked_fill_(dead, -math.inf)
    entropy = (log_s - sd / s / temperature).masked_fill_(dead, 0.0)
    lse = (row_max / temperature + log_s).masked_fill_(dead, -math.inf)
    columns = x.shape[-1]
    nsc = (d_sum / columns / temperature + (math.log(columns) - log_s)).clamp_(max=0.0)
    return logprob, nsc, entropy, lse, row_max, s


def row_sum(t: Tensor) -> Tensor:
    """Sum of each row, in an order that does not depend on how many rows there are."""
    # torch splits the sum of a single row over its threads, but never a row among several.
    return t.sum(-1) if t.shape[0] > 1 else t.expand(2, -1).sum(-1)[:1]


def kept_rows(token_ids: Tensor, mask: Tensor | None) -> Tensor:
    """Boolean: the rows that have a token."""
    kept = token_ids != IGNORED
    return kept if mask is None else kept & mask
