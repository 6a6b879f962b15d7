"""`token_stats` in torch, in chunks of rows that stay in the cache.

Shapes: R rows, V columns of the block, chunks [C, V].
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .._checks import ids_in_range, kept_rows, row_parts
from .._row_stats import (
    MIN_D,
    RowSums,
    chunk_rows,
    chunk_sums,
    compute_dtype,
    distances,
    exp_rows,
    is_one,
    stats_from_row_sums,
)
from .columns import Columns, merge


def flat_parts(logits: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Flat number of the first row, and logits [r, V_held], of parts that are views."""
    if logits.dim() == 2:
        yield 0, logits
        return
    for rows, part in row_parts(logits, levels=1):
        yield rows.start, part.view(-1, part.shape[-1])


def chunks(flat: Tensor, V: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Row numbers of every chunk, and two buffers [C, V]."""
    most = min(chunk_rows(V), len(flat))
    d, e = torch.empty((2, most, V), dtype=compute_dtype(flat), device=flat.device)
    for start in range(0, len(flat), most):
        rows = min(most, len(flat) - start)
        yield slice(start, start + rows), d[:rows], e[:rows]


def shifted(rows: slice, first: int) -> slice:
    """Flat row numbers of rows of a part whose first row has the number `first`."""
    return slice(rows.start + first, rows.stop + first) if first else rows


def forward_torch(
    logits, token_ids, mask, temperature, columns: Columns, outputs=None, all_here: bool = False
) -> tuple[Tensor, ...] | None:
    """Same as `forward_triton`, or returns the six outputs [R] if `outputs` is None.

    `all_here`: every token is known to be among these columns.
    """
    ids = token_ids.long() if columns.first == 0 else token_ids.long() - columns.first
    all_here, state, V = all_here or ids_in_range(ids, columns.count), columns.state, columns.count

    def sums_of(flat: Tensor, first: int) -> list[RowSums]:
        found = []
        for place, d, e in chunks(flat, V):
            x, rows = flat[place], shifted(place, first)
            x = x if x.shape[-1] == V else x[:, :V]
            x = x if columns.bias is None else x + columns.bias
            sums = chunk_sums(x, ids[rows], temperature, d, e, all_here)
            if not columns.is_first:
                before = RowSums(*state[:, rows])
                sums = merge(before, columns.first, sums, columns.count, temperature)
            if not columns.is_last:
                torch.stack(sums, out=state[:, rows])
            found.append(sums)
        return found

    found: list[RowSums] = []
    for first, flat in flat_parts(logits.detach()):
        found += sums_of(flat, first)
    # Ids that all lie among these columns include none of a row without a token.
    ignored = None if all_here and mask is None else ~kept_rows(token_ids, mask)
    if not columns.is_last:
        return None if ignored is None else state.masked_fill_(ignored, 0.0)
    sums = found[0] if len(found) == 1 else RowSums(*map(torch.cat, zip(*found, strict=True)))
    results = stats_from_row_sums(sums, columns.row_width, temperature)
    if ignored is not None:
        results = tuple(result.masked_fill(ignored, 0.0) for result in results)
    if outputs is None:
        return results
    for out, value in zip(outputs, results, strict=True):
        out.copy_(value)
    return None


def backward_torch(logits, grad, token_ids, mask, saved, upstream, temperature, columns: Columns):
    """Same as `backward_triton`."""
    row_max, _, _ = saved
    V = columns.count
    ids = token_ids.long() - columns.first
    all_here = ids_in_range(ids, V)
    column = ids if all_here else ids.clamp(0, V - 1)
    coef_token, coef_all, coef_e, coef_ed = _coefficients(saved, upstream, temperature, columns)
    ignored = None if all_here and mask is None else ~kept_rows(token_ids, mask)
    if not all_here:
        coef_token = torch.where(column == ids, coef_token, 0.0)
    row_max = row_max.masked_fill(row_max == -math.inf, 0.0)
    flat_grad = None if grad is logits else grad.view(-1, grad.shape[-1])

    def gradients_of(flat: Tensor, first: int) -> None:
        for place, d, e in chunks(flat, V):
            rows = shifted(place, first)
            out_padded = flat[place] if flat_grad is None else flat_grad[rows]
            x, out = flat[place, :V], out_padded[:, :V]
            x = x if columns.bias is None else x + columns.bias
            distances(x, d, row_max[rows], temperature)
            exp_rows(d, e)
            g = out if out.dtype == e.dtype else e
            factor = coef_e[rows, None]
            if coef_ed is not None:
                d.clamp_(min=MIN_D)
                factor = torch.addcmul(factor, d, coef_ed[rows, None], value=-1, out=d)
            if coef_all is None:
                torch.mul(e, factor, out=g)
            else:
                torch.addcmul(coef_all[rows, None], e, factor, out=g)
            g.scatter_add_(1, column[rows, None], coef_token[rows, None])
            if ignored is not None:
                g.masked_fill_(ignored[rows, None], 0.0)
            if g is not out:
                out.copy_(g)
            if out_padded.shape[-1] > V:
                out_padded[:, V:] = 0

    for first, flat in flat_parts(logits):
        gradients_of(flat, first)


def _coefficients(saved, upstream, temperature, columns: Columns):
    """Factors [R] of a row's gradient: that of the token, all, e and e d; None is 0.

    gradient_j = e_j (coef_e - coef_ed d_j) + coef_all + 1[j = a] coef_token
    """
    row_max, sum_exp, entropy = saved
    scaled = (g is None or is_one(temperature) for g in upstream)
    coef_token, coef_all, coef_entropy, coef_lse = (
        g if done else g / temperature for g, done in zip(upstream, scaled, strict=True)
    )
    # p_j = e_j / sum_exp and log p_j = d_j - log sum_exp
    coef_e = torch.zeros_like(row_max) if coef_lse is None else coef_lse
    for coef in (coef_token, coef_all):
        coef_e = coef_e if coef is None else coef_e - coef
    if coef_entropy is not None:
        coef_e = torch.addcmul(coef_e, coef_entropy, sum_exp.log() - entropy)
        coef_entropy = coef_entropy / sum_exp
    return (
        torch.zeros_like(row_max) if coef_token is None else coef_token,
        None if coef_all is None else coef_all / columns.row_width,
        coef_e / sum_exp,
        coef_entropy,
    )
