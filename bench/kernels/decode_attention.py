"""decode_attention: one query per sequence against the live part of a static cache.

Shapes of Janus-Pro-1B (16 heads) and 7B (32 heads) at head width 128, about 400 live entries of
704. Minimum bytes: the live keys and values once. All lengths differ, so a peer that cannot read
them on the device reads more. On a GPU timed inside a CUDA graph, as in a decoding loop.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from iris_kernels import decode_attention
from iris_kernels.decode_attention import (
    NewToken,
    decode_attention_reference,
    decode_launch,
    decode_triton,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.harness import peers
from bench.harness.case import Call, Case, check_close
from bench.harness.gates import GateCase, Work, cache_cases, meta, vectors

SUITE = "kernels"
SLOTS, WIDTH = 704, 128
SHORTEST, LONGEST = 352, 448  # live entries, spread evenly over the sequences
CHECKED_SEQUENCES = 8
GPU_GRID = ((16, 32), (16, 64, 128, 256), torch.bfloat16)
CPU_GRID = ((16,), (16,), torch.float32)


class Inputs(NamedTuple):
    """Query [B, H, Dh], caches [B, H, S, Dh], live entries [B]."""

    query: Tensor
    keys: Tensor
    values: Tensor
    lengths: Tensor


def cases(device: torch.device) -> Iterator[Case]:
    heads, sequences, dtype = GPU_GRID if device.type == "cuda" else CPU_GRID
    for H, B in product(heads, sequences):
        live = int(live_entries(B).sum())
        yield Case(
            case="decode_attention",
            shape={"H": H, "B": B, "S": SLOTS, "Dh": WIDTH},
            dtype=dtype,
            metric="forward",
            unit="us",
            bytes=2 * live * H * WIDTH * dtype.itemsize,
            flops=0,
            make_inputs=partial(make_inputs, B, H, dtype, device),
            candidates={name: partial(_prepare, load, device) for name, load in CANDIDATES.items()},
            check=check,
            in_graph=True,
        )


def live_entries(B: int) -> Tensor:
    return torch.linspace(SHORTEST, LONGEST, B).round().int()


def make_inputs(B: int, H: int, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    caches = (randn(B, H, SLOTS, WIDTH) for _ in range(2))
    return Inputs(randn(B, H, WIDTH), *caches, live_entries(B).to(device))


def _prepare(load: Callable, device: torch.device, inputs: Inputs) -> Call:
    return load(device)(inputs)


# --- Ours and the peers: each returns the context [B, H, Dh] --------------------------------------


def ours(device: torch.device) -> Callable[[Inputs], Call]:
    return lambda inputs: lambda: decode_attention(*inputs)


def masked_sdpa(device: torch.device) -> Callable[[Inputs], Call]:
    """torch's attention over the whole cache with a mask; can run in a CUDA graph."""

    def prepare(inputs: Inputs) -> Call:
        alive = torch.arange(SLOTS, device=device) < inputs.lengths[:, None]
        mask, query = alive[:, None, None], inputs.query[:, :, None]

        def call():
            context = scaled_dot_product_attention(query, inputs.keys, inputs.values, mask)
            return context[:, :, 0]

        return call

    return prepare


def cut_sdpa(device: torch.device) -> Callable[[Inputs], Call]:
    """The same over the longest sequence's entries only; the host must know their number."""

    def prepare(inputs: Inputs) -> Call:
        alive = torch.arange(LONGEST, device=device) < inputs.lengths[:, None]
        mask, query = alive[:, None, None], inputs.query[:, :, None]
        keys, values = inputs.keys[:, :, :LONGEST], inputs.values[:, :, :LONGEST]
        return lambda: scaled_dot_product_attention(query, keys, values, mask)[:, :, 0]

    return prepare


def flex(device: torch.device) -> Callable[[Inputs], Call]:
    """torch's flex attention with a block mask made beforehand; on GPUs only."""
    module = peers.load("torch.nn.attention.flex_attention", device)
    function = peers.compiled(module.flex_attention, device)

    def prepare(inputs: Inputs) -> Call:
        B = len(inputs.lengths)

        def alive(b, h, q, s):
            return s < inputs.lengths[b]

        mask = module.create_block_mask(alive, B, None, 1, SLOTS, device=device)
        query = inputs.query[:, :, None]
        return lambda: function(query, inputs.keys, inputs.values, block_mask=mask)[:, :, 0]

    return prepare


def flash_attn(device: torch.device) -> Callable[[Inputs], Call]:
    """flash-attn's decoding kernel, on caches in its own layout [B, S, H, Dh]."""
    function = peers.load("flash_attn", device).flash_attn_with_kvcache

    def prepare(inputs: Inputs) -> Call:
        keys, values = (t.transpose(1, 2).contiguous() for t in (inputs.keys, inputs.values))
        query = inputs.query[:, None]
        return lambda: function(query, keys, values, cache_seqlens=inputs.lengths)[:, 0]

    return prepare


def xformers(device: torch.device) -> Callable[[Inputs], Call]:
    """xformers' split-K kernel, on caches in its own layout [1, B S, H, Dh]."""
    fmha = peers.load("xformers.ops.fmha", device)

    def prepare(inputs: Inputs) -> Call:
        B, H, width = inputs.query.shape
        keys, values = (
            t.transpose(1, 2).reshape(1, B * SLOTS, H, width) for t in (inputs.keys, inputs.values)
        )
        bias = fmha.attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
            q_seqlen=[1] * B, kv_padding=SLOTS, kv_seqlen=inputs.lengths.tolist()
        )
        query, split_k = inputs.query[None], fmha.triton_splitk.FwOp
        run = fmha.memory_efficient_attention_forward
        return lambda: run(query, keys, values, attn_bias=bias, op=split_k)[0]

    return prepare


CANDIDATES = {
    "ours": ours,
    "sdpa, masked": masked_sdpa,
    "sdpa, cut": cut_sdpa,
    "flex": flex,
    "flash-attn": flash_attn,
    "xformers": xformers,
}


def check(inputs: Inputs, context: Tensor) -> None:
    """Some sequences, one at a time, in float64."""
    for b in torch.linspace(0, len(inputs.lengths) - 1, CHECKED_SEQUENCES).long().tolist():
        one = slice(b, b + 1)
        query, keys, values = (t[one].double() for t in inputs[:3])
        reference = decode_attention_reference(query, keys, values, inputs.lengths[one])
        check_close(f"context of sequence {b}", context[one], reference)


def _gate(
    width: int, dtype: torch.dtype, cache_dtype: torch.dtype, B: int = 64, new: bool = True
) -> None:
    """B sequences of 16 heads, with a shared prefix and, if `new`, a new token each."""
    own, shared = (
        [meta(count, 16, length, width, dtype=cache_dtype) for _ in range(2)]
        for count, length in ((B, 576), (9, 64))
    )
    lengths, index = vectors(2, B, torch.int32)
    query, key, value = (meta(B, 16, width, dtype=dtype) for _ in range(3))
    token = NewToken(key, value, *(meta(640, width // 2) for _ in range(2))) if new else None
    decode_triton(query, *own, lengths, (*shared, lengths, index), width**-0.5, token)


def _work(width: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> list[Work]:
    """Every slot of the caches and of the prefixes live; an element is one of a key and a value.

    The loops are those over chunks and over the entries of a chunk, of the prefix and then of the
    cache.
    """
    launch = decode_launch(width, cache_dtype.itemsize)
    entries, distinct = 64 * (576 + 64), 64 * 576 + 9 * 64
    trips = [
        math.ceil(live / size) for live in (64, 576) for size in (launch["CHUNK"], launch["L"])
    ]
    moved = 2 * distinct * 16 * width * cache_dtype.itemsize
    return [Work(entries * 16 * width, moved, tuple(trips))]


def gate_cases(vocabularies: Sequence[int]) -> Iterator[GateCase]:
    """With the new token as in a step; few sequences, whose chunks are merged; and without it."""
    yield from cache_cases("rope_append_attention", _gate, _work)
    few = partial(_gate, WIDTH, torch.bfloat16, torch.bfloat16, 2)
    yield GateCase("rope_append_attention B=2 bfloat16", few)
    alone = partial(_gate, WIDTH, torch.bfloat16, torch.bfloat16, new=False)
    yield GateCase("decode_attention bfloat16", alone)
