"""Argument checks of decode_attention and rope_append_attention.

Shapes: as in op.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.cuda import get_device_capability as capability

from .._checks import DECODING_DTYPES, check_values_in_range
from .._fp8 import FP8


class NewToken(NamedTuple):
    """Key and value (B, Hkv, Dh) before rotation, and the tables (P, Dh/2) of all positions."""

    key: Tensor
    value: Tensor
    cos: Tensor
    sin: Tensor


def check_values(
    keys: Tensor, lengths: Tensor, prefix: tuple[Tensor | None, ...], new: NewToken | None
) -> None:
    """Raise ValueError unless lengths, prefixes and positions exist. CPU only: reads values."""
    if not lengths.is_cpu:
        return
    prefix_keys, _, prefix_lengths, prefix_index = prefix
    check_values_in_range("lengths", lengths, 0, keys.shape[2] - (new is not None))
    if prefix_keys is not None:
        check_values_in_range("prefix_lengths", prefix_lengths, 0, prefix_keys.shape[2])
        check_values_in_range("prefix_index", prefix_index, -1, prefix_keys.shape[0] - 1)
    if new is not None:
        last = len(new.cos) - 1
        check_values_in_range("position", positions(lengths, prefix), 0, last)


def positions(lengths: Tensor, prefix: tuple[Tensor | None, ...]) -> Tensor:
    """The position [B] of the new token of each sequence."""
    _, _, prefix_lengths, prefix_index = prefix
    if prefix_index is None:
        return lengths
    return lengths + prefix_lengths.where(prefix_index >= 0, 0)


def check_new_token(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, kv_heads: int
) -> None:
    """Raise ValueError unless these have the shapes, dtypes and strides that the op takes."""
    B, _, width = query.shape
    if width % 2:
        raise ValueError(f"query has shape {tuple(query.shape)}: pass (B, H, Dh), Dh even")
    device, heads = query.device, (B, kv_heads, width)
    table = (max(cos.shape[0] if cos.dim() else 0, 1), width // 2)
    same_strides = cos.stride() == sin.stride()
    for name, tensor, shape, dtype in (
        ("key", key, heads, query.dtype),
        ("value", value, heads, query.dtype),
        ("cos", cos, table, torch.float32),
        ("sin", sin, table, torch.float32),
    ):
        fits = tensor.shape == shape and tensor.dtype == dtype and tensor.device == device
        if not fits or tensor.stride(-1) != 1 or not same_strides:
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, strides "
                f"{tensor.stride()}, on {tensor.device}: pass {dtype} of shape {shape} on "
                f"{query.device} with a contiguous last dimension, cos and sin of equal strides"
            )


def check_cache_and_prefix(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor,
    prefix: tuple[Tensor | None, ...],
) -> None:  # fmt: skip
    """Raise ValueError unless these have the shapes, dtypes and strides that the ops take."""
    if query.dtype not in DECODING_DTYPES or query.dim() != 3 or query.stride(-1) != 1:
        raise ValueError(
            f"query has shape {tuple(query.shape)}, dtype {query.dtype}, strides {query.stride()}: "
            "pass (B, H, Dh) in float32, bfloat16 or float16 with a contiguous last dimension"
        )
    prefix_keys, prefix_values, prefix_lengths, prefix_index = prefix
    B, device = query.shape[0], query.device
    _check_caches(query, key_cache, value_cache, ("key_cache", "value_cache"), B)
    _check_integers("lengths", lengths, B, device)
    if prefix_keys is prefix_values is prefix_lengths is prefix_index is None:
        return
    if any(t is None for t in prefix):
        raise ValueError(
            "prefix_keys, prefix_values, prefix_lengths and prefix_index go together, and some "
            "are None: pass all four, or none"
        )
    names = ("prefix_keys", "prefix_values")
    _check_caches(query, prefix_keys, prefix_values, names, prefix_keys.shape[0])
    _check_integers("prefix_lengths", prefix_lengths, B, device)
    _check_integers("prefix_index", prefix_index, B, device)
    if prefix_keys.dtype != key_cache.dtype:
        raise ValueError(
            f"prefix_keys is {prefix_keys.dtype} but key_cache is {key_cache.dtype}: keep both "
            "in the same dtype"
        )
    if prefix_keys.shape[1] != key_cache.shape[1]:
        raise ValueError(
            f"prefix_keys has {prefix_keys.shape[1]} heads but key_cache has "
            f"{key_cache.shape[1]}: make them equal"
        )


def _check_caches(
    query: Tensor, keys: Tensor, values: Tensor, names: tuple[str, str], rows: int
) -> None:
    _, H, width = query.shape
    own, device, expected = query.dtype, query.device, keys.dtype
    for name, cache in zip(names, (keys, values), strict=True):
        shape, dtype = cache.shape, cache.dtype
        if len(shape) != 4 or shape[0] != rows or shape[3] != width:
            raise ValueError(
                f"{name} has shape {tuple(shape)} but query has {tuple(query.shape)}: "
                f"pass ({rows}, Hkv, S, {width})"
            )
        fits = dtype == expected and dtype in (own, FP8)
        if not fits or cache.device != device or cache.stride(-1) != 1:
            raise ValueError(
                f"{name} is {dtype} on {cache.device} with strides {cache.stride()}: pass "
                f"{own}, or float8_e4m3fn for keys and values, on {device} with a "
                "contiguous last dimension"
            )
        if dtype == FP8 and cache.is_cuda and capability(device) < (8, 9):
            raise ValueError(f"{name} is {FP8} and this GPU is older than sm_89: keep it in {own}")
        if not width or not shape[1] or H % shape[1]:
            raise ValueError(
                f"{name} has {shape[1]} heads, which do not divide the {H} of query: pass a divisor"
            )
    if keys.shape != values.shape:
        raise ValueError(
            f"{names[1]} has shape {tuple(values.shape)} but {names[0]} has "
            f"{tuple(keys.shape)}: make them equal"
        )


def _check_integers(name: str, values: Tensor, count: int, device: torch.device) -> None:
    if values.shape != (count,) or values.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name} has shape {tuple(values.shape)} and dtype {values.dtype}: "
            f"pass int32 or int64 of shape ({count},)"
        )
    if values.device != device:
        raise ValueError(f"{name} is on {values.device} but query is on {device}: move it")
