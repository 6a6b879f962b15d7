"""Attention of one new token per sequence over the live entries of a static key-value cache.

    context_bh = softmax_s(scale q_bh . k_bs) v_bs   over s < prefix length_b, then s < length_b

Every sequence has its own length, read on the device, so one captured graph serves all steps. A
prompt that several sequences share is stored once, as a prefix: its entries are read from memory
once, and from the L2 cache for the other sequences.

Bytes moved for b-byte caches: 2 b Dh Hkv (sum of lengths + sum of distinct prefix lengths); entries
of the static cache that are not live yet are never read.

Shapes: B sequences, H query heads, Hkv key-value heads (H is a multiple of Hkv: query head h reads
head h // (H / Hkv)), S cache entries, Dh head width, N prefixes of up to S_p entries, L slots.
"""

import torch
from torch import Tensor
from torch.cuda import get_device_capability as capability
from torch.nn.functional import scaled_dot_product_attention

from ._backend import jit, tl, triton, uses_triton
from ._checks import DECODING_DTYPES
from ._fp8 import FP8
from ._ops import add_op_namespace_prefix
from ._row_stats import LOG2_E

# --- Triton kernel --------------------------------------------------------------------------------


@jit
def _attend(
    q, keys, values, length, key_stride, value_stride,
    m, l, acc,  # the running softmax: [L], [L], [L, D]
    L: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Add `length` cache entries to the running softmax of L slots.

    Entry s goes to slot s % L. Per slot: m the maximum score, l = sum exp2(score - m), acc the sum
    of values with these weights. Slots are reduced only after the last entry, so that no step
    waits for another.
    """
    d = tl.arange(0, D)
    for start in range(0, length, L):
        s = start + tl.arange(0, L)
        is_live = s < length
        mask = is_live[:, None] & (d[None, :] < WIDTH)
        k = tl.load(keys + s[:, None] * key_stride + d[None, :], mask=mask, other=0.0)
        v = tl.load(values + s[:, None] * value_stride + d[None, :], mask=mask, other=0.0)
        score = tl.sum(q[None, :] * k.to(tl.float32), axis=1)
        score = tl.where(is_live, score, float("-inf"))
        m_new = tl.maximum(m, score)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # -inf: no entry in the slot yet
        p = tl.exp2(score - m_safe)
        rescale = tl.exp2(m - m_safe)
        l = l * rescale + p
        acc = acc * rescale[:, None] + p[:, None] * v.to(tl.float32)
        m = m_new
    return m, l, acc


@jit
def _decode_kernel(
    # Inputs: query [B, H, Dh], caches [B, Hkv, S, Dh], lengths [B]
    query, keys, values, lengths,
    # Prefixes [N, Hkv, S_p, Dh], entries seen [B], prefix of a sequence or -1 [B]; or four None
    prefix_keys, prefix_values, prefix_lengths, prefix_index,
    # Output [B, H, Dh]
    context,
    # Scale of the scores for exp2, sizes
    scale, S, prefix_S,
    # Strides of query, caches, prefixes and context, by dimension
    q_b, q_h, k_b, k_h, k_s, v_b, v_h, v_s, pk_n, pk_h, pk_s, pv_n, pv_h, pv_s, c_b, c_h,
    # H / Hkv; Dh, and that rounded up to a power of two; slots
    HEADS_PER_KV: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    kv = h // HEADS_PER_KV
    d = tl.arange(0, D)
    q = tl.load(query + b * q_b + h * q_h + d, mask=d < WIDTH, other=0.0).to(tl.float32) * scale
    m = tl.full([L], float("-inf"), tl.float32)
    l = tl.zeros([L], tl.float32)
    acc = tl.zeros([L, D], tl.float32)
    if prefix_keys is not None:
        n = tl.load(prefix_index + b).to(tl.int64)
        length = 0
        if n >= 0:
            length = tl.minimum(tl.load(prefix_lengths + b).to(tl.int32), prefix_S)
        m, l, acc = _attend(
            q, prefix_keys + n * pk_n + kv * pk_h, prefix_values + n * pv_n + kv * pv_h, length,
            pk_s, pv_s, m, l, acc, L, WIDTH, D,
        )  # fmt: skip
    length = tl.minimum(tl.load(lengths + b).to(tl.int32), S)
    m, l, acc = _attend(
        q, keys + b * k_b + kv * k_h, values + b * v_b + kv * v_h, length,
        k_s, v_s, m, l, acc, L, WIDTH, D,
    )  # fmt: skip
    m_max = tl.max(m, axis=0)
    weight = tl.exp2(m - tl.where(m_max == float("-inf"), 0.0, m_max))
    total = tl.sum(l * weight, axis=0)
    out = tl.sum(acc * weight[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(context + b * c_b + h * c_h + d, out.to(context.dtype.element_ty), mask=d < WIDTH)


# --- Launcher -------------------------------------------------------------------------------------


def decode_launch(head_width: int) -> dict[str, int | bool]:
    """32 elements of a key and of a value tile per thread, for any number of sequences."""
    D = max(16, triton.next_power_of_2(head_width))
    slots = max(16, 8192 // D)
    return {"D": D, "L": slots, "num_warps": slots * D // 1024, "enable_fp_fusion": True}


def decode_triton(query, keys, values, lengths, prefix, scale) -> Tensor:
    """One launch; `prefix` is (keys, values, lengths, index) or four None."""
    prefix_keys, prefix_values, prefix_lengths, prefix_index = prefix
    B, H, width = query.shape
    context = query.new_empty(B, H, width)
    strides = [*query.stride()[:2], *keys.stride()[:3], *values.stride()[:3]]
    if prefix_keys is None:
        strides += [0] * 6
    else:
        strides += [*prefix_keys.stride()[:3], *prefix_values.stride()[:3]]
    _decode_kernel[(H, B)](
        query, keys, values, lengths, prefix_keys, prefix_values, prefix_lengths, prefix_index,
        context, scale * LOG2_E, keys.shape[2], 0 if prefix_keys is None else prefix_keys.shape[2],
        *strides, *context.stride()[:2],
        HEADS_PER_KV=H // keys.shape[1], WIDTH=width, **decode_launch(width),
    )  # fmt: skip
    return context


# --- The torch path -------------------------------------------------------------------------------


def decode_torch(query, keys, values, lengths, prefix, scale) -> Tensor:
    """torch's attention without a mask, once per group of sequences of equal lengths and prefix.

    Reads the lengths on the host, which waits for the device on a GPU.
    """
    prefix_keys, prefix_values, prefix_lengths, prefix_index = prefix
    context = torch.zeros_like(query, memory_format=torch.contiguous_format)
    own_lengths, shared_lengths, shared = lengths.tolist(), [0] * len(query), [-1] * len(query)
    if prefix_keys is not None:
        shared_lengths = prefix_lengths.where(prefix_index >= 0, 0).tolist()
        shared = prefix_index.tolist()
    groups: dict[tuple[int, int, int], list[int]] = {}
    for b, group in enumerate(zip(own_lengths, shared_lengths, shared, strict=True)):
        groups.setdefault(group, []).append(b)
    for (length, prefix_length, n), members in groups.items():
        rows = _as_index(members)
        k, v = keys[rows, :, :length], values[rows, :, :length]
        if prefix_length:
            size = (len(members), -1, -1, -1)
            k = torch.cat([prefix_keys[n, :, :prefix_length].expand(size), k], 2)
            v = torch.cat([prefix_values[n, :, :prefix_length].expand(size), v], 2)
        if k.shape[2]:
            q = query[rows, :, None].float()
            # Heads that share keys become queries of one head: no key is repeated.
            q = q.view(len(members), k.shape[1], -1, q.shape[-1])
            out = scaled_dot_product_attention(q, k.float(), v.float(), scale=scale)
            context[rows] = out.view(len(members), *query.shape[1:]).to(query.dtype)
    return context


def _as_index(rows: list[int]) -> slice | list[int]:
    """Index of these rows: a slice, which makes a view, if they are adjacent."""
    adjacent = rows[-1] - rows[0] + 1 == len(rows)
    return slice(rows[0], rows[-1] + 1) if adjacent else rows


# --- Custom op ------------------------------------------------------------------------------------


@torch.library.custom_op(add_op_namespace_prefix("decode_attention"), mutates_args=())
def _decode_attention_op(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor,
    prefix_keys: Tensor | None, prefix_values: Tensor | None,
    prefix_lengths: Tensor | None, prefix_index: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    if not query.numel():
        return torch.empty_like(query, memory_format=torch.contiguous_format)
    _check_range("lengths", lengths, 0, key_cache.shape[2])
    if prefix_keys is not None:
        _check_range("prefix_lengths", prefix_lengths, 0, prefix_keys.shape[2])
        _check_range("prefix_index", prefix_index, -1, prefix_keys.shape[0] - 1)
    run = decode_triton if uses_triton(query) else decode_torch
    prefix = (prefix_keys, prefix_values, prefix_lengths, prefix_index)
    return run(query, key_cache, value_cache, lengths, prefix, scale)


@_decode_attention_op.register_fake
def _(query, *_):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def _check_range(name: str, values: Tensor, low: int, high: int) -> None:
    """Raise ValueError unless all are in [low, high]. CPU only: reads values."""
    if values.is_cpu and ((values < low) | (values > high)).any():
        raise ValueError(f"{name} is {values.tolist()}: all must lie in [{low}, {high}]")


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
    _check_caches(query, key_cache, value_cache, lengths, "key_cache", "value_cache", "lengths")
    prefix = (prefix_keys, prefix_values, prefix_lengths, prefix_index)
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
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return _decode_attention_op(
        query.detach(), key_cache.detach(), value_cache.detach(), lengths, *prefix, scale
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
