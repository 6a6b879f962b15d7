"""Forward and backward of `linear_token_stats`, one tile of logits after the other.

Shapes: R rows, D hidden width, V columns (classes), tiles [C, B].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .._backend import uses_triton
from .._row_stats import CHUNK_ELEMENTS, compute_dtype
from .._scalars import to_kernel_argument
from ..token_stats import (
    Columns,
    backward_torch,
    backward_triton,
    forward_torch,
    forward_triton,
)

TILE_ELEMENTS = 1 << 22  # on a GPU: 17 MB of fp32 logits, which fit the L2 cache
SUM_ELEMENTS = 1 << 22  # of an fp32 sum over tiles: 17 MB, on a CPU as much for its summand
MIN_TILE_SIDE = 128  # below that, a tile's matrix product is slow


def tile_shape(R: int, V: int, D: int, on_cpu: bool, *, sum_columns: bool = False):
    """Rows and columns of a tile; the sum over tiles is [rows, D], or [columns, D]."""
    elements = CHUNK_ELEMENTS if on_cpu else TILE_ELEMENTS
    summed = min(max(MIN_TILE_SIDE, SUM_ELEMENTS // D), 512 if on_cpu else 2048)
    if sum_columns:
        return min(elements // summed, max(R, 1)), min(summed, V)
    rows, columns = summed, elements // min(summed, max(R, 1))
    if columns >= V:  # few classes: take more rows
        rows = min(max(rows, elements // V), max(MIN_TILE_SIDE, SUM_ELEMENTS // D))
    return min(rows, max(R, 1)), min(columns, V)


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated and returned in fp32 (fp64 for fp64 inputs)."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the dtype of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:  # the product adds: half the traffic of a temporary, and none of its memory
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += matmul_fp32(a, b)


@dataclass(frozen=True)
class _Head:
    """The flattened arguments of forward and backward."""

    hidden: Tensor  # [R, D]
    weight: Tensor  # [V, D], without padding
    bias: Tensor | None  # [V]
    token_ids: Tensor  # [R]
    mask: Tensor | None  # [R]
    temperature: float | Tensor

    def columns(self, start: int, stop: int, state: Tensor | None = None) -> Columns:
        """The tile's columns `start` to `stop`, for the kernels."""
        V = self.weight.shape[0]
        bias = None if self.bias is None else self.bias[start:stop]
        return Columns(stop - start, start, V, bias, state, start == 0, stop == V)

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Token ids and mask of a chunk."""
        return self.token_ids[start:stop], None if self.mask is None else self.mask[start:stop]


def flatten(hidden, weight, bias, token_ids, mask, temperature, vocab_size) -> _Head:
    """The arguments of `linear_token_stats` as matrices and vectors, without padding."""
    return _Head(
        hidden.reshape(-1, hidden.shape[-1]),
        weight[:vocab_size],
        None if bias is None else bias[:vocab_size].contiguous(),
        token_ids.reshape(-1).contiguous(),
        None if mask is None else mask.reshape(-1).contiguous(),
        to_kernel_argument(temperature),
    )


def _spans(count: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, count)) for start in range(0, count, step)]


# --- Forward and backward over tiles --------------------------------------------------------------


def forward_tiles(head: _Head, outputs: list[Tensor]) -> None:
    """Fill the six flat `outputs` [R] of token_stats."""
    run = forward_triton if uses_triton(head.hidden) else forward_torch
    (R, D), V = head.hidden.shape, head.weight.shape[0]
    C, B = tile_shape(R, V, D, head.hidden.is_cpu)
    for start, stop in _spans(R, C):
        state = outputs[0].new_empty(5, stop - start)
        for first, last in _spans(V, B):
            logits = matmul_fp32(head.hidden[start:stop], head.weight[first:last].t())
            run(
                logits, *head.rows(start, stop), head.temperature,
                head.columns(first, last, state), [out[start:stop] for out in outputs],
            )  # fmt: skip


def _gradient_tile(head, saved, upstream, rows, columns) -> Tensor:
    """The gradient of a tile of logits, in the dtype of the head."""
    (start, stop), (first, last) = rows, columns
    run = backward_triton if uses_triton(head.hidden) else backward_torch
    logits = matmul_fp32(head.hidden[start:stop], head.weight[first:last].t())
    same_dtype = head.hidden.dtype == logits.dtype
    gradient = logits if same_dtype else torch.empty_like(logits, dtype=head.hidden.dtype)
    run(
        logits, gradient, *head.rows(start, stop), [t[start:stop] for t in saved],
        [None if g is None else g[start:stop] for g in upstream], head.temperature,
        head.columns(first, last),
    )  # fmt: skip
    return gradient


def backward_tiles(head: _Head, saved, upstream, d_hidden, d_weight, d_bias) -> None:
    """Add to those gradients [R, D], [V, D], [V] that are not None; they must be zeros."""
    full_precision = head.hidden.dtype == compute_dtype(head.hidden)
    if d_hidden is not None or d_bias is not None or (full_precision and d_weight is not None):
        d_w = d_weight if full_precision else None
        _backward_by_rows(head, saved, upstream, d_hidden, d_w, d_bias)
    if d_weight is not None and not full_precision:
        _backward_by_columns(head, saved, upstream, d_weight)


def _backward_by_rows(head: _Head, saved, upstream, d_hidden, d_weight, d_bias) -> None:
    """All gradients, one row of tiles at a time; that of the weight only if it can be accumulated
    in its own dtype."""
    (R, D), V = head.hidden.shape, head.weight.shape[0]
    full_precision = head.hidden.dtype == compute_dtype(head.hidden)
    C, B = tile_shape(R, V, D, head.hidden.is_cpu)
    for rows in _spans(R, C):
        h = head.hidden[slice(*rows)]
        d_h = None if d_hidden is None else _accumulator(d_hidden[slice(*rows)], full_precision)
        for columns in _spans(V, B):
            block = slice(*columns)
            g = _gradient_tile(head, saved, upstream, rows, columns)
            if d_h is not None:
                add_matmul(d_h, g, head.weight[block])
            if d_weight is not None:
                add_matmul(d_weight[block], g.t(), h)
            if d_bias is not None:
                d_bias[block] += g.sum(0, dtype=d_bias.dtype)
        if d_h is not None and not full_precision:
            d_hidden[slice(*rows)] = d_h


def _backward_by_columns(head: _Head, saved, upstream, d_weight) -> None:
    """The gradient of a half-precision weight, accumulated in fp32 one block of columns at a time.
    Tiles are computed again: by rows, the fp32 sum would be as large as the weight."""
    (R, D), V = head.hidden.shape, head.weight.shape[0]
    C, B = tile_shape(R, V, D, head.hidden.is_cpu, sum_columns=True)
    for columns in _spans(V, B):
        d_w = _accumulator(d_weight[slice(*columns)], full_precision=False)
        for rows in _spans(R, C):
            g = _gradient_tile(head, saved, upstream, rows, columns)
            add_matmul(d_w, g.t(), head.hidden[slice(*rows)])
        d_weight[slice(*columns)] = d_w


def _accumulator(gradient: Tensor, full_precision: bool) -> Tensor:
    """Where `gradient` is accumulated: itself, or an fp32 tensor."""
    return gradient if full_precision else torch.zeros_like(gradient, dtype=torch.float32)
