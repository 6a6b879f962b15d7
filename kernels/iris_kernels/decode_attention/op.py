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
from torch.nn.functional import scaled_dot_product_attention

from .._backend import backend, direct_backend
from .._ops import add_op_namespace_prefix
from .checks import NewToken, check_cache_and_prefix, check_new_token, check_values
from .cpp_path import decode_cpp
from .torch_path import decode_torch
from .triton_path import decode_triton

# --- Custom op ------------------------------------------------------------------------------------


@torch.library.custom_op(add_op_namespace_prefix("decode_attention"), mutates_args=())
def _decode_attention_op(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor,
    prefix_keys: Tensor | None, prefix_values: Tensor | None,
    prefix_lengths: Tensor | None, prefix_index: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    prefix = (prefix_keys, prefix_values, prefix_lengths, prefix_index)
    path = backend(key_cache)  # may be fp8, which C++ does not take
    return _attend(path, query, key_cache, value_cache, lengths, prefix, scale)


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
    prefix = (prefix_keys, prefix_values, prefix_lengths, prefix_index)
    new = NewToken(key, value, cos, sin)
    path = backend(key_cache)
    return _attend(path, query, key_cache, value_cache, lengths, prefix, scale, new)


@_rope_append_attention_op.register_fake
def _(query, *_):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def _attend(
    path: str, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor,
    prefix: tuple[Tensor | None, ...], scale: float, new: NewToken | None = None,
) -> Tensor:  # fmt: skip
    if not query.numel():
        return torch.empty_like(query, memory_format=torch.contiguous_format)
    prefix_keys, prefix_values, *counts = prefix
    lengths, prefix_lengths, prefix_index = map(_adjacent, (lengths, *counts))
    prefix = (prefix_keys, prefix_values, prefix_lengths, prefix_index)
    if path == "cpp":
        return decode_cpp(query, keys, values, lengths, prefix, scale, new)
    check_values(keys, lengths, prefix, new)
    run = decode_triton if path == "triton" else decode_torch
    return run(query, keys, values, lengths, prefix, scale, new)


def _adjacent(numbers: Tensor | None) -> Tensor | None:
    """The same, adjacent in memory, where Triton and C++ look for them."""
    return numbers if numbers is None or numbers.is_contiguous() else numbers.contiguous()


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
    check_cache_and_prefix(query, key_cache, value_cache, lengths, prefix)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    path = direct_backend(key_cache, value_cache, query, lengths, *prefix)
    if path is not None:
        return _attend(path, query, key_cache, value_cache, lengths, prefix, scale)
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
    check_cache_and_prefix(query, key_cache, value_cache, lengths, prefix)
    check_new_token(query, key, value, cos, sin, key_cache.shape[1])
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    path = direct_backend(key_cache, value_cache, query, key, value, cos, sin, lengths, *prefix)
    if path is not None:
        new = NewToken(key, value, cos, sin)
        return _attend(path, query, key_cache, value_cache, lengths, prefix, scale, new)
    return _rope_append_attention_op(
        query.detach(), key.detach(), value.detach(), cos, sin,
        key_cache.detach(), value_cache.detach(), lengths, *prefix, scale,
    )  # fmt: skip


def decode_attention_reference(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor
) -> Tensor:
    """`decode_attention` in eager torch, without prefixes: a mask over the whole cache."""
    is_live = torch.arange(key_cache.shape[2], device=query.device) < lengths[:, None]
    context = scaled_dot_product_attention(
        query[:, :, None], key_cache, value_cache, is_live[:, None, None], enable_gqa=True
    )
    return context[:, :, 0]
