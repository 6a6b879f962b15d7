"""Attention of one new token per sequence over the live entries of a static key-value cache.

    context_bh = softmax_s(scale q_bh . k_bs) v_bs   over s < prefix length_b, then s < length_b

Every sequence has its own length, read on the device, so one captured graph serves all steps. A
prompt that several sequences share is stored once, as a prefix: its entries are read from memory
once, and from the L2 cache for the other sequences.

Bytes moved for b-byte caches: 2 b Dh Hkv (sum of lengths + sum of distinct prefix lengths); entries
of the static cache that are not live yet are never read.

`rope_append_attention` is `rope_append` and then this, in the same launch.

Shapes: B sequences, H query heads, Hkv key-value heads (H is a multiple of Hkv: query head h reads
head h // (H / Hkv)), S cache entries, Dh head width, N prefixes of up to S_p entries, L slots.
"""

import torch
from torch import Tensor
from torch.cuda import get_device_capability as capability
from torch.nn.functional import scaled_dot_product_attention

from .._backend import calls_directly, uses_triton
from .._checks import DECODING_DTYPES, check_values_in_range
from .._fp8 import FP8
from .._ops import add_op_namespace_prefix
from .torch_path import decode_torch, rope_append_attention_torch
from .triton_path import NewToken, decode_triton

# --- Custom op ------------------------------------------------------------------------------------


@torch.library.custom_op(add_op_namespace_prefix("decode_attention"), mutates_args=())
def _decode_attention_op(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor,
    prefix_keys: Tensor | None, prefix_values: Tensor | None,
    prefix_lengths: Tensor | None, prefix_index: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    if not query.numel():
        return torch.empty_like(query, memory_format=torch.contiguous_format)
    prefix = (prefix_keys, prefix_values, prefix_lengths, prefix_index)
    _check_values(key_cache.shape[2], lengths, prefix)
    run = decode_triton if uses_triton(query) else decode_torch
    return run(query, key_cache, value_cache, lengths, prefix, scale)


@_decode_attention_op.register_fake
def _(query, *_):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    add_op_namespace_prefix("rope_append_attention"), mutates_args=("key_cache", "value_cache")
)
def _rope_append_attention_op(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor,
    key_cache: Tensor, value_cache: Tensor, lengths: Tensor,
    prefix_keys: Tensor | None, prefix_values: Tensor | None,
    prefix_lengths: Tensor | None, prefix_index: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    if not query.numel():
        return torch.empty_like(query, memory_format=torch.contiguous_format)
    prefix = (prefix_keys, prefix_values, prefix_lengths, prefix_index)
    _check_values(key_cache.shape[2] - 1, lengths, prefix)
    if uses_triton(query):
        new = NewToken(key, value, cos, sin)
        return decode_triton(query, key_cache, value_cache, lengths, prefix, scale, new)
    return rope_append_attention_torch(
        query, key, value, cos, sin, key_cache, value_cache, lengths, prefix, scale
    )


@_rope_append_attention_op.register_fake
def _(query, *_):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def _check_values(longest: int, lengths: Tensor, prefix: tuple[Tensor | None, ...]) -> None:
    prefix_keys, _, prefix_lengths, prefix_index = prefix
    check_values_in_range("lengths", lengths, 0, longest)
    if prefix_keys is not None:
        check_values_in_range("prefix_lengths", prefix_lengths, 0, prefix_keys.shape[2])
        check_values_in_range("prefix_index", prefix_index, -1, prefix_keys.shape[0] - 1)


# --- Public ---------------------------------------------------------------------------------------


def decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    *,
    prefix_keys: Tensor | None = None,
    prefix_values: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    prefix_index: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of one query token per sequence over the live entries of a static cache.

    context = softmax(scale * query @ keys.T) @ values, over the sequence's prefix, if it has one,
    and the first `lengths` entries of its own cache (which include the new token: append it first).
    Computed in float32. The Triton path is one kernel launch, no host sync, safe in a CUDA graph:
    lengths and prefix_index are read on the device in every replay. A sequence's result does not
    depend on the other sequences (bit for bit on the Triton path).
    Not differentiable; for training use packed attention. `decode_attention_reference` is the same
    in eager torch.

    Args:
        query: (B, H, Dh) float32, bfloat16 or float16, contiguous in the last dimension.
        key_cache, value_cache: (B, Hkv, S, Dh) of the same dtype or float8_e4m3fn (half the bytes
            of bfloat16), contiguous in the last dimension; entries from `lengths` on are never
            read. H is a multiple of Hkv (grouped-query attention).
        lengths: (B) int32 or int64, on the device; 0 for a sequence without own entries.
        prefix_keys, prefix_values: (N, Hkv, S_p, Dh), prompts that sequences share, in
            the dtype of the caches.
        prefix_index: (B), the prefix of each sequence; -1 for none.
        prefix_lengths: (B), how many entries of its prefix each sequence sees.
        scale: None is Dh ** -0.5.

    Returns:
        (B, H, Dh) context in the dtype of `query`; 0 for a sequence without any entry.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device; a length or index out of range,
            which is checked on the CPU only (on a GPU lengths are clamped to the cache).
    """
    prefix = (prefix_keys, prefix_values, prefix_lengths, prefix_index)
    _check_cache_and_prefix(query, key_cache, value_cache, lengths, prefix)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if calls_directly(query, key_cache, value_cache) and query.numel():
        _check_values(key_cache.shape[2], lengths, prefix)
        return decode_torch(query, key_cache, value_cache, lengths, prefix, scale)
    return _decode_attention_op(
        query.detach(), key_cache.detach(), value_cache.detach(), lengths, *prefix, scale
    )


def rope_append_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    *,
    prefix_keys: Tensor | None = None,
    prefix_values: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    prefix_index: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`rope_append` of a new token per sequence IN PLACE, then `decode_attention` to it as well.

    The new token is entry `lengths` of its sequence, at the position prefix length + `lengths`. The
    Triton path is one kernel launch, two for few sequences, under the conditions of
    `decode_attention`. Not differentiable.

    Args:
        query: (B, H, Dh) float32, bfloat16 or float16, Dh even, contiguous in the last dimension.
        key, value: (B, Hkv, Dh) of the same dtype; may be parts of the same projection.
        cos, sin: (P, Dh/2) float32, rows contiguous: tables of all positions, as for `rope_append`.
        key_cache, value_cache: as for `decode_attention`; entry `lengths` is overwritten.
        lengths: (B) int32 or int64, on the device: entries before the new one, at most S - 1.
        prefix_keys, prefix_values, prefix_index, prefix_lengths, scale: as for `decode_attention`.

    Returns:
        (B, H, Dh) context in the dtype of `query`.

    Raises:
        ValueError: as for `decode_attention`. On a GPU, where values are not checked, a token
            beyond the cache is not written, and a position beyond the tables is the last one.
    """
    prefix = (prefix_keys, prefix_values, prefix_lengths, prefix_index)
    _check_cache_and_prefix(query, key_cache, value_cache, lengths, prefix)
    _check_new_token(query, key, value, cos, sin, key_cache.shape[1])
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if calls_directly(query, key, value, key_cache, value_cache) and query.numel():
        _check_values(key_cache.shape[2] - 1, lengths, prefix)
        return rope_append_attention_torch(
            query, key, value, cos, sin, key_cache, value_cache, lengths, prefix, scale
        )
    return _rope_append_attention_op(
        query.detach(), key.detach(), value.detach(), cos, sin,
        key_cache.detach(), value_cache.detach(), lengths, *prefix, scale,
    )  # fmt: skip


def _check_new_token(query, key, value, cos, sin, kv_heads: int) -> None:
    B, _, width = query.shape
    if width % 2:
        raise ValueError(f"query has shape {tuple(query.shape)}: pass (B, H, Dh), Dh even")
    positions = cos.shape[0] if cos.dim() else 0
    expected = {
        "key": (key, (B, kv_heads, width), query.dtype),
        "value": (value, (B, kv_heads, width), query.dtype),
        "cos": (cos, (max(positions, 1), width // 2), torch.float32),
        "sin": (sin, (max(positions, 1), width // 2), torch.float32),
    }
    for name, (tensor, shape, dtype) in expected.items():
        fits = tensor.shape == shape and tensor.dtype == dtype and tensor.device == query.device
        if not fits or tensor.stride(-1) != 1 or cos.stride() != sin.stride():
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, strides "
                f"{tensor.stride()}, on {tensor.device}: pass {dtype} of shape {shape} on "
                f"{query.device} with a contiguous last dimension, cos and sin of equal strides"
            )


def _check_cache_and_prefix(query, key_cache, value_cache, lengths, prefix) -> None:
    prefix_keys, _, _, prefix_index = prefix
    _check_caches(query, key_cache, value_cache, lengths, "key_cache", "value_cache", "lengths")
    if any(t is not None for t in prefix):
        if any(t is None for t in prefix):
            raise ValueError(
                "prefix_keys, prefix_values, prefix_lengths and prefix_index go together, and some "
                "are None: pass all four, or none"
            )
        names = ("prefix_keys", "prefix_values", "prefix_lengths")
        _check_caches(query, *prefix[:3], *names, rows=prefix_keys.shape[0])
        _check_integers("prefix_index", prefix_index, query.shape[0], query.device)
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


def _check_caches(query, keys, values, lengths, keys_name, values_name, lengths_name, rows=None):
    if query.dtype not in DECODING_DTYPES or query.dim() != 3 or query.stride(-1) != 1:
        raise ValueError(
            f"query has shape {tuple(query.shape)}, dtype {query.dtype}, strides {query.stride()}: "
            "pass (B, H, Dh) in float32, bfloat16 or float16 with a contiguous last dimension"
        )
    B, H, width = query.shape
    rows = B if rows is None else rows
    for name, cache in ((keys_name, keys), (values_name, values)):
        if cache.dim() != 4 or cache.shape[0] != rows or cache.shape[3] != width:
            raise ValueError(
                f"{name} has shape {tuple(cache.shape)} but query has {tuple(query.shape)}: "
                f"pass ({rows}, Hkv, S, {width})"
            )
        fits = cache.dtype in (query.dtype, FP8) and cache.dtype == keys.dtype
        if not fits or cache.device != query.device or cache.stride(-1) != 1:
            raise ValueError(
                f"{name} is {cache.dtype} on {cache.device} with strides {cache.stride()}: pass "
                f"{query.dtype}, or float8_e4m3fn for keys and values, on {query.device} with a "
                "contiguous last dimension"
            )
        if cache.dtype == FP8 and cache.is_cuda and capability(cache.device) < (8, 9):
            raise ValueError(
                f"{name} is {FP8} and this GPU is older than sm_89: keep it in {query.dtype}"
            )
        if not width or not cache.shape[1] or H % cache.shape[1]:
            raise ValueError(
                f"{name} has {cache.shape[1]} heads, which do not divide the {H} of query: pass a "
                "divisor"
            )
    if keys.shape != values.shape:
        raise ValueError(
            f"{values_name} has shape {tuple(values.shape)} but {keys_name} has "
            f"{tuple(keys.shape)}: make them equal"
        )
    _check_integers(lengths_name, lengths, B, query.device)


def _check_integers(name: str, values: Tensor, count: int, device: torch.device) -> None:
    if values.shape != (count,) or values.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name} has shape {tuple(values.shape)} and dtype {values.dtype}: "
            f"pass int32 or int64 of shape ({count},)"
        )
    if values.device != device:
        raise ValueError(f"{name} is on {values.device} but query is on {device}: move it")


def decode_attention_reference(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor
) -> Tensor:
    """`decode_attention` in eager torch, without prefixes: a mask over the whole cache."""
    is_live = torch.arange(key_cache.shape[2], device=query.device) < lengths[:, None]
    context = scaled_dot_product_attention(
        query[:, :, None], key_cache, value_cache, is_live[:, None, None], enable_gqa=True
    )
    return context[:, :, 0]
