"""Random numbers that depend on names, not on the order of calls.

Every sample draws from streams of its own, so its numbers are the same whatever batch, rank or
restart it is drawn in. They come from torch's CPU generator, whose sequence is fixed.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator(seed: int, stream: str, number: int) -> torch.Generator:
    """A CPU generator for one (seed, stream, number), independent of every other."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{number}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def uniforms(seed: int, stream: str, numbers: list[int], count: int) -> Tensor:
    """[len(numbers), count] float32 in [0, 1): one stream a row, on the CPU."""
    rows = [torch.rand(count, generator=generator(seed, stream, n)) for n in numbers]
    return torch.stack(rows) if rows else torch.empty(0, count)
