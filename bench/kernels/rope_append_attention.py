"""rope_append_attention: rotate and append a new token per sequence, and attend to all entries.

Shapes as in `bench.kernels.decode_attention`; query, key and value are parts of one projection's
output. Minimum bytes: the live keys and values once. Compared with the two ops that it replaces,
on a GPU inside a CUDA graph.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from iris_kernels import decode_attention, rope_append, rope_append_attention
from torch import Tensor

from bench.harness.case import Call, Case, check_close
from bench.kernels.decode_attention import CPU_GRID, GPU_GRID, SLOTS, WIDTH, live_entries

SUITE = "kernels"
FEW_SEQUENCES = 2  # split over more programs


class Inputs(NamedTuple):
    """Projection [B, 3 H, Dh], tables [S, Dh/2], caches [B, H, S, Dh], entries [B] so far."""

    fused: Tensor
    cos: Tensor
    sin: Tensor
    key_cache: Tensor
    value_cache: Tensor
    lengths: Tensor


def cases(device: torch.device) -> Iterator[Case]:
    heads, sequences, dtype = GPU_GRID if device.type == "cuda" else CPU_GRID
    for H, B in product(heads, (FEW_SEQUENCES, *sequences)):
        yield Case(
            case="rope_append_attention",
            shape={"H": H, "B": B, "S": SLOTS, "Dh": WIDTH},
            dtype=dtype,
            metric="forward",
            unit="us",
            bytes=2 * int(live_entries(B).sum()) * H * WIDTH * dtype.itemsize,
            flops=0,
            make_inputs=partial(make_inputs, B, H, dtype, device),
            candidates={name: partial(_prepare, run) for name, run in CANDIDATES.items()},
            check=check,
            in_graph=True,
        )


def make_inputs(B: int, H: int, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    angles = randn(SLOTS, WIDTH // 2, dtype=torch.float32)
    caches = (randn(B, H, SLOTS, WIDTH) for _ in range(2))
    lengths = live_entries(B).to(device)
    return Inputs(randn(B, 3 * H, WIDTH), angles.cos(), angles.sin(), *caches, lengths)


def _prepare(run: Callable[[Inputs], Tensor], inputs: Inputs) -> Call:
    """Repeated calls write the same entries again."""
    return lambda: run(inputs)


def ours(inputs: Inputs) -> Tensor:
    query, key, value = inputs.fused.chunk(3, 1)
    return rope_append_attention(query, key, value, *inputs[1:])


def two_ops(inputs: Inputs) -> Tensor:
    """With the tables' rows and the lengths that the step makes once for all layers."""
    query, key, value = inputs.fused.chunk(3, 1)
    _, cos, sin, keys, values, lengths = inputs
    tables = cos[lengths], sin[lengths]
    rotated = rope_append(query, key, value, *tables, keys, values, lengths)
    return decode_attention(rotated, keys, values, lengths + 1)


CANDIDATES = {"ours": ours, "two ops": two_ops}


def check(inputs: Inputs, context: Tensor) -> None:
    check_close("context", context, two_ops(inputs))
