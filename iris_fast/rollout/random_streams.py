"""Random numbers that depend on names, not on the order of calls.

Each sample has its own streams, so its numbers do not depend on the batch, the rank or a restart.
They come from NumPy's Philox, whose key takes a whole 128-bit hash of the name: torch's CPU
generator would keep 32 bits of it, and two of some 65,000 streams would coincide.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor


def generator(seed: int, stream: str, number: int) -> np.random.Generator:
    """A generator for one (seed, stream, number), independent of every other."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{number}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def uniforms(seed: int, stream: str, numbers: list[int], count: int) -> Tensor:
    """Float32 [len(numbers), count] in [0, 1) on the CPU: one stream per row."""
    values = np.empty((len(numbers), count), dtype=np.float32)
    for row, number in zip(values, numbers, strict=True):
        generator(seed, stream, number).random(dtype=np.float32, out=row)
    return torch.from_numpy(values)
