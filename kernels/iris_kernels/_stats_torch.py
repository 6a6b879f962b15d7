"""`token_stats` in torch: chunks of rows that stay in the cache, over two reused buffers.

Shapes: R rows, V columns at hand, chunks [C, V].
"""

import math

import torch

from ._row_math import (
    FLOOR,
    Buffers,
    Columns,
    RowSums,
    any_row,
    chunk_sums,
    compute_dtype,
    distances,
    finish_rows,
    kept_rows,
    merge,
)


def forward_torch(logits, token_ids, mask, temperature, columns: Columns, outputs) -> None:
    """As `forward_triton`."""
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
    if columns.is_last:
        gone = ~kept_rows(token_ids, mask)
        results = finish_rows(RowSums(*state), columns.whole, temperature)
        for out, value in zip(outputs, results, strict=True):
            out.copy_(value.masked_fill_(gone, 0.0))
    else:
        state.masked_fill_(~kept_rows(token_ids, mask), 0.0)


def backward_torch(logits, grad, token_ids, mask, saved, upstream, temperature, columns: Columns):
    """As `backward_triton`."""
    row_max, sum_exp, entropy = saved
    V = columns.count
    kept = kept_rows(token_ids, mask)
    dead = row_max == -math.inf
    row_max = row_max.masked_fill(dead, 0.0)
    ids = token_ids.long() - columns.first
    here = (ids >= 0) & (ids < V)
    ids = ids.clamp_(0, V - 1)
    zero = torch.zeros_like(row_max)
    on_target, on_all, on_entropy, on_lse = (
        zero if g is None else torch.where(kept, g / temperature, 0.0) for g in upstream
    )
    # gradient_j = p_j (on_p - on_entropy d_j) + on_all + 1[j = a] on_target; log p_j = d_j - log s
    on_p = on_lse - on_target - on_all + on_entropy * (sum_exp.log() - entropy)
    on_all = on_all / columns.whole
    on_target = torch.where(here, on_target, 0.0)
    flat_grad = None if grad is logits else grad.view(-1, grad.shape[-1])
    for rows, part, d, p in Buffers(logits, V).chunks(logits):
        held = part if flat_grad is None else flat_grad[rows]
        out = held[:, :V]
        x = part[:, :V] if columns.bias is None else part[:, :V] + columns.bias
        distances(x, d, row_max[rows], temperature)
        torch.softmax(d, -1, out=p)
        empty = dead[rows]
        if columns.whole != V:  # softmax is over these columns alone
            best = d.amax(-1)
            p *= (best.exp() / p.amax(-1) / sum_exp[rows])[:, None]
            empty = best == -math.inf
        if any_row(empty):
            p.masked_fill_(empty[:, None], 0.0)
        factor = on_p[rows, None]
        if upstream[2] is not None:
            factor = d.clamp_(min=FLOOR).mul_(-on_entropy[rows, None]).add_(factor)
        g = out if out.dtype == p.dtype else p
        if upstream[1] is not None:
            torch.addcmul(on_all[rows, None], p, factor, out=g)
        else:
            torch.mul(p, factor, out=g)
        at_target = g.gather(1, ids[rows, None]).add_(on_target[rows, None])
        g.scatter_(1, ids[rows, None], at_target)
        if any_row(~kept[rows]):
            g.masked_fill_(~kept[rows, None], 0.0)
        if g is not out:
            out.copy_(g)
        held[:, V:] = 0
