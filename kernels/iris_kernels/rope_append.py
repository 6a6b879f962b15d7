"""Rotary positions of one new token a sequence, and its key and value into a static cache.

    rotated_i = x_i cos_i - x_(i + Dh/2) sin_i
    rotated_(i + Dh/2) = x_(i + Dh/2) cos_i + x_i sin_i          i < Dh/2, for query and key
    key_cache[b, :, slots_b] = rotated key_b,  value_cache[b, :, slots_b] = value_b

fp32 inside, rounded to the dtype of the query, and from there to the cache's where that is
float8_e4m3fn: beyond its range its end, where a cast may give NaN.

Bytes moved for b-byte elements: 2 b Dh (H + 2 Hkv) a sequence, in one launch where the plain
operations take fourteen.

Shapes: B sequences, H query heads, Hkv key-value heads, S cache entries, Dh head width.
"""

import torch
from torch import Tensor

from ._backend import jit, tl, triton, use_triton
from ._checks import DECODING_DTYPES
from ._eight_bits import FP8, LARGEST, within
from ._ops import add_op_namespace_prefix

# --- Triton kernel --------------------------------------------------------------------------------


@jit
def _load(first, held, HALF: tl.constexpr):
    """Both halves of heads, the second lying HALF channels after the `first`."""
    return tl.load(first, mask=held, other=0.0), tl.load(first + HALF, mask=held, other=0.0)


@jit
def _rotate(first, held, c, s, HALF: tl.constexpr):
    """The same, turned, in the dtype they are in."""
    low, high = _load(first, held, HALF)
    x, y = low.to(tl.float32), high.to(tl.float32)
    return (x * c - y * s).to(low.dtype), (y * c + x * s).to(low.dtype)


@jit
def _store(to, low, high, held, HALF: tl.constexpr, LARGEST: tl.constexpr):
    """Both halves, cut at LARGEST where that is not 0."""
    if LARGEST:
        low, high = within(low.to(tl.float32), LARGEST), within(high.to(tl.float32), LARGEST)
    tl.store(to, low.to(to.dtype.element_ty), mask=held)
    tl.store(to + HALF, high.to(to.dtype.element_ty), mask=held)


@jit
def _rope_append_kernel(
    query, key, value, cos, sin, slots, rotated, key_cache, value_cache, H, HKV, S,
    q_b, q_h, k_b, k_h, v_b, v_h, kc_b, kc_h, kc_s, vc_b, vc_h, vc_s, table_b,
    QUERY_BLOCKS: tl.constexpr, KEY_BLOCKS: tl.constexpr, HEADS: tl.constexpr,
    HALF: tl.constexpr, WIDTH: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one sequence: of its query, then of its key, then of its value."""
    b = tl.program_id(0).to(tl.int64)  # the axis without a limit of 65535
    block = tl.program_id(1)
    i = tl.arange(0, WIDTH)
    inside = i < HALF
    c = tl.load(cos + b * table_b + i, mask=inside, other=0.0)[None, :]
    s = tl.load(sin + b * table_b + i, mask=inside, other=0.0)[None, :]
    h = tl.arange(0, HEADS)
    if block < QUERY_BLOCKS:
        h += block * HEADS
        held = (h < H)[:, None] & inside[None, :]
        low, high = _rotate(query + b * q_b + h[:, None] * q_h + i[None, :], held, c, s, HALF)
        to_query = rotated + (b * H + h[:, None]) * 2 * HALF + i[None, :]
        _store(to_query, low, high, held, HALF, 0)
    else:
        slot = tl.load(slots + b).to(tl.int64)
        heads = tl.where(slot < S, tl.where(slot >= 0, HKV, 0), 0)  # none, where there is no slot
        if block < QUERY_BLOCKS + KEY_BLOCKS:
            h += (block - QUERY_BLOCKS) * HEADS
            held = (h < heads)[:, None] & inside[None, :]
            low, high = _rotate(key + b * k_b + h[:, None] * k_h + i[None, :], held, c, s, HALF)
            to_key = key_cache + b * kc_b + h[:, None] * kc_h + slot * kc_s + i[None, :]
            _store(to_key, low, high, held, HALF, LARGEST)
        else:
            h += (block - QUERY_BLOCKS - KEY_BLOCKS) * HEADS
            held = (h < heads)[:, None] & inside[None, :]
            low, high = _load(value + b * v_b + h[:, None] * v_h + i[None, :], held, HALF)
            to_value = value_cache + b * vc_b + h[:, None] * vc_h + slot * vc_s + i[None, :]
            _store(to_value, low, high, held, HALF, LARGEST)


# --- Launcher -------------------------------------------------------------------------------------


def rope_append_triton(query, key, value, cos, sin, key_cache, value_cache, slots) -> Tensor:
    """One launch; up to 16 heads a program."""
    B, H, width = query.shape
    kv_heads = key.shape[1]
    heads = min(triton.next_power_of_2(max(H, kv_heads)), 16)
    query_blocks, key_blocks = -(-H // heads), -(-kv_heads // heads)
    rotated = query.new_empty(B, H, width)
    strides = [stride for t in (query, key, value) for stride in t.stride()[:2]]
    strides += [stride for t in (key_cache, value_cache) for stride in t.stride()[:3]]
    _rope_append_kernel[(B, query_blocks + 2 * key_blocks)](
        query, key, value, cos, sin, slots, rotated, key_cache, value_cache,
        H, kv_heads, key_cache.shape[2], *strides, cos.stride(0),
        QUERY_BLOCKS=query_blocks, KEY_BLOCKS=key_blocks, HEADS=heads, HALF=width // 2,
        WIDTH=triton.next_power_of_2(width // 2),
        LARGEST=LARGEST if key_cache.dtype == FP8 else 0,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return rotated


# --- The torch path -------------------------------------------------------------------------------


def rope_append_torch(query, key, value, cos, sin, key_cache, value_cache, slots) -> Tensor:
    """The same in torch's operations."""
    cos, sin = cos[:, None], sin[:, None]

    def rotate(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, dim=-1)
        parts = (first * cos - second * sin, second * cos + first * sin)
        return torch.cat(parts, dim=-1).to(x.dtype)

    rows = ((slots >= 0) & (slots < key_cache.shape[2])).nonzero()[:, 0]
    for cache, new in ((key_cache, rotate(key)), (value_cache, value)):
        if cache.dtype == FP8:
            new = new.clamp(-LARGEST, LARGEST)
        cache[rows, :, slots[rows]] = new[rows].to(cache.dtype)
    return rotate(query)


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
    if slots.is_cpu and ((slots < 0) | (slots >= key_cache.shape[2])).any():
        raise ValueError(
            f"slots is {slots.tolist()}: all must lie in [0, {key_cache.shape[2] - 1}]"
        )
    run = rope_append_triton if use_triton(query) else rope_append_torch
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

    Channel i turns against channel i + Dh/2, as in transformers' Llama. One launch, no host sync,
    safe in a CUDA graph: `slots` is read on the device in every replay. Not differentiable.

    Args:
        query: (B, H, Dh) float32, bfloat16 or float16, Dh even; strides are free but for the last
            dimension, so all three can be parts of one projection's output.
        key, value: (B, Hkv, Dh) of the same dtype.
        cos, sin: (B, Dh/2) float32, of the angle position * theta^(-2i/Dh), both contiguous.
        key_cache, value_cache: (B, Hkv, S, Dh) in the dtype of `query` or float8_e4m3fn; strides
            are free but for the last dimension.
        slots: (B) int32 or int64, where each sequence's token goes.

    Returns:
        The rotated query, (B, H, Dh), contiguous.

    Raises:
        ValueError: an argument of the wrong shape, strides, dtype or device; a slot out of range,
            which is looked for on the CPU only (on a GPU nothing is then written).
    """
    _check(query, key, value, cos, sin, key_cache, value_cache, slots)
    return _rope_append_op(query, key, value, cos, sin, key_cache, value_cache, slots)


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
    kv_heads, slots_each = key.shape[1], key_cache.shape[2]
    own, table = (query.dtype,), (torch.float32,)
    kept = (query.dtype, FP8) if key_cache.dtype != FP8 else (FP8,)
    cache = (B, kv_heads, slots_each, width)
    expected = {
        "query": (query, tuple(query.shape), own),
        "key": (key, (B, kv_heads, width), own),
        "value": (value, (B, kv_heads, width), own),
        "cos": (cos, (B, width // 2), table),
        "sin": (sin, (B, width // 2), table),
        "key_cache": (key_cache, cache, kept),
        "value_cache": (value_cache, cache, (key_cache.dtype,)),
        "slots": (slots, (B,), (torch.int32, torch.int64)),
    }
    for name, (tensor, shape, dtypes) in expected.items():
        if tensor.shape != shape or tensor.dtype not in dtypes or tensor.device != query.device:
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}: pass "
                f"{' or '.join(map(str, dtypes))} of shape {shape} on {query.device}"
            )
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} has strides {tensor.stride()}: its last dimension must be contiguous"
            )
    if cos.stride(0) != sin.stride(0):
        raise ValueError(f"cos has strides {cos.stride()} but sin {sin.stride()}: make them equal")


def rope_append_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation alone, in plain torch: x (B, H, Dh), tables (B, Dh/2)."""
    angle = torch.complex(cos, sin)[:, None]
    turned = torch.complex(*x.to(cos.dtype).chunk(2, dim=-1)) * angle
    return torch.cat([turned.real, turned.imag], dim=-1)
