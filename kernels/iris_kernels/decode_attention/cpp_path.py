"""`decode_attention` in C++, with `rope_append` before it if there is a new token, for float32 and
bfloat16 on a CPU: see `cpp/decode_attention.cpp`."""

import ctypes
import struct

import torch
from torch import Tensor

from .. import cpp
from .checks import NewToken, check_values

_attend = cpp.function("iris_decode_attention", cpp.INT, ctypes.c_char_p)
_ARGUMENTS = struct.Struct("=47qd")  # the struct of the C++ source
_NO_PREFIX = (0,) * 8
_NO_NEW_TOKEN = (0,) * 9


def decode_cpp(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor,
    prefix: tuple[Tensor | None, ...], scale: float, new: NewToken | None = None,
) -> Tensor:  # fmt: skip
    """Same as `decode_triton`."""
    B, H, width = query.shape
    _, kv_heads, S, _ = keys.shape
    context = query.new_empty(B, H, width)
    prefix_keys, prefix_values, prefix_lengths, prefix_index = prefix
    count = prefix_S = 0
    shared, prefix_integers = _NO_PREFIX, (0, 0, 0, 0)
    if prefix_keys is not None:
        count, _, prefix_S, _ = prefix_keys.shape
        shared = *_place(prefix_keys), *_place(prefix_values)
        prefix_integers = *_integers(prefix_lengths), *_integers(prefix_index)
    added, positions = _NO_NEW_TOKEN, 0
    if new is not None:
        key, value, cos, sin = new
        positions, tables = len(cos), (cos.data_ptr(), sin.data_ptr(), cos.stride(0))
        added = *_place(key), *_place(value), *tables
    in_range = _attend()(
        _ARGUMENTS.pack(
            query.dtype == torch.bfloat16, cpp.threads(B * H * width * (S + prefix_S)),
            B, H, kv_heads, width, S, count, prefix_S, positions, *_place(query), *_place(context),
            *_place(keys), *_place(values), *shared, *_integers(lengths), *prefix_integers, *added,
            scale,
        )
    )  # fmt: skip
    if not in_range:
        check_values(keys, lengths, prefix, new)  # raises
    if new is not None:
        torch.autograd.graph.increment_version((keys, values))
    return context


def _place(tensor: Tensor) -> tuple[int, ...]:
    """Address, and strides but the last."""
    return tensor.data_ptr(), *tensor.stride()[:-1]


def _integers(tensor: Tensor) -> tuple[int, bool]:
    return tensor.data_ptr(), tensor.dtype == torch.int64
