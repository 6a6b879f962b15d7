"""`guided_sample` in torch: both distributions stacked, in chunks of rows that stay in the cache.

Shapes: R rows, V columns, C rows of a chunk, D distributions: the conditional, and the guided one
unless it is the same.
"""

import math

import torch
from torch import Tensor

from .._inverse_cdf import likely_tokens, sample_tokens
from .._row_stats import (
    MIN_D,
    all_finite,
    chunk_rows,
    distances,
    exp_rows,
    is_one,
    row_distances,
    row_sum,
    stats_from_distances,
    sums_from_exp,
    workspace,
)
from .._threads import alone_if_busy


def mix(cond: Tensor, uncond: Tensor | None, cfg_weight: float | Tensor) -> Tensor:
    """uncond + cfg_weight (cond - uncond) in fp32; -inf if either is."""
    c = cond.float()
    if uncond is None:
        return c
    u = uncond.float()
    mixed = (c - u).mul_(cfg_weight).add_(u)
    return mixed.masked_fill_((c == -math.inf) | (u == -math.inf), -math.inf)


def flat_rows(logits: Tensor | None, vocab_size: int) -> Tensor | None:
    """Logits as [R, V], without padding; None stays None."""
    if logits is None or (logits.dim() == 2 and logits.shape[1] == vocab_size):
        return logits
    return logits.reshape(-1, logits.shape[-1])[:, :vocab_size]


def sample_torch(
    cond, uncond, uniform, threshold, cfg_weight, temperature, greedy, vocab_size
) -> tuple[Tensor, list[Tensor]]:
    """Tokens [R]; logprob, nsc, entropy and lse, each [2, R]: conditional and guided."""
    cond, uncond = flat_rows(cond, vocab_size), flat_rows(uncond, vocab_size)
    rows, most, parts = len(cond), 2 * chunk_rows(2 * vocab_size), []
    with alone_if_busy(cond):
        for start in range(0, rows, most):
            chunk = slice(start, min(start + most, rows))
            each = (None if t is None else t[chunk] for t in (cond, uncond, uniform, threshold))
            parts.append(_sample_chunk(*each, cfg_weight, temperature, greedy))
    tokens, *sums = parts[0]
    if len(parts) > 1:
        tokens, *sums = (torch.cat(each, -1) for each in zip(*parts, strict=True))
    stats = stats_from_distances(*sums, vocab_size, all_finite(sums[2]))
    return tokens, [each if len(each) == 2 else each.repeat(2, 1) for each in stats[:4]]


def _sample_chunk(cond, uncond, uniform, threshold, cfg_weight, temperature, greedy):
    """Tokens [C], and what `stats_from_distances` takes, each [D, C]."""
    (C, V), D = cond.shape, 1 if uncond is None and is_one(temperature) else 2
    d, e, cumulative = _buffers(C, V, D, cond.device)
    maximum = m_safe = _distances(cond, uncond, cfg_weight, temperature, d)
    sum_d = row_sum(d)
    if finite := all_finite(sum_d):
        exp_rows(d, e, finite)

    def exact_tokens(rows: Tensor | slice) -> Tensor:
        """Tokens of some rows, by the integer weights."""
        mixed = mix(cond[rows], None if uncond is None else uncond[rows], cfg_weight)
        kept = None if threshold is None else threshold[rows]
        return sample_tokens(mixed, uniform[rows], kept, temperature, greedy)

    if finite and threshold is None and not greedy:
        tokens, certain = likely_tokens(e[-1], uniform, cumulative)
        if not bool(certain.all()):
            (rows,) = (~certain).nonzero(as_tuple=True)
            tokens[rows] = exact_tokens(rows)
    else:
        tokens = exact_tokens(slice(None))
    column = tokens.expand(D, C)[..., None]
    if not finite:  # a logit is infinite or NaN
        found = [row_distances(cond, d[0], 1.0)]
        if D == 2:
            found.append(row_distances(mix(cond, uncond, cfg_weight), d[1], temperature))
        maximum, sum_d = (torch.stack(each) for each in list(zip(*found, strict=True))[:2])
        m_safe = maximum.masked_fill(maximum == -math.inf, 0.0)
    d_token = d.gather(-1, column)[..., 0]
    if not finite:
        exp_rows(d, e, finite)
        d.clamp_(min=MIN_D)  # e d is then 0 where d is -inf
    if not is_one(temperature):
        m_safe = torch.stack([m_safe[0], m_safe[1] / temperature])
    return tokens, *sums_from_exp(d, e, column), sum_d, d_token, m_safe, maximum


def _buffers(C: int, V: int, D: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Two of [D, C, V] float32, and one of [C, V] float64."""
    memory = workspace(((2 * D + 2) * C * V,), torch.float32, device)
    d, e = memory[2 * C * V :].view(2, D, C, V).unbind()
    return d, e, memory[: 2 * C * V].view(torch.float64).view(C, V)


def _distances(cond: Tensor, uncond: Tensor | None, cfg_weight, temperature, d: Tensor) -> Tensor:
    """d = (logits - maximum) / T of the conditional logits (T = 1) and the mixed ones into `d`
    [D, C, V], and the maximums [D, C]; what is not finite is not handled."""
    maximum = cond.amax(-1).float()
    distances(cond, d[0], maximum, 1.0)
    if len(d) == 1:
        return maximum[None]
    mixed = d[1]
    if uncond is None:
        mixed.copy_(cond)
    else:
        c, u = cond.float(), uncond.float()
        torch.sub(c, u, out=mixed).mul_(cfg_weight).add_(u)
    mixed_maximum = mixed.amax(-1)
    distances(mixed, mixed, mixed_maximum, temperature)
    return torch.stack([maximum, mixed_maximum])
