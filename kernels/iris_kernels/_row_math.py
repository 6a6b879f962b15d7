"""The arithmetic of one row of logits, once for Triton and once for torch.

Every op that reports `token_stats` computes them from d_j = x_j - m, where m is the row's maximum,
or 0 where no logit is finite: the size of the logits then costs no precision. With e_j = exp(d_j/T)
and a the token:

    others = sum e_j over j != a,   s = others + e_a,   log s = log1p(others) where d_a = 0
    logprob = d_a/T - log s         entropy = log s - sum(e d) / (s T)
    lse = m/T + log s               nsc = mean(d)/T - log s + log V

Where the token is the maximum, log1p(others) keeps the digits of a logprob near 0 that 1 + others
would lose. Distances are cut at FLOOR * T wherever they are multiplied by e, as -inf * 0 is NaN.

A row may come in blocks of columns, one after the other or on several ranks. What a block leaves
behind are its `RowSums`, which merge exactly.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._backend import constant, jit, tl
from ._checks import IGNORED, row_parts

LOG2_E = math.log2(math.e)
# exp(-1000) is 0 in float32 and in float64.
FLOOR = -1000.0
_LOG2_E, _FLOOR = constant(LOG2_E), constant(FLOOR)
CHUNK_ELEMENTS = 1 << 20  # torch path: 4 MB of fp32 a buffer, which stays in cache


# --- Triton ---------------------------------------------------------------------------------------


@jit
def scalar(value, IN_MEMORY: tl.constexpr):
    """A run-time number in fp32, passed by value or in memory."""
    if IN_MEMORY:
        return tl.load(value).to(tl.float32)
    return tl.zeros([], tl.float32) + value


@jit
def scalars(T):
    """log2(e)/T, 1/T and FLOOR * T, rounded as torch rounds them."""
    return tl.div_rn(tl.full([], _LOG2_E, tl.float32), T), 1.0 / T, _FLOOR * T


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


# --- Blocks of columns ----------------------------------------------------------------------------


class RowSums(NamedTuple):
    """What some columns of each row add up to, with d = (x - maximum) / T; [R] each.

    A maximum of -inf stands for 0 in d. The first two leave the token out; its logit is NaN where
    it is not among the columns. In memory: the rows of one [5, R] tensor.
    """

    others: Tensor  # sum exp(d)
    sd: Tensor  # sum exp(d) d
    d_sum: Tensor  # sum d
    maximum: Tensor
    x_token: Tensor


@dataclass(frozen=True)
class Columns:
    """Which columns of the whole rows the logits at hand are, and what to add to them."""

    count: int  # how many exist; those after them are padding
    first: int = 0
    total: int = 0  # of the whole row; 0: the same as `count`
    bias: Tensor | None = None  # [count]
    state: Tensor | None = None  # [5, R], RowSums of the columns so far; None: the row is whole
    is_first: bool = True  # nothing is in `state` yet
    is_last: bool = True  # the statistics follow; else `state` is brought up to date

    @property
    def whole(self) -> int:
        """The number of columns of the whole row."""
        return self.total or self.count


# --- Numbers that stay run-time values ------------------------------------------------------------


def run_time(value: float | Tensor, like: Tensor) -> Tensor:
    """A number as the tensor that an op takes for it: torch.compile makes floats constants.

    In eager mode it lies on the CPU, so that a kernel gets it by value; in a compiled graph, or
    where the user passed a tensor, where the logits are, and the kernel loads it.
    """
    if isinstance(value, Tensor):
        return value.detach()
    if torch.compiler.is_compiling():
        return like.new_ones((), dtype=torch.float32) * value
    return torch.tensor(value, dtype=torch.float64)


def number(value: Tensor) -> float | Tensor:
    """What the launchers take for it: the number, or the tensor where reading it would sync."""
    return float(value) if value.is_cpu else value


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


def distances(x: Tensor, out: Tensor, row_max: Tensor, temperature: float | Tensor) -> Tensor:
    """(x - row_max[:, None]) / temperature into `out`."""
    if x.dtype != out.dtype:  # one conversion pass is faster than mixed arithmetic
        x = out.copy_(x)
    torch.sub(x, row_max[:, None], out=out)
    return out if isinstance(temperature, float) and temperature == 1 else out.div_(temperature)


def any_row(rows: Tensor) -> bool:
    """Whether any of the boolean `rows` is set; on a GPU, where looking costs a sync, assume so."""
    return not rows.is_cpu or bool(rows.any())


def chunk_sums(x, token_ids, temperature, d, p) -> RowSums:
    """Sums of a chunk [C, V]; `token_ids` [C] may lie outside [0, V); `d`, `p` are buffers [C, V].

    Built on torch.softmax, which works row by row: torch's exponentials themselves round an element
    differently where it falls into the tail of a vector loop, and a row's bits would then depend on
    the rows before it.
    """
    last = x.shape[-1] - 1
    column = token_ids.clamp(0, last)[:, None]
    elsewhere = column[:, 0] != token_ids
    x_token = x.gather(1, column)[:, 0].to(d.dtype)
    maximum = x.amax(-1).to(d.dtype)
    dead = maximum == -math.inf
    distances(x, d, maximum.masked_fill(dead, 0.0), temperature)
    d_sum = _row_sum(d)
    if any_row(d_sum == -math.inf):
        d.clamp_(min=FLOOR)
    torch.softmax(d, -1, out=p)
    s = p.amax(-1).reciprocal_().masked_fill_(dead, 0.0)  # exp(d) is 1 at the maximum
    if any_row(elsewhere):
        p.scatter_(1, column, p.gather(1, column).masked_fill_(~elsewhere[:, None], 0.0))
        x_token.masked_fill_(elsewhere, math.nan)
    else:
        p.scatter_(1, column, 0.0)
    others = _row_sum(p)
    return RowSums(others.mul_(s), _row_sum(d.mul_(p)).mul_(s), d_sum, maximum, x_token)


def merge(a: RowSums, columns_a: int, b: RowSums, columns_b: int, temperature) -> RowSums:
    """The sums of both blocks together, relative to the larger maximum."""
    maximum = torch.maximum(a.maximum, b.maximum)
    reference = maximum.masked_fill(maximum == -math.inf, 0.0)
    moved = []
    for sums, columns in ((a, columns_a), (b, columns_b)):
        shift = (sums.maximum - reference) / temperature
        shift = shift.masked_fill_(sums.maximum == -math.inf, 0.0).clamp_(min=FLOOR)
        factor = shift.exp()
        sd = (sums.sd + shift * sums.others) * factor
        moved.append((sums.others * factor, sd, sums.d_sum + shift * columns))
    others, sd, d_sum = (x + y for x, y in zip(*moved, strict=True))
    x_token = torch.where(a.x_token.isnan(), b.x_token, a.x_token)
    return RowSums(others, sd, d_sum, maximum, x_token)


def finish_rows(sums: RowSums, V: int, temperature) -> tuple[Tensor, ...]:
    """logprob, nsc, entropy, lse, maximum and sum e of whole rows of V columns."""
    others, sd, d_sum, maximum, x_token = sums
    dead = (maximum == -math.inf) & (d_sum == -math.inf)  # all -inf: no distribution
    reference = maximum.masked_fill(maximum == -math.inf, 0.0)
    d_token = (x_token - reference) / temperature
    e_token = d_token.exp()
    s = others + e_token
    log_s = torch.where(d_token == 0, _log_one_plus(others), s.log())
    entropy = log_s - (sd + e_token * d_token.clamp(min=FLOOR)) / s
    nsc = d_sum / V + (math.log(V) - log_s)
    return (
        (d_token - log_s).masked_fill_(dead, -math.inf),
        nsc.clamp_(max=0.0).masked_fill_(dead, -math.inf),
        entropy.masked_fill_(dead, 0.0),
        (reference / temperature + log_s).masked_fill_(dead, -math.inf),
        maximum,
        s.masked_fill_(dead, 1.0),
    )


def _row_sum(t: Tensor) -> Tensor:
    """Sum of each row, in an order that does not depend on how many rows there are."""
    # torch splits the sum of a single row over its threads, but never a row among several.
    return t.sum(-1) if t.shape[0] > 1 else t.expand(2, -1).sum(-1)[:1]


def _log_one_plus(y: Tensor) -> Tensor:
    """log(1 + y), y >= 0, to full relative precision; torch.log1p has the flaw of torch.exp2."""
    u = 1 + y.double()
    return torch.where(u == 1, y.double(), u.log() * (y / (u - 1))).to(y.dtype)


def kept_rows(token_ids: Tensor, mask: Tensor | None) -> Tensor:
    """Boolean: the rows that have a token."""
    kept = token_ids != IGNORED
    return kept if mask is None else kept & mask
