"""rope_append: rotate query and key of one new token per sequence, append key and value.

Shapes of Janus-Pro-1B (16 heads) and 7B (32 heads) at head width 128; query, key and value are
parts of one projection's output. Minimum bytes: those read and written once, tables and slots read.
At these sizes the launch takes longer than moving the bytes; on a GPU timed inside a CUDA graph, as
in a decoding loop.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from iris_kernels import rope_append
from iris_kernels.rope_append import rope_append_reference, rope_append_triton
from torch import Tensor

from bench.harness import peers
from bench.harness.case import Call, Case, check_close
from bench.harness.gates import GateCase, Work, cache_cases, meta

SUITE = "kernels"
SLOTS, WIDTH = 8, 128  # few slots: only one is touched, and the inputs must exceed the cache
THETA = 10000.0
GPU_GRID = ((16, 32), (64, 256), torch.bfloat16)
CPU_GRID = ((16,), (16, 64), torch.float32)


class Inputs(NamedTuple):
    """Projection [B, 3 H, Dh], tables [B, Dh/2], caches [B, H, S, Dh], slots [B]."""

    fused: Tensor
    cos: Tensor
    sin: Tensor
    key_cache: Tensor
    value_cache: Tensor
    slots: Tensor


class Result(NamedTuple):
    """The rotated query, and the caches' keys and values at the slots, each [B, H, Dh]."""

    query: Tensor
    key: Tensor
    value: Tensor


def cases(device: torch.device) -> Iterator[Case]:
    heads, sequences, dtype = GPU_GRID if device.type == "cuda" else CPU_GRID
    for H, B in product(heads, sequences):
        yield Case(
            case="rope_append",
            shape={"H": H, "B": B, "S": SLOTS, "Dh": WIDTH},
            dtype=dtype,
            metric="forward",
            unit="us",
            bytes=B * (6 * H * WIDTH * dtype.itemsize + WIDTH * 4 + 8),
            flops=0,
            make_inputs=partial(make_inputs, B, H, dtype, device),
            candidates={name: partial(_prepare, load, device) for name, load in CANDIDATES.items()},
            check=check,
            in_graph=True,
        )


def make_inputs(B: int, H: int, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    fused = torch.randn(B, 3 * H, WIDTH, dtype=dtype, device=device, generator=generator)
    slots = torch.randint(SLOTS, (B,), device=device, generator=generator)
    powers = torch.arange(0, WIDTH, 2, device=device) / WIDTH
    angles = slots[:, None] / THETA**powers
    caches = (torch.zeros(B, H, SLOTS, WIDTH, dtype=dtype, device=device) for _ in range(2))
    return Inputs(fused, angles.cos(), angles.sin(), *caches, slots)


def _prepare(load: Callable, device: torch.device, inputs: Inputs) -> Call:
    """A call can be repeated: it writes the same values to the same slots again."""
    compute, rows = load(device), torch.arange(len(inputs.slots), device=device)
    parts = inputs.fused.chunk(3, dim=1)

    def call() -> tuple[Tensor, Callable[[], Result]]:
        query = compute(*parts, *inputs[1:])

        def read() -> Result:
            caches = (inputs.key_cache, inputs.value_cache)
            return Result(query, *(cache[rows, :, inputs.slots] for cache in caches))

        return query, read

    return call


def ours(device: torch.device) -> Callable[..., Tensor]:
    return rope_append


def plain(query, key, value, cos, sin, key_cache, value_cache, slots) -> Tensor:
    """The rotation of transformers' Llama, and two indexed writes."""
    cos, sin = (torch.cat([table, table], dim=-1)[:, None] for table in (cos, sin))

    def rotate(x: Tensor) -> Tensor:
        wide = x.float()
        first, second = wide.chunk(2, dim=-1)
        return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)

    rows = torch.arange(len(slots), device=slots.device)
    key_cache[rows, :, slots] = rotate(key)
    value_cache[rows, :, slots] = value
    return rotate(query)


CANDIDATES = {"ours": ours, **peers.in_torch(plain)}


def check(inputs: Inputs, result: tuple[Tensor, Callable[[], Result]]) -> None:
    query, key, value = inputs.fused.double().chunk(3, dim=1)
    cos, sin = inputs.cos.double(), inputs.sin.double()
    found = result[1]()
    check_close("query", found.query, rope_append_reference(query, cos, sin))
    check_close("key", found.key, rope_append_reference(key, cos, sin))
    check_close("value", found.value, value)


def _gate(width: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    """Query, key and value of 64 sequences from one projection."""
    fused, tables = meta(64, 48, width, dtype=dtype), [meta(64, width // 2) for _ in range(2)]
    caches = [meta(64, 16, 576, width, dtype=cache_dtype) for _ in range(2)]
    rope_append_triton(*fused.split(16, dim=1), *tables, *caches, meta(64, dtype=torch.int64))


def _work(width: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> list[Work]:
    elements = 64 * 48 * width
    written = elements // 3 * (dtype.itemsize + 2 * cache_dtype.itemsize)
    return [Work(elements, elements * dtype.itemsize + written)]


def gate_cases(vocabularies: Sequence[int]) -> Iterator[GateCase]:
    return cache_cases("rope_append", _gate, _work)
