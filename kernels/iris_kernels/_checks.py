"""Argument checks shared by the ops, and the folding of leading dimensions into rows."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

IGNORED = -100  # the token id that means "no token here", as in torch.nn.functional.cross_entropy
CPU = torch.device("cpu")
DECODING_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_logits(name: str, logits: Tensor) -> None:
    """A floating tensor with at least one column."""
    if logits.dtype not in LOGIT_DTYPES:
        raise ValueError(
            f"{name} has dtype {logits.dtype}: cast it to float32, bfloat16 or float16"
        )
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"{name} has shape {tuple(logits.shape)}: its last dimension must hold the classes"
        )


def check_per_row(name: str, tensor: Tensor, shape: torch.Size, device: torch.device) -> None:
    """One value per row: `shape` is that of the logits without their last dimension."""
    if tensor.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} but the logits have rows of shape "
            f"{tuple(shape)}: pass one value per row"
        )
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} but the logits are on {device}: move it")


def check_token_ids(token_ids: Tensor, mask: Tensor | None, logits: Tensor) -> None:
    """Integer ids and a boolean mask, one per row of `logits`."""
    check_per_row("token_ids", token_ids, logits.shape[:-1], logits.device)
    if token_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"token_ids has dtype {token_ids.dtype}: cast it with .long()")
    if mask is not None:
        check_per_row("mask", mask, logits.shape[:-1], logits.device)
        if mask.dtype != torch.bool:
            raise ValueError(f"mask has dtype {mask.dtype}: cast it with .bool(); True is kept")


def check_temperature(
    temperature: float | Tensor, logits: Tensor, *, zero_allowed: bool = False
) -> None:
    """A positive finite number, or 0 where that means greedy; a tensor's value is not looked at."""
    check_scalar("temperature", temperature, logits)
    if isinstance(temperature, Tensor) or (zero_allowed and temperature == 0):
        return
    if not 0 < temperature < math.inf:
        remedy = "pass a positive number" + (", or 0 for greedy" if zero_allowed else "")
        raise ValueError(f"temperature is {temperature}: {remedy}")


def check_scalar(name: str, value: float | Tensor, logits: Tensor) -> None:
    """A number, or a tensor of one where the logits are, or on the CPU."""
    if isinstance(value, Tensor) and (value.dim() or value.device not in (logits.device, CPU)):
        raise ValueError(
            f"{name} is a tensor of shape {tuple(value.shape)} on {value.device}: "
            f"pass a number, or a tensor without dimensions on {logits.device}"
        )


def check_vocab_size(vocab_size: int | None, columns: int) -> int:
    """The number of columns that exist: `vocab_size`, or all of them where it is None."""
    if vocab_size is None:
        return columns
    if not 0 < vocab_size <= columns:
        raise ValueError(
            f"vocab_size is {vocab_size} but the logits have {columns} columns: "
            f"pass a number from 1 to {columns}, or None"
        )
    return vocab_size


def check_ids_in_range(token_ids: Tensor, valid: Tensor, vocab_size: int) -> None:
    """Ids of kept rows lie in [0, vocab_size). Looks at the values, so only for CPU tensors."""
    wrong = valid & ((token_ids < 0) | (token_ids >= vocab_size))
    if wrong.any():
        raise ValueError(
            f"token_ids holds {int(token_ids[wrong][0])}, outside [0, {vocab_size}): "
            f"use {IGNORED} or mask for rows without a token"
        )


def last_dim_contiguous(logits: Tensor) -> Tensor:
    """`logits` itself, or a copy where its columns are not next to each other in memory."""
    return logits if logits.shape[-1] == 1 or logits.stride(-1) == 1 else logits.contiguous()


def fold_rows(tensor: Tensor) -> tuple[int, int, int, int] | None:
    """(outer, inner, outer stride, inner stride) walking all rows of (..., V), or None.

    Row r then starts at (r // inner) * outer stride + (r % inner) * inner stride. None where
    the leading dimensions do not merge into two.
    """
    dims = [(n, s) for n, s in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if n != 1]
    merged: list[tuple[int, int]] = []
    for size, stride in dims:
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return None
    (outer, outer_stride), (inner, inner_stride) = [(1, 0), (1, 0), *merged][-2:]
    return outer, inner, outer_stride, inner_stride


def row_parts(tensor: Tensor, levels: int) -> Iterator[tuple[slice, Tensor]]:
    """`tensor` (..., V) cut until each part's rows are walked by at most `levels` strides (1 or 2).

    Yields each part with the flat row numbers it holds. One part where the strides allow it, else
    the parts of each index of the first dimension; never a copy.
    """
    if tensor.dim() == 1:
        tensor = tensor[None]
    folded = fold_rows(tensor)
    if folded is not None and (levels == 2 or folded[0] == 1):
        yield slice(0, math.prod(tensor.shape[:-1])), tensor
        return
    rows_each = math.prod(tensor.shape[1:-1])
    for i, slab in enumerate(tensor):
        for rows, part in row_parts(slab, levels):
            yield slice(i * rows_each + rows.start, i * rows_each + rows.stop), part


def check_same_kind(cond: Tensor, uncond: Tensor) -> None:
    """Raise ValueError unless both have one shape, dtype and device."""
    for what in ("shape", "dtype", "device"):
        ours, theirs = getattr(cond, what), getattr(uncond, what)
        if ours != theirs:
            raise ValueError(
                f"uncond_logits has {what} {theirs} but cond_logits has {ours}: make them equal"
            )


def check_range(name: str, value: float, right: bool, remedy: str) -> None:
    """Raise ValueError naming the `remedy` unless the value is `right`."""
    if not right:
        raise ValueError(f"{name} is {value}: pass {remedy}")


def check_contiguous(
    name: str, tensor: Tensor, shape: torch.Size | None = None, like: Tensor | None = None
) -> None:
    """Rows (..., D) without gaps in a dtype of decoding; of that `shape`, and the dtype and device
    of `like`, where both are given."""
    if tensor.dtype not in DECODING_DTYPES or tensor.dim() == 0 or not tensor.is_contiguous():
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, dtype {tensor.dtype}, strides "
            f"{tensor.stride()}: pass (..., D) in float32, bfloat16 or float16, contiguous"
        )
    if like is None:
        return
    if (tensor.shape, tensor.dtype, tensor.device) != (shape, like.dtype, like.device):
        raise ValueError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}: pass "
            f"{like.dtype} of shape {tuple(shape)} on {like.device}"
        )
