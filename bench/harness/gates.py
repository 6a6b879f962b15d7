"""What the ops' gate cases share: see `bench/kernels/compile_gates.py`."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

HEAD_WIDTHS = (64, 128)
WIDTHS = ((2048, 5632), (4096, 11008))  # hidden and intermediate, of Janus-Pro-1B and 7B
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
FP8 = torch.float8_e4m3fn
# Issuing at most this share of the memory time leaves the loads room to overlap.
ISSUE_LIMIT = 0.8
FIRST_FP8_ARCHITECTURE = 89  # older GPUs have no e4m3


class Work(NamedTuple):
    """What one kernel launch works on, for the model of `bench.harness.sass`."""

    elements: int  # one logit, one pair of logits, one output element: what the kernel loops over
    bytes: int  # moved, as the op's docstring counts them
    trips: tuple[float, ...] = ()  # how often a program runs each loop of the kernel
    issue_limit: float | None = None  # issue time <= this times the memory time


class GateCase(NamedTuple):
    """A launch of one op, as its public function makes it, on tensors without storage."""

    name: str
    launch: Callable[[], object]
    work: Sequence[Work] = ()  # of each kernel launched; none: only compiled
    min_architecture: int = 0


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without storage."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def vectors(count: int, length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """`count` vectors without storage."""
    return [meta(length, dtype=dtype) for _ in range(count)]


def vocabulary_cases(
    name: str,
    launch: Callable[[int, torch.dtype], None],
    work: Callable[[int, torch.dtype], Sequence[Work]],
    vocabularies: Sequence[int],
) -> Iterator[GateCase]:
    """An op over logits, `launch(vocab_size, dtype)`, for every dtype and vocabulary."""
    for dtype_name, dtype in DTYPES.items():
        for V in vocabularies:
            yield GateCase(f"{name} V={V} {dtype_name}", partial(launch, V, dtype), work(V, dtype))


def cache_cases(
    name: str,
    launch: Callable[[int, torch.dtype, torch.dtype], None],
    work: Callable[[int, torch.dtype, torch.dtype], Sequence[Work]],
) -> Iterator[GateCase]:
    """An op on a key-value cache, `launch(head_dim, dtype, cache_dtype)`, fp8 caches included."""
    for width in HEAD_WIDTHS:
        caches = {name: (dtype, dtype, 0) for name, dtype in DTYPES.items()}
        caches["fp8 cache"] = (torch.bfloat16, FP8, FIRST_FP8_ARCHITECTURE)
        for cache, (*dtypes, architecture) in caches.items():
            yield GateCase(
                f"{name} Dh={width} {cache}", partial(launch, width, *dtypes),
                work(width, *dtypes), architecture,
            )  # fmt: skip
