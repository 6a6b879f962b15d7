"""`guided_sample` in torch: chunks of rows that stay in the cache.

Shapes: R rows, V columns, chunk C rows.
"""

import math

import torch
from torch import Tensor

from .._inverse_cdf import sample_tokens
from .._row_stats import CHUNK_ELEMENTS, chunk_sums, stats_from_row_sums
from .outputs import empty_outputs

# Sampling holds more buffers than the statistics, some of them int64.
SAMPLE_CHUNK_ELEMENTS = CHUNK_ELEMENTS // 4


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
    return None if logits is None else logits.reshape(-1, logits.shape[-1])[:, :vocab_size]


def sample_torch(cond, uncond, uniform, threshold, cfg_weight, temperature, greedy, vocab_size):
    """Same as `sample_triton`, in chunks of rows."""
    cond, uncond = flat_rows(cond, vocab_size), flat_rows(uncond, vocab_size)
    rows = cond.shape[0]
    token_ids, conditional, guided = empty_outputs(cond, (rows,))
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
