"""rope_append: query and key of one new token a sequence turned, key and value into the cache.

Shapes of Janus-Pro-1B (16 heads) and 7B (32 heads) at head width 128; query, key and value are
parts of one projection's output. Least bytes: those read once, written once, the tables and slots.
At these sizes a launch takes longer than the bytes do; on a GPU timed inside a CUDA graph, as a
decoding loop runs it.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from iris_kernels import rope_append
from torch import Tensor

from bench import _peers
from bench._case import Call, Case, check_close

SUITE = "kernels"
SLOTS, WIDTH = 8, 128  # few: one of them is touched, and all inputs together must leave the cache
THETA = 10000.0
GPU_GRID = ((16, 32), (64, 256), torch.bfloat16)
CPU_GRID = ((16,), (64,), torch.float32)


class Inputs(NamedTuple):
    """Projection [B, 3 H, Dh], tables [B, Dh/2], caches [B, H, S, Dh], slots [B]."""

    fused: Tensor
    cos: Tensor
    sin: Tensor
    key_cache: Tensor
    value_cache: Tensor
    slots: Tensor


class Result(NamedTuple):
    """The rotated query [B, H, Dh], and what the caches hold at the slots, likewise."""

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
    """Writing the same to the same places again changes nothing."""
    compute, rows = load(device), torch.arange(len(inputs.slots), device=device)
    parts = inputs.fused.chunk(3, dim=1)

    def call() -> tuple[Tensor, Callable[[], Result]]:
        query = compute(*parts, *inputs[1:])

        def read() -> Result:
            held = (inputs.key_cache, inputs.value_cache)
            return Result(query, *(cache[rows, :, inputs.slots] for cache in held))

        return query, read

    return call


def ours(device: torch.device) -> Callable[..., Tensor]:
    return rope_append


def plain(query, key, value, cos, sin, key_cache, value_cache, slots) -> Tensor:
    """As transformers' Llama turns them, and two writes by index."""
    cos, sin = (torch.cat([table, table], dim=-1)[:, None] for table in (cos, sin))

    def turn(x: Tensor) -> Tensor:
        wide = x.float()
        first, second = wide.chunk(2, dim=-1)
        return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)

    rows = torch.arange(len(slots), device=slots.device)
    key_cache[rows, :, slots] = turn(key)
    value_cache[rows, :, slots] = value
    return turn(query)


def eager(device: torch.device) -> Callable[..., Tensor]:
    return plain


def compiled(device: torch.device) -> Callable[..., Tensor]:
    return _peers.compiled(plain, device)


CANDIDATES = {"ours": ours, "eager": eager, "torch.compile": compiled}


def check(inputs: Inputs, result: tuple[Tensor, Callable[[], Result]]) -> None:
    query, key, value = inputs.fused.chunk(3, dim=1)
    angle = torch.complex(inputs.cos.double(), inputs.sin.double())[:, None]
    found = result[1]()
    for name, given in (("query", query), ("key", key)):
        turned = torch.complex(*given.double().chunk(2, dim=-1)) * angle
        reference = torch.cat([turned.real, turned.imag], dim=-1)
        check_close(name, getattr(found, name), reference)
    check_close("value", found.value, value)
