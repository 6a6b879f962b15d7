"""Argument checks shared by the ops, and how leading dimensions are folded into rows."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

IGNORE_INDEX = -100  # id of a row without a token, as in torch.nn.functional.cross_entropy
CPU = torch.device("cpu")
DECODING_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_logits(name: str, logits: Tensor) -> None:
    """Raise ValueError unless `logits` is floating point with at least one column."""
    if logits.dtype not in LOGIT_DTYPES:
        raise ValueError(
            f"{name} has dtype {logits.dtype}: cast it to float32, bfloat16 or float16"
        )
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"{name} has shape {tuple(logits.shape)}: its last dimension must hold the classes"
        )


def check_per_row(name: str, tensor: Tensor, shape: torch.Size, device: torch.device) -> None:
    """Raise ValueError unless `tensor` has one value per row; `shape` is that of the rows."""
    if tensor.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} but the logits have rows of shape "
            f"{tuple(shape)}: pass one value per row"
        )
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} but the logits are on {device}: move it")


def check_token_ids(token_ids: Tensor, mask: Tensor | None, logits: Tensor) -> None:
    """Raise ValueError unless ids are integer, the mask boolean, both one per row of `logits`."""
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
    """Raise ValueError unless positive and finite, or 0 if allowed; tensors are not read."""
    check_scalar("temperature", temperature, logits)
    if isinstance(temperature, Tensor) or (zero_allowed and temperature == 0):
        return
    if not 0 < temperature < math.inf:
        remedy = "pass a positive number" + (", or 0 for greedy" if zero_allowed else "")
        raise ValueError(f"temperature is {temperature}: {remedy}")


def check_scalar(name: str, value: float | Tensor, logits: Tensor) -> None:
    """Raise ValueError unless a number, or a 0-dim tensor on the CPU or the logits' device."""
    if isinstance(value, Tensor) and (value.dim() or value.device not in (logits.device, CPU)):
        raise ValueError(
            f"{name} is a tensor of shape {tuple(value.shape)} on {value.device}: "
            f"pass a number, or a 0-dim tensor on {logits.device}"
        )


def check_vocab_size(vocab_size: int | None, columns: int) -> int:
    """The number of columns that are not padding: `vocab_size`, or all if it is None."""
    if vocab_size is None:
        return columns
    if not 0 < vocab_size <= columns:
        raise ValueError(
            f"vocab_size is {vocab_size} but the logits have {columns} columns: "
            f"pass a number from 1 to {columns}, or None"
        )
    return vocab_size


def ids_in_range(token_ids: Tensor, vocab_size: int) -> bool:
    """Whether every id is in [0, vocab_size), so that every row has a token; False on a GPU, where
    reading it costs a sync."""
    if not token_ids.is_cpu or not token_ids.numel():
        return False
    lowest, highest = torch.aminmax(token_ids)
    return int(lowest) >= 0 and int(highest) < vocab_size


def check_ids_in_range(token_ids: Tensor, mask: Tensor | None, vocab_size: int) -> bool:
    """Raise ValueError unless ids of rows that are kept are in [0, vocab_size), and return whether
    all ids are. CPU only: reads values."""
    if not token_ids.is_cpu:
        return False
    if ids_in_range(token_ids, vocab_size):
        return True
    wrong = kept_rows(token_ids, mask) & ((token_ids < 0) | (token_ids >= vocab_size))
    if wrong.any():
        raise ValueError(
            f"token_ids holds {int(token_ids[wrong][0])}, outside [0, {vocab_size}): "
            f"use {IGNORE_INDEX} or mask for rows without a token"
        )
    return False


def kept_rows(token_ids: Tensor, mask: Tensor | None) -> Tensor:
    """Boolean: the rows that have a token."""
    kept = token_ids != IGNORE_INDEX
    return kept if mask is None else kept & mask


def last_dim_contiguous(logits: Tensor) -> Tensor:
    """`logits` itself, or a copy if its columns are not adjacent in memory."""
    return logits if logits.shape[-1] == 1 or logits.stride(-1) == 1 else logits.contiguous()


def fold_rows(tensor: Tensor) -> tuple[int, int, int, int] | None:
    """(outer, inner, outer stride, inner stride) walking all rows of (..., V), or None.

    Row r then starts at (r // inner) * outer stride + (r % inner) * inner stride. None if the
    leading dimensions do not merge into two.
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
    """Split `tensor` (..., V) into parts whose rows have at most `levels` strides (1 or 2).

    Yields the flat row numbers of each part, and the part. One part if the strides allow it, else
    the parts of each index of the first dimension; never a copy.
    """
    if tensor.dim() == 1:
        tensor = tensor[None]
    folded = fold_rows(tensor)
    if folded is not None and (levels == 2 or folded[0] == 1):
        yield slice(0, math.prod(tensor.shape[:-1])), tensor
        return
    rows_per_index = math.prod(tensor.shape[1:-1])
    for i, slab in enumerate(tensor):
        first = i * rows_per_index
        for rows, part in row_parts(slab, levels):
            yield slice(first + rows.start, first + rows.stop), part


def check_values_in_range(name: str, values: Tensor, low: int, high: int) -> None:
    """Raise ValueError unless all integers are in [low, high]. CPU only: reads values."""
    if not values.is_cpu or not values.numel():
        return
    lowest, highest = torch.aminmax(values)
    if int(lowest) < low or int(highest) > high:
        raise ValueError(f"{name} is {values.tolist()}: all must lie in [{low}, {high}]")


def check_same_layout(cond: Tensor, uncond: Tensor) -> None:
    """Raise ValueError unless both have the same shape, dtype and device."""
    for attribute in ("shape", "dtype", "device"):
        expected, found = getattr(cond, attribute), getattr(uncond, attribute)
        if expected != found:
            raise ValueError(
                f"uncond_logits has {attribute} {found} but cond_logits has {expected}: "
                "make them equal"
            )


def check_range(name: str, value: float, in_range: bool, remedy: str) -> None:
    """Raise ValueError with the `remedy` unless the value is `in_range`."""
    if not in_range:
        raise ValueError(f"{name} is {value}: pass {remedy}")


def check_truncation(top_k: int, top_p: float, min_p: float) -> None:
    """Raise ValueError unless each is in the range of Hugging Face's generate."""
    check_range("top_k", top_k, top_k >= 0, "0 for all, or a positive integer")
    check_range("top_p", top_p, 0 < top_p <= 1, "a number in (0, 1]")
    check_range("min_p", min_p, 0 <= min_p <= 1, "a number in [0, 1]")


def check_contiguous(
    name: str,
    tensor: Tensor,
    shape: torch.Size | None = None,
    like: Tensor | None = None,
    dtype: torch.dtype | None = None,
    dtypes: tuple[torch.dtype, ...] = DECODING_DTYPES,
) -> None:
    """Raise ValueError unless `tensor` is (..., D), contiguous, in one of `dtypes`; and, if `like`
    is given, of `shape`, the device of `like`, and `dtype` or that of `like`."""
    if tensor.dtype not in dtypes or tensor.dim() == 0 or not tensor.is_contiguous():
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, dtype {tensor.dtype}, strides "
            f"{tensor.stride()}: pass (..., D) in float32, bfloat16 or float16, contiguous"
        )
    if like is None:
        return
    dtype = like.dtype if dtype is None else dtype
    if (tensor.shape, tensor.dtype, tensor.device) != (shape, dtype, like.device):
        raise ValueError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}: pass "
            f"{dtype} of shape {tuple(shape)} on {like.device}"
        )


def check_rotation(
    expected: dict[str, tuple[Tensor, tuple[int, ...], tuple[torch.dtype, ...]]],
) -> None:
    """Raise ValueError unless each tensor has its shape, one of its dtypes, the device of the first
    one and a contiguous last dimension, and `cos` and `sin` have equal strides."""
    device = next(iter(expected.values()))[0].device
    for name, (tensor, shape, dtypes) in expected.items():
        if tensor.shape != shape or tensor.dtype not in dtypes or tensor.device != device:
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}: pass "
                f"{' or '.join(map(str, dtypes))} of shape {shape} on {device}"
            )
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} has strides {tensor.stride()}: its last dimension must be contiguous"
            )
    cos, sin = expected["cos"][0], expected["sin"][0]
    if cos.stride(0) != sin.stride(0):
        raise ValueError(f"cos has strides {cos.stride()} but sin {sin.stride()}: make them equal")
