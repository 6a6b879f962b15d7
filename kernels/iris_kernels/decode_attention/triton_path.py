"""`decode_attention` in Triton, with `rope_append` before it if there is a new token.

The entries of a sequence are attended to in chunks, whose results are merged in order. Where
sequences and heads are too few to occupy the GPU, every chunk gets its own program and a second
kernel merges the results: by the same operations in the same order, so that the number of
sequences does not change a bit. The grid depends on shapes only; lengths are read on the device.

Shapes: as in op.py; D is Dh rounded up to a power of two, L slots.
"""

import torch
from torch import Tensor

from .._backend import jit, tl, triton
from .._fp8 import FP8, FP8_MAX, saturate
from .._overlap import LINE_BYTES, overlap_options, prefetch_to_l2, wait_for_previous_kernel
from .._row_stats import LOG2_E
from .checks import NewToken

CHUNK = 256  # entries, of fp8 twice as many: reducing the slots after each costs instructions
TILE = 4096  # elements of a key or value tile
STAGES = 3  # two tiles are in flight while one is multiplied; of fp32, whose are larger, one
# Tiles of a sequence's own entries, fetched into L2 while the previous kernel ends. Entries that
# are not live yet are fetched in vain. For many sequences that kernel, a product, is bound by the
# L2 cache and leaves memory idle longer; for still more it is torch's, with which nothing overlaps.
EARLY_TILES, MORE_EARLY_TILES, MANY = 4, 8, range(96, 129)
EARLY_PROGRAMS = 264  # that fetch them: two per multiprocessor, those that start first
SPLIT_BELOW = 256  # programs: fewer than about two per multiprocessor of an H200
MERGED_AT_ONCE = 16  # chunks whose results are loaded together


@jit
def _prefetch_entries(
    cache, stride, S,
    ENTRIES: tl.constexpr, WIDTH: tl.constexpr, LINE: tl.constexpr, LINES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """The first ENTRIES entries of a head, live or not: how many are live is not known yet."""
    entries = tl.minimum(tl.arange(0, ENTRIES), S - 1)
    columns = tl.minimum(tl.arange(0, LINES) * LINE, WIDTH - 1)
    prefetch_to_l2(cache + entries[:, None] * stride + columns[None, :], OVERLAP)


@jit
def _merge(m, l, acc, m_other, l_other, acc_other):
    """The softmax over two sets of entries, each given by m, l and acc as in `_attend_chunk`.

    Explicit multiply-adds: the compiler could fuse differently in the two kernels that merge.
    """
    m_new = tl.maximum(m, m_other)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # -inf: no entry yet
    a = tl.exp2(m - m_safe)
    b = tl.exp2(m_other - m_safe)
    return m_new, tl.fma(l, a, l_other * b), tl.fma(acc, a, acc_other * b)


@jit
def _attend_chunk(
    q, keys, values, first, last, key_stride, value_stride,
    L: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """m the maximum score of the entries [first, last), l = sum exp2(score - m), acc [D] the sum of
    values with these weights.

    Entry s goes to slot s % L of a running softmax. Slots are reduced only after the last entry, so
    that no step waits for another.
    """
    m = tl.full([L], float("-inf"), tl.float32)
    l = tl.zeros([L], tl.float32)
    acc = tl.zeros([L, D], tl.float32)
    d = tl.arange(0, D)
    for start in tl.range(first, last, L, num_stages=STAGES):
        s = start + tl.arange(0, L)
        is_live = s < last
        mask = is_live[:, None]
        if WIDTH < D:
            mask = mask & (d[None, :] < WIDTH)
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
    m_max = tl.max(m, axis=0)
    weight = tl.exp2(m - tl.where(m_max == float("-inf"), 0.0, m_max))
    return m_max, tl.sum(l * weight, axis=0), tl.sum(acc * weight[:, None], axis=0)


@jit
def _attend(
    q, keys, values, first, last, key_stride, value_stride, m, l, acc,
    CHUNK: tl.constexpr, L: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Merge the chunks of the entries [first, last) into m, l and acc, in order."""
    for start in range(first, last, CHUNK):
        end = tl.minimum(start + CHUNK, last)
        m_chunk, l_chunk, acc_chunk = _attend_chunk(
            q, keys, values, start, end, key_stride, value_stride, L, WIDTH, D, STAGES
        )
        m, l, acc = _merge(m, l, acc, m_chunk, l_chunk, acc_chunk)
    return m, l, acc


@jit
def _rotated(x, cos, sin, d, WIDTH: tl.constexpr):
    """The head at `x`, rotated by its row of the tables, in the dtype of `x`; 0 beyond WIDTH.

    Every channel needs its partner, Dh/2 channels away: it is loaded as well.
    """
    inside = d < WIDTH
    is_first = d < WIDTH // 2
    partner = tl.where(is_first, d + WIDTH // 2, d - WIDTH // 2)
    own = tl.load(x + d, mask=inside, other=0.0)
    other = tl.load(x + partner, mask=inside, other=0.0).to(tl.float32)
    angle = tl.where(is_first, d, d - WIDTH // 2)
    c = tl.load(cos + angle, mask=inside, other=0.0)
    s = tl.load(sin + angle, mask=inside, other=0.0)
    return (own.to(tl.float32) * c + tl.where(is_first, -other, other) * s).to(own.dtype)


@jit
def _to_cache(x, cache, FP8_MAX: tl.constexpr):
    """`x` in the dtype of the cache, saturated at FP8_MAX unless that is 0."""
    if FP8_MAX:
        x = saturate(x.to(tl.float32), FP8_MAX)
    return x.to(cache.dtype.element_ty)


@jit
def _decode_kernel(
    # query [B, H, Dh], caches [B, Hkv, S, Dh], entries [B]
    query, keys, values, lengths,
    # Prefixes [N, Hkv, S_p, Dh], entries seen [B], prefix of a sequence or -1 [B]; or four None
    prefix_keys, prefix_values, prefix_lengths, prefix_index,
    # New key and value [B, Hkv, Dh], tables [P, Dh/2]; or four None
    new_key, new_value, cos, sin,
    # context [B, H, Dh], or its parts: sums [B, H, C, D] and maxima, weights [2, B, H, C]
    context, parts,
    # Scale of the scores for exp2, sizes
    scale, H, S, prefix_S, P,
    # Strides of query, caches, prefixes, new key and value, tables and context, by dimension
    q_b, q_h, k_b, k_h, k_s, v_b, v_h, v_s, pk_n, pk_h, pk_s, pv_n, pv_h, pv_s,
    nk_b, nk_h, nv_b, nv_h, table_p, c_b, c_h,
    # H / Hkv; Dh, and that rounded up to a power of two; slots; the largest fp8 or 0
    HEADS_PER_KV: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, L: tl.constexpr,
    CHUNK: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr, FP8_MAX: tl.constexpr,
    EARLY: tl.constexpr, EARLY_PROGRAMS: tl.constexpr, LINE: tl.constexpr, LINES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One head of one sequence; SPLIT: one chunk of it, those of the prefix first."""
    h = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    kv = h // HEADS_PER_KV
    d = tl.arange(0, D)
    if EARLY:  # noqa: SIM102
        if b * H + h < EARLY_PROGRAMS:
            own = keys + b * k_b + kv * k_h
            _prefetch_entries(own, k_s, S, EARLY, WIDTH, LINE, LINES, OVERLAP)
            own = values + b * v_b + kv * v_h
            _prefetch_entries(own, v_s, S, EARLY, WIDTH, LINE, LINES, OVERLAP)
    # The projections and, some kernels earlier, the lengths and entries were written in this step.
    wait_for_previous_kernel(OVERLAP)
    length = tl.load(lengths + b).to(tl.int32)
    prefix_length = 0
    n = b
    if prefix_keys is not None:
        n = tl.load(prefix_index + b).to(tl.int64)
        if n >= 0:
            prefix_length = tl.minimum(tl.load(prefix_lengths + b).to(tl.int32), prefix_S)
    position = tl.maximum(tl.minimum(prefix_length + length, P - 1), 0).to(tl.int64)
    length = tl.minimum(length, S)
    if new_key is None:
        q = tl.load(query + b * q_b + h * q_h + d, mask=d < WIDTH, other=0.0)
    else:
        cos += position * table_p
        sin += position * table_p
        q = _rotated(query + b * q_b + h * q_h, cos, sin, d, WIDTH)
    q = q.to(tl.float32) * scale
    chunk = tl.program_id(2)
    m = tl.full([], float("-inf"), tl.float32)
    l = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([D], tl.float32)
    # The first condition is decided when the kernel is compiled.
    if new_key is not None:  # noqa: SIM102
        if chunk == 0:
            k = _rotated(new_key + b * nk_b + kv * nk_h, cos, sin, d, WIDTH)
            k = _to_cache(k, keys, FP8_MAX)
            v = tl.load(new_value + b * nv_b + kv * nv_h + d, mask=d < WIDTH, other=0.0)
            v = _to_cache(v, values, FP8_MAX)
            m = tl.sum(q * k.to(tl.float32), axis=0)
            l = tl.full([], 1.0, tl.float32)
            acc = v.to(tl.float32)
            # Query heads that share keys compute the same ones; the first of them stores them.
            # Nobody reads the entry in this launch: `length` does not include it.
            if h % HEADS_PER_KV == 0:
                # Nothing outside the cache.
                to_store = d < tl.where((length >= 0) & (length < S), WIDTH, 0)
                entry = length.to(tl.int64)
                tl.store(keys + b * k_b + kv * k_h + entry * k_s + d, k, mask=to_store)
                tl.store(values + b * v_b + kv * v_h + entry * v_s + d, v, mask=to_store)
    first = 0
    last = length
    if prefix_keys is not None:
        prefix_last = prefix_length
        if SPLIT:
            first = tl.minimum(chunk * CHUNK, prefix_length)
            prefix_last = tl.minimum(first + CHUNK, prefix_length)
        m, l, acc = _attend(
            q, prefix_keys + n * pk_n + kv * pk_h, prefix_values + n * pv_n + kv * pv_h,
            first, prefix_last, pk_s, pv_s, m, l, acc, CHUNK, L, WIDTH, D, STAGES,
        )  # fmt: skip
        first = 0
    if SPLIT:
        own_chunk = chunk - tl.cdiv(prefix_S, CHUNK)
        first = tl.where(own_chunk < 0, length, tl.minimum(own_chunk * CHUNK, length))
        last = tl.minimum(first + CHUNK, length)
    m, l, acc = _attend(
        q, keys + b * k_b + kv * k_h, values + b * v_b + kv * v_h,
        first, last, k_s, v_s, m, l, acc, CHUNK, L, WIDTH, D, STAGES,
    )  # fmt: skip
    if SPLIT:
        chunks = tl.num_programs(2)
        row = (b * H + h) * chunks + chunk
        tl.store(context + row * D + d, acc)
        tl.store(parts + row, m)
        tl.store(parts + tl.num_programs(1).to(tl.int64) * H * chunks + row, l)
    else:
        out = acc / tl.where(l == 0.0, 1.0, l)
        tl.store(context + b * c_b + h * c_h + d, out.to(context.dtype.element_ty), mask=d < WIDTH)


@jit
def _merge_kernel(
    sums, parts, context,  # [B, H, C, D], [2, B, H, C], [B, H, Dh]
    chunks,
    WIDTH: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Merge the chunks of one head of one sequence, in order."""
    row = tl.program_id(0).to(tl.int64)
    weights = parts + tl.num_programs(0).to(tl.int64) * chunks
    d = tl.arange(0, D)
    m = tl.full([], float("-inf"), tl.float32)
    l = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([D], tl.float32)
    wait_for_previous_kernel(OVERLAP)
    for first in range(0, chunks, BLOCK):
        for i in tl.static_range(BLOCK):  # loads do not wait for merges
            chunk = row * chunks + tl.minimum(first + i, chunks - 1)
            m_chunk = tl.where(first + i < chunks, tl.load(parts + chunk), float("-inf"))
            l_chunk = tl.load(weights + chunk)
            acc_chunk = tl.load(sums + chunk * D + d)
            m, l, acc = _merge(m, l, acc, m_chunk, l_chunk, acc_chunk)
    out = acc / tl.where(l == 0.0, 1.0, l)
    tl.store(context + row * WIDTH + d, out.to(context.dtype.element_ty), mask=d < WIDTH)


def decode_launch(head_width: int, cache_bytes: int) -> dict[str, int | bool]:
    """Chunks, and 16 elements of a key and of a value tile per thread: two programs (Triton 3.6) or
    three (3.9) share a multiprocessor of an H200, each with 32 KB in flight, for any number of
    sequences."""
    D = max(16, triton.next_power_of_2(head_width))
    slots = max(16, min(TILE // D, CHUNK))
    return {
        "D": D, "L": slots, "CHUNK": 2 * CHUNK if cache_bytes == 1 else CHUNK,
        "STAGES": STAGES - 1 if cache_bytes == 4 else STAGES,  # sm_80 spills with 3
        "num_warps": max(slots * D // 512, 1), "enable_fp_fusion": True,
    }  # fmt: skip


def decode_triton(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor,
    prefix: tuple[Tensor | None, ...], scale: float, new: NewToken | None = None,
) -> Tensor:  # fmt: skip
    """One launch, or two if it is split; `prefix` is (keys, values, lengths, index) or four None.

    With `new`, `query` is rotated first and the new token is entry `lengths` of its sequence.
    """
    B, H, width = query.shape
    S, prefix_S = keys.shape[2], 0 if prefix[0] is None else prefix[0].shape[2]
    options = decode_launch(width, keys.element_size())
    chunks = -(-S // options["CHUNK"]) + -(-prefix_S // options["CHUNK"])
    split = B * H < SPLIT_BELOW and chunks > 1
    context = query.new_empty(B, H, width)
    out, parts = context, None
    if split:
        out = query.new_empty(B, H, chunks, options["D"], dtype=torch.float32)
        parts = query.new_empty(2, B, H, chunks, dtype=torch.float32)
    new_tensors = (None,) * 4 if new is None else new
    strides = [*query.stride()[:2], *keys.stride()[:3], *values.stride()[:3]]
    strides += [0] * 6 if not prefix_S else [s for t in prefix[:2] for s in t.stride()[:3]]
    strides += [0] * 5 if new is None else [s for t in new[:2] for s in t.stride()[:2]]
    strides += [] if new is None else [new.cos.stride(0)]
    overlap, line = overlap_options(), LINE_BYTES // keys.element_size()
    # Not of fp32 caches: the addresses' registers would spill.
    early = overlap["OVERLAP"] and not split and keys.element_size() < 4
    _decode_kernel[(H, B, chunks if split else 1)](
        query, keys, values, lengths, *prefix, *new_tensors, out, parts,
        scale * LOG2_E, H, S, prefix_S, 1 if new is None else len(new.cos),
        *strides, *context.stride()[:2],
        HEADS_PER_KV=H // keys.shape[1], WIDTH=width, SPLIT=split,
        FP8_MAX=FP8_MAX if keys.dtype == FP8 else 0,
        EARLY=(MORE_EARLY_TILES if B in MANY else EARLY_TILES) * options["L"] if early else 0,
        EARLY_PROGRAMS=EARLY_PROGRAMS, LINE=line,
        LINES=triton.next_power_of_2(-(-width // line)), **options, **overlap,
    )  # fmt: skip
    if split:
        _merge_kernel[(B * H,)](
            out, parts, context, chunks, WIDTH=width, D=options["D"],
            BLOCK=min(triton.next_power_of_2(chunks), MERGED_AT_ONCE), num_warps=1,
            enable_fp_fusion=True, **overlap,
        )  # fmt: skip
    return context
