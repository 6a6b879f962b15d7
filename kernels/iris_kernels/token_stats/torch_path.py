"""`token_stats` in torch: chunks of rows that stay in the cache, over two reused buffers.

Shapes: R rows, V columns of the block, chunks [C, V].
"""

import math

import torch
from torch import Tensor

from .._checks import kept_rows, row_parts
from .._row_stats import (
    CHUNK_ELEMENTS,
    MIN_D,
    RowSums,
    any_row,
    chunk_sums,
    compute_dtype,
    distances,
    stats_from_row_sums,
)
from .columns import Columns, merge


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


def forward_torch(logits, token_ids, mask, temperature, columns: Columns, outputs) -> None:
    """Same as `forward_triton`."""
    ids = token_ids.long() - columns.first
    state = columns.state
    if state is None:
        state = logits.new_empty((5, ids.numel()), dtype=compute_dtype(logits))
    for rows, x, d, p in Buffers(logits, columns.count).chunks(logits):
        x = x[:, : columns.count] if columns.bias is None else x[:, : columns.count] + columns.bias
        sums = chunk_sums(x, ids[rows], temperature, d, p)
        if not columns.is_first:
            sums = merge(RowSums(*state[:, rows]), columns.first, sums, columns.count, temperature)
        torch.stack(sums, out=state[:, rows])
    ignored = ~kept_rows(token_ids, mask)
    if columns.is_last:
        results = stats_from_row_sums(RowSums(*state), columns.row_width, temperature)
        for out, value in zip(outputs, results, strict=True):
            out.copy_(value.masked_fill_(ignored, 0.0))
    else:
        state.masked_fill_(ignored, 0.0)


def backward_torch(logits, grad, token_ids, mask, saved, upstream, temperature, columns: Columns):
    """Same as `backward_triton`."""
    row_max, sum_exp, entropy = saved
    V = columns.count
    kept = kept_rows(token_ids, mask)
    fully_masked = row_max == -math.inf
    row_max = row_max.masked_fill(fully_masked, 0.0)
    ids = token_ids.long() - columns.first
    has_token = (ids >= 0) & (ids < V)
    ids = ids.clamp_(0, V - 1)
    zero = torch.zeros_like(row_max)
    coef_token, coef_all, coef_entropy, coef_lse = (
        zero if g is None else torch.where(kept, g / temperature, 0.0) for g in upstream
    )
    # gradient_j = p_j (coef_p - coef_entropy d_j) + coef_all + 1[j = a] coef_token,
    # with log p_j = d_j - log sum_exp
    coef_p = coef_lse - coef_token - coef_all + coef_entropy * (sum_exp.log() - entropy)
    coef_all = coef_all / columns.row_width
    coef_token = torch.where(has_token, coef_token, 0.0)
    flat_grad = None if grad is logits else grad.view(-1, grad.shape[-1])
    for rows, part, d, p in Buffers(logits, V).chunks(logits):
        out_padded = part if flat_grad is None else flat_grad[rows]
        out = out_padded[:, :V]
        x = part[:, :V] if columns.bias is None else part[:, :V] + columns.bias
        distances(x, d, row_max[rows], temperature)
        torch.softmax(d, -1, out=p)
        block_masked = fully_masked[rows]
        if columns.row_width != V:  # the softmax is over these columns only
            d_max = d.amax(-1)
            p *= (d_max.exp() / p.amax(-1) / sum_exp[rows])[:, None]
            block_masked = d_max == -math.inf
        if any_row(block_masked):
            p.masked_fill_(block_masked[:, None], 0.0)
        factor = coef_p[rows, None]
        if upstream[2] is not None:
            factor = d.clamp_(min=MIN_D).mul_(-coef_entropy[rows, None]).add_(factor)
        g = out if out.dtype == p.dtype else p
        if upstream[1] is not None:
            torch.addcmul(coef_all[rows, None], p, factor, out=g)
        else:
            torch.mul(p, factor, out=g)
        at_token = g.gather(1, ids[rows, None]).add_(coef_token[rows, None])
        g.scatter_(1, ids[rows, None], at_token)
        if any_row(~kept[rows]):
            g.masked_fill_(~kept[rows, None], 0.0)
        if g is not out:
            out.copy_(g)
        out_padded[:, V:] = 0
