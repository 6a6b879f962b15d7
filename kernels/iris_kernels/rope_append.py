"""Rotary positions of one new token per sequence; its key and value go into a static cache.

    rotated_i = x_i cos_i - x_(i + Dh/2) sin_i
    rotated_(i + Dh/2) = x_(i + Dh/2) cos_i + x_i sin_i          i < Dh/2, for query and key
    key_cache[b, :, slots_b] = rotated key_b,  value_cache[b, :, slots_b] = value_b

Computed in fp32, rounded to the dtype of the query, and from there to the cache's. float8_e4m3fn
caches saturate, where a plain cast may give NaN.

Bytes moved for b-byte elements: 2 b Dh (H + 2 Hkv) per sequence; one kernel launch instead of the
fourteen of separate operations.

Shapes: B sequences, H query heads, Hkv key-value heads, S cache entries, Dh head width.
"""

import ctypes

import torch
from torch import Tensor

from . import cpp
from ._backend import backend, direct_backend, jit, tl, triton
from ._checks import DECODING_DTYPES, check_rotation, check_values_in_range
from ._fp8 import FP8, FP8_MAX, saturate
from ._ops import add_op_namespace_prefix

# --- Triton kernel --------------------------------------------------------------------------------


@jit
def _load_halves(first, mask, HALF: tl.constexpr):
    """Both halves of heads; the second is HALF channels after the `first`."""
    return tl.load(first, mask=mask, other=0.0), tl.load(first + HALF, mask=mask, other=0.0)


@jit
def _load_rotated(first, mask, c, s, HALF: tl.constexpr):
    """The same, rotated, in the dtype of the pointer."""
    low, high = _load_halves(first, mask, HALF)
    x, y = low.to(tl.float32), high.to(tl.float32)
    return (x * c - y * s).to(low.dtype), (y * c + x * s).to(low.dtype)


@jit
def _store_halves(first, low, high, mask, HALF: tl.constexpr, FP8_MAX: tl.constexpr):
    """Store both halves, saturated at FP8_MAX unless that is 0."""
    if FP8_MAX:
        low, high = saturate(low.to(tl.float32), FP8_MAX), saturate(high.to(tl.float32), FP8_MAX)
    tl.store(first, low.to(first.dtype.element_ty), mask=mask)
    tl.store(first + HALF, high.to(first.dtype.element_ty), mask=mask)


@jit
def _rope_append_kernel(
    # Inputs: query [B, H, Dh], key and value [B, Hkv, Dh], tables [B, Dh/2], slots [B]
    query, key, value, cos, sin, slots,
    # Outputs: rotated query [B, H, Dh], caches [B, Hkv, S, Dh]
    rotated, key_cache, value_cache,
    # Sizes
    H, HKV, S,
    # Strides of query, key, value, key cache, value cache and the tables, by dimension
    q_b, q_h, k_b, k_h, v_b, v_h, kc_b, kc_h, kc_s, vc_b, vc_h, vc_s, table_b,
    # Programs per sequence for its query and its key; heads per program
    QUERY_BLOCKS: tl.constexpr, KEY_BLOCKS: tl.constexpr, HEADS: tl.constexpr,
    # Dh/2, and that rounded up to a power of two; the largest fp8 of an fp8 cache, else 0
    HALF: tl.constexpr, WIDTH: tl.constexpr, FP8_MAX: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one sequence: of its query, then of its key, then of its value."""
    b = tl.program_id(0).to(tl.int64)  # the other grid axes are limited to 65535
    block = tl.program_id(1)
    i = tl.arange(0, WIDTH)
    inside = i < HALF
    c = tl.load(cos + b * table_b + i, mask=inside, other=0.0)[None, :]
    s = tl.load(sin + b * table_b + i, mask=inside, other=0.0)[None, :]
    h = tl.arange(0, HEADS)
    if block < QUERY_BLOCKS:
        h += block * HEADS
        mask = (h < H)[:, None] & inside[None, :]
        from_query = query + b * q_b + h[:, None] * q_h + i[None, :]
        low, high = _load_rotated(from_query, mask, c, s, HALF)
        to_query = rotated + (b * H + h[:, None]) * 2 * HALF + i[None, :]
        _store_halves(to_query, low, high, mask, HALF, 0)
    else:
        slot = tl.load(slots + b).to(tl.int64)
        heads = tl.where(
            slot < S, tl.where(slot >= 0, HKV, 0), 0
        )  # write nothing outside the cache
        if block < QUERY_BLOCKS + KEY_BLOCKS:
            h += (block - QUERY_BLOCKS) * HEADS
            mask = (h < heads)[:, None] & inside[None, :]
            from_key = key + b * k_b + h[:, None] * k_h + i[None, :]
            low, high = _load_rotated(from_key, mask, c, s, HALF)
            to_key = key_cache + b * kc_b + h[:, None] * kc_h + slot * kc_s + i[None, :]
            _store_halves(to_key, low, high, mask, HALF, FP8_MAX)
        else:
            h += (block - QUERY_BLOCKS - KEY_BLOCKS) * HEADS
            mask = (h < heads)[:, None] & inside[None, :]
            from_value = value + b * v_b + h[:, None] * v_h + i[None, :]
            low, high = _load_halves(from_value, mask, HALF)
            to_value = value_cache + b * vc_b + h[:, None] * vc_h + slot * vc_s + i[None, :]
            _store_halves(to_value, low, high, mask, HALF, FP8_MAX)


# --- Launcher -------------------------------------------------------------------------------------


def rope_append_triton(query, key, value, cos, sin, key_cache, value_cache, slots) -> Tensor:
    """One launch; up to 16 heads per program."""
    check_values_in_range("slots", slots, 0, key_cache.shape[2] - 1)
    B, H, width = query.shape
    kv_heads = key.shape[1]
    heads = min(triton.next_power_of_2(max(H, kv_heads)), 16)
    query_blocks, key_blocks = -(-H // heads), -(-kv_heads // heads)
    rotated, slots = query.new_empty(B, H, width), slots.contiguous()
    strides = [stride for t in (query, key, value) for stride in t.stride()[:2]]
    strides += [stride for t in (key_cache, value_cache) for stride in t.stride()[:3]]
    _rope_append_kernel[(B, query_blocks + 2 * key_blocks)](
        query, key, value, cos, sin, slots, rotated, key_cache, value_cache,
        H, kv_heads, key_cache.shape[2], *strides, cos.stride(0),
        QUERY_BLOCKS=query_blocks, KEY_BLOCKS=key_blocks, HEADS=heads, HALF=width // 2,
        WIDTH=triton.next_power_of_2(width // 2),
        FP8_MAX=FP8_MAX if key_cache.dtype == FP8 else 0,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return rotated


# --- The C++ path ---------------------------------------------------------------------------------

_rope_append = cpp.function(
    "iris_rope_append", cpp.INT, cpp.INT, cpp.POINTER, cpp.POINTER, cpp.POINTER, cpp.LONG,
    cpp.POINTER, cpp.INT, cpp.LONG, cpp.POINTER, cpp.LONG, cpp.LONG, cpp.LONG, cpp.LONG, cpp.INT,
)  # fmt: skip


def rope_append_cpp(query, key, value, cos, sin, key_cache, value_cache, slots) -> Tensor:
    """One pass over the rows; fp8 caches take the torch path."""
    if key_cache.dtype == FP8:
        return rope_append_torch(query, key, value, cos, sin, key_cache, value_cache, slots)
    B, H, width = query.shape
    kv_heads, entries = key_cache.shape[1:3]
    rotated, slots = query.new_empty(B, H, width), slots.contiguous()
    places = []
    for tensor in (query, key, value):
        places += tensor.data_ptr(), *tensor.stride()[:2], 0
    for cache in (key_cache, value_cache):
        places += cache.data_ptr(), *cache.stride()[:3]
    in_range = _rope_append()(
        query.dtype == torch.bfloat16, (ctypes.c_int64 * 20)(*places), cos.data_ptr(),
        sin.data_ptr(), cos.stride(0), slots.data_ptr(), slots.dtype == torch.int64, entries,
        rotated.data_ptr(), B, H, kv_heads, width // 2, cpp.threads(B * (H + kv_heads) * width),
    )  # fmt: skip
    if not in_range:
        check_values_in_range("slots", slots, 0, entries - 1)  # raises
    torch.autograd.graph.increment_version((key_cache, value_cache))
    return rotated


# --- The torch path -------------------------------------------------------------------------------


def rope_append_torch(query, key, value, cos, sin, key_cache, value_cache, slots) -> Tensor:
    """The same in torch."""
    check_values_in_range("slots", slots, 0, key_cache.shape[2] - 1)
    cos, sin = (torch.cat((table, table), dim=-1)[:, None] for table in (cos, sin))
    rotated_key = _rotate(key, cos, sin)
    rows = torch.arange(len(slots), device=slots.device)
    if not slots.is_cpu:  # where slots have not been checked, write nothing outside the cache
        rows = rows[(slots >= 0) & (slots < key_cache.shape[2])]
        rotated_key, value, slots = rotated_key[rows], value[rows], slots[rows]
    for cache, new in ((key_cache, rotated_key), (value_cache, value)):
        if cache.dtype == FP8:
            new = new.clamp(-FP8_MAX, FP8_MAX)
        cache[rows, :, slots] = new.to(cache.dtype)
    return _rotate(query, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads [B, H, Dh] rotated by tables [B, 1, Dh], contiguous."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1).mul_(sin)
    return (wide * cos).add_(turned).to(x.dtype)


PATHS = {"triton": rope_append_triton, "cpp": rope_append_cpp, "torch": rope_append_torch}


# --- Custom op ------------------------------------------------------------------------------------


@torch.library.custom_op(
    add_op_namespace_prefix("rope_append"), mutates_args=("key_cache", "value_cache")
)
def _rope_append_op(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor,
    key_cache: Tensor, value_cache: Tensor, slots: Tensor,
) -> Tensor:  # fmt: skip
    if not query.numel():
        return torch.empty_like(query, memory_format=torch.contiguous_format)
    run = PATHS[backend(query)]
    return run(query, key, value, cos, sin, key_cache, value_cache, slots)


@_rope_append_op.register_fake
def _(query, *_):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


# --- Public ---------------------------------------------------------------------------------------


def rope_append(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """Rotate a token's query and key, and write key and value into a cache IN PLACE.

    Channels i and i + Dh/2 are rotated together, as in transformers' Llama. One kernel launch, no
    host sync, safe in a CUDA graph: `slots` is read on the device in every replay. Not
    differentiable. `rope_append_reference` is the rotation in eager torch.

    Args:
        query: (B, H, Dh) float32, bfloat16 or float16, Dh even. Any strides, but contiguous in
            the last dimension, so query, key and value can be parts of one projection's output.
        key, value: (B, Hkv, Dh) of the same dtype.
        cos, sin: (B, Dh/2) float32, of the angle position * theta^(-2i/Dh), both contiguous.
        key_cache, value_cache: (B, Hkv, S, Dh) in the dtype of `query` or float8_e4m3fn; strides as
            for `query`.
        slots: (B) int32 or int64, the cache entry of each sequence's token.

    Returns:
        The rotated query, (B, H, Dh), contiguous.

    Raises:
        ValueError: an argument of the wrong shape, strides, dtype or device; a slot out of range,
            which is checked on the CPU only (on a GPU such a token is not written).
    """
    _check(query, key, value, cos, sin, key_cache, value_cache, slots)
    arguments = (query, key, value, cos, sin, key_cache, value_cache, slots)
    path = direct_backend(*arguments) if query.numel() else None
    return _rope_append_op(*arguments) if path is None else PATHS[path](*arguments)


def _check(query, key, value, cos, sin, key_cache, value_cache, slots) -> None:
    if query.dtype not in DECODING_DTYPES or query.dim() != 3 or query.shape[-1] % 2:
        raise ValueError(
            f"query has shape {tuple(query.shape)} and dtype {query.dtype}: pass (B, H, Dh), Dh "
            "even, in float32, bfloat16 or float16"
        )
    B, _, width = query.shape
    if key.dim() != 3 or key_cache.dim() != 4:
        raise ValueError(
            f"key has shape {tuple(key.shape)} and key_cache {tuple(key_cache.shape)}: pass "
            "(B, Hkv, Dh) and (B, Hkv, S, Dh)"
        )
    kv_heads, entries = key.shape[1], key_cache.shape[2]
    own, table = (query.dtype,), (torch.float32,)
    cache_dtypes = (query.dtype, FP8) if key_cache.dtype != FP8 else (FP8,)
    cache = (B, kv_heads, entries, width)
    check_rotation(
        {
            "query": (query, tuple(query.shape), own),
            "key": (key, (B, kv_heads, width), own),
            "value": (value, (B, kv_heads, width), own),
            "cos": (cos, (B, width // 2), table),
            "sin": (sin, (B, width // 2), table),
            "key_cache": (key_cache, cache, cache_dtypes),
            "value_cache": (value_cache, cache, (key_cache.dtype,)),
            "slots": (slots, (B,), (torch.int32, torch.int64)),
        }
    )


def rope_append_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation of `rope_append` in eager torch: x (B, H, Dh), cos and sin (B, Dh/2)."""
    angle = torch.complex(cos, sin)[:, None]
    rotated = torch.complex(*x.to(cos.dtype).chunk(2, dim=-1)) * angle
    return torch.cat([rotated.real, rotated.imag], dim=-1)
