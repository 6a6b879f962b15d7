"""`guided_sample` in torch, in chunks of rows.

Shapes: R rows, V columns, C rows of a chunk.
"""

import math

import torch
from torch import Tensor

from .._inverse_cdf import sample_tokens
from .._row_stats import chunk_rows, chunk_stats, is_one
from .outputs import Recording


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
    cond, uncond, uniform, threshold, cfg_weight, temperature, greedy, vocab_size,
    recording: Recording | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Same as `sample_triton`."""
    cond, uncond = flat_rows(cond, vocab_size), flat_rows(uncond, vocab_size)
    rows, most = len(cond), chunk_rows(vocab_size)
    if recording is not None:
        uniform = uniform.view(rows, -1).index_select(1, recording.step)[:, 0]
    parts = []
    for start in range(0, rows, most):
        chunk = slice(start, start + most)
        each = (None if t is None else t[chunk] for t in (cond, uncond, uniform, threshold))
        parts.append(_sample_chunk(*each, cfg_weight, temperature, greedy))
    tokens, conditional, guided = (torch.cat(each, -1) for each in zip(*parts, strict=True))
    if recording is not None:
        values = (tokens, conditional, guided)
        for buffer, value in zip(recording[1:], values, strict=True):
            buffer.index_copy_(-1, recording.step, value[..., None])
    return tokens, conditional, guided


def _sample_chunk(cond, uncond, uniform, threshold, cfg_weight, temperature, greedy):
    """Tokens [C], and the statistics of both distributions, each [4, C]."""
    mixed = mix(cond, uncond, cfg_weight)
    tokens = sample_tokens(mixed, uniform, threshold, temperature, greedy)
    conditional = torch.stack(chunk_stats(cond, tokens, 1.0)[:4])
    if uncond is None and is_one(temperature):
        return tokens, conditional, conditional
    return tokens, conditional, torch.stack(chunk_stats(mixed, tokens, temperature)[:4])
