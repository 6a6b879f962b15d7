"""`token_stats` in C++, for float32 and bfloat16 on a CPU: see `cpp/token_stats.cpp`."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import cpp
from .._checks import check_ids_in_range, fold_rows, row_parts

_forward = cpp.function(
    "iris_token_stats", cpp.INT, cpp.INT, *cpp.ROWS, cpp.LONG, cpp.LONG, cpp.POINTER, cpp.INT,
    cpp.POINTER, cpp.FLOAT, *[cpp.POINTER] * 6, cpp.INT,
)  # fmt: skip
_backward = cpp.function(
    "iris_token_stats_backward", None, cpp.INT, *cpp.ROWS, *cpp.ROWS, cpp.LONG, cpp.LONG, cpp.LONG,
    cpp.POINTER, cpp.INT, cpp.POINTER, cpp.FLOAT, *[cpp.POINTER] * 7, cpp.INT,
)  # fmt: skip


def rows_of(tensor: Tensor) -> tuple[int, int, int, int] | None:
    """Address, inner size, outer and inner stride of the rows of (..., V), as C++ takes them."""
    if tensor.dim() == 2:
        return tensor.data_ptr(), tensor.shape[0], 0, tensor.stride(0)
    folded = fold_rows(tensor)
    return folded and (tensor.data_ptr(), *folded[1:])


def _parts(logits: Tensor, *per_row: Tensor | None) -> Iterator[tuple]:
    """Parts of the logits whose rows C++ can walk, and what belongs to each of their rows."""
    if logits.dim() == 2:
        yield logits, per_row
        return
    for rows, part in row_parts(logits, levels=2):
        yield part, tuple(None if t is None else t[rows] for t in per_row)


def forward_cpp(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature: float,
    vocab_size: int,
    outputs: Sequence[Tensor],
) -> None:
    """The statistics of logits (..., V_held) into six tensors [R]; ids and mask [R]."""
    wide = token_ids.dtype == torch.int64
    for part, (ids, kept, *out) in _parts(logits, token_ids, mask, *outputs):
        rows = ids.numel()
        all_in_range = _forward()(
            logits.dtype == torch.bfloat16, *rows_of(part), rows, vocab_size, ids.data_ptr(), wide,
            cpp.address(kept), temperature, *[each.data_ptr() for each in out],
            cpp.threads(rows * vocab_size),
        )  # fmt: skip
        if not all_in_range:
            check_ids_in_range(token_ids, mask, vocab_size)  # raises


def backward_cpp(
    logits: Tensor,
    grad: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    saved: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    temperature: float,
    vocab_size: int,
) -> None:
    """The gradient into `grad`, contiguous or `logits` itself; all else [R]."""
    rows = None if grad is logits else grad.view(-1, grad.shape[-1])
    first = 0
    for part, (ids, kept, *per_row) in _parts(logits, token_ids, mask, *saved, *upstream):
        target = part if rows is None else rows[first : first + len(ids)]
        first += len(ids)
        _backward()(
            logits.dtype == torch.bfloat16, *rows_of(part), *rows_of(target), len(ids), vocab_size,
            logits.shape[-1], ids.data_ptr(), ids.dtype == torch.int64, cpp.address(kept),
            temperature, *map(cpp.address, per_row), cpp.threads(len(ids) * vocab_size),
        )  # fmt: skip
    if rows is None:  # autograd then detects other readers of the logits
        torch.autograd.graph.increment_version(logits)
