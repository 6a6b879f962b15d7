"""rope: rotate query and key rows of a packed batch, forward and backward.

Shapes of a training pass of Janus-Pro-1B (16 heads) and 7B (32 heads) at head width 128. Minimum
bytes: query and key read and written, the tables read; twice, for both passes. On a GPU only: the
training pass on a CPU does not use it.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from iris_kernels import rope
from iris_kernels.rope import rope_triton
from iris_kernels.rope_append import rope_append_reference
from torch import Tensor

from bench.harness import peers
from bench.harness.case import Call, Case
from bench.harness.gates import DTYPES, HEAD_WIDTHS, ISSUE_LIMIT, GateCase, Work, meta
from bench.harness.gradients import check_gradients, forward_backward

SUITE = "kernels"
ROWS, WIDTH, THETA = 40320, 128, 10000.0
SEQUENCE = 630  # positions repeat after that
GPU_HEADS = (16, 32)

# (query, key, cos, sin) -> rotated query and key
Compute = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def cases(device: torch.device) -> Iterator[Case]:
    for H in GPU_HEADS if device.type == "cuda" else ():
        dtype = torch.bfloat16
        yield Case(
            case="rope",
            shape={"T": ROWS, "H": H, "Dh": WIDTH},
            dtype=dtype,
            metric="forward+backward",
            unit="us",
            bytes=2 * ROWS * WIDTH * (4 * H * dtype.itemsize + 4),
            flops=0,
            make_inputs=partial(make_inputs, ROWS, H, dtype, device),
            candidates={name: partial(_prepare, load, device) for name, load in CANDIDATES.items()},
            check=check,
        )


def make_inputs(
    T: int, H: int, dtype: torch.dtype, device: torch.device, seed: int
) -> list[Tensor]:
    """Query, key, their upstream gradients [T, H, Dh], and the tables [T, Dh/2]."""
    generator = torch.Generator(device).manual_seed(seed)
    rows = [
        torch.randn(T, H, WIDTH, dtype=dtype, device=device, generator=generator) for _ in range(4)
    ]
    powers = torch.arange(0, WIDTH, 2, device=device) / WIDTH
    angles = (torch.arange(T, device=device) % SEQUENCE)[:, None] / THETA**powers
    return [*rows, angles.cos(), angles.sin()]


def _prepare(load: Callable, device: torch.device, inputs: list[Tensor]) -> Call:
    compute, (cos, sin) = load(device), inputs[4:]
    return forward_backward(
        lambda query, key: compute(query, key, cos, sin), inputs[:2], inputs[2:4]
    )


def ours(device: torch.device) -> Compute:
    return rope


def plain(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """The rotation of transformers' Llama."""
    cos, sin = (torch.cat([table, table], dim=-1)[:, None] for table in (cos, sin))

    def rotate(x: Tensor) -> Tensor:
        wide = x.float()
        first, second = wide.chunk(2, dim=-1)
        return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)

    return rotate(query), rotate(key)


CANDIDATES = {"ours": ours, **peers.in_torch(plain)}


def check(inputs: list[Tensor], result: tuple[list[Tensor], list[Tensor]]) -> None:
    query, key, d_query, d_key, cos, sin = inputs

    def reference(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        c, s = (t[: len(query)].double() for t in (cos, sin))
        return rope_append_reference(query, c, s), rope_append_reference(key, c, s)

    check_gradients(reference, {"query": query, "key": key}, [d_query, d_key], result)


def _gate(width: int, dtype: torch.dtype) -> None:
    """Query and key of two products."""
    rows = [meta(ROWS, 16, width, dtype=dtype) for _ in range(2)]
    tables = meta(2, ROWS, width // 2)
    rope_triton(*rows, *tables, False)


def gate_cases(vocabularies: Sequence[int]) -> Iterator[GateCase]:
    for width in HEAD_WIDTHS:
        for name, dtype in DTYPES.items():
            elements = 2 * ROWS * 16 * width
            moved = 2 * elements * dtype.itemsize + ROWS * width * 4
            work = Work(elements, moved, issue_limit=ISSUE_LIMIT)
            yield GateCase(f"rope Dh={width} {name}", partial(_gate, width, dtype), [work])
