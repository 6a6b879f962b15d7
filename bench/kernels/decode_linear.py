"""decode_linear: a decoding step's products of few rows [M, K] with a weight [N, K].

The four products of a layer of Janus-Pro-1B: QKV, the output projection and the MLP's last product
as partial sums, and the gated product with its silu. Minimum bytes: the weight and the rows once,
and the result, in the dtype of the rows. On a GPU timed inside a CUDA graph, as in a decoding loop,
where consecutive launches overlap.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from iris_kernels import decode_linear, decode_linear_partials
from iris_kernels.decode_linear import (
    BLOCK_K,
    decode_linear_reference,
    linear_triton,
    parts_of,
)
from torch import Tensor

from bench.harness import peers
from bench.harness.case import Call, Case, check_close
from bench.harness.gates import GateCase, Work, meta

SUITE = "kernels"
# name: (N, K, kind) of 1B
PRODUCTS = {
    "qkv": (6144, 2048, "plain"),
    "out": (2048, 2048, "partial"),
    "gate_up": (11264, 2048, "gated"),
    "down": (2048, 5632, "partial"),
}
GPU_ROWS = (2, 16, 64, 128)
CPU_GRID = ((16, "qkv"),)
GATE_ROWS = (2, 64, 128)
# With the widest tiles: of 1B's image head, and of 7B; and with tiles in two parts.
WIDE_GATES = {
    "qkv 7B": (12288, 4096, "plain"),
    "down": (2048, 5632, "partial"),
    "head": (16384, 2048, "plain"),
    "out 7B": (4096, 4096, "partial"),
    "gate_up 7B": (22016, 4096, "gated"),
}


class Inputs(NamedTuple):
    """Rows [M, K] and weight [N, K]."""

    x: Tensor
    weight: Tensor


Compute = Callable[[Tensor, Tensor], Tensor]


def cases(device: torch.device) -> Iterator[Case]:
    gpu = device.type == "cuda"
    grid = [(M, name) for name in PRODUCTS for M in GPU_ROWS] if gpu else CPU_GRID
    dtype = torch.bfloat16
    for M, name in grid:
        N, K, kind = PRODUCTS[name]
        out = N // 2 if kind == "gated" else N
        candidates = {"ours": ours[kind], **peers.in_torch(PLAIN[kind])}
        yield Case(
            case=f"decode_linear {name}",
            shape={"M": M, "N": N, "K": K},
            dtype=dtype,
            metric="forward",
            unit="us",
            bytes=(N * K + M * K + M * out) * dtype.itemsize,
            flops=2 * M * N * K,
            make_inputs=partial(make_inputs, M, N, K, dtype, device),
            candidates={n: partial(_prepare, load, device) for n, load in candidates.items()},
            check=partial(check, kind),
            in_graph=True,
        )


def make_inputs(
    M: int, N: int, K: int, dtype: torch.dtype, device: torch.device, seed: int
) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    return Inputs(randn(M, K), randn(N, K) * K**-0.5)


def _prepare(load: Callable[[torch.device], Compute], device: torch.device, inputs: Inputs) -> Call:
    compute = load(device)
    return lambda: compute(*inputs)


def swiglu(x: Tensor, weight: Tensor) -> Tensor:
    """The product and the gate as separate operations."""
    gate, up = torch.nn.functional.linear(x, weight).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


ours: dict[str, Callable[[torch.device], Compute]] = {
    "plain": lambda device: decode_linear,
    "gated": lambda device: partial(decode_linear, gated=True),
    "partial": lambda device: decode_linear_partials,
}
PLAIN: dict[str, Compute] = {
    "plain": torch.nn.functional.linear,
    "gated": swiglu,
    "partial": torch.nn.functional.linear,
}


def check(kind: str, inputs: Inputs, result: Tensor) -> None:
    """Partial sums are added."""
    x, weight = (t.double() for t in inputs)
    if result.dim() == 3:
        result = result.sum(0).to(inputs.x.dtype)
    check_close("product", result, decode_linear_reference(x, weight, None, kind == "gated"))


def gate_cases(vocabularies: Sequence[int]) -> Iterator[GateCase]:
    """Without `down` for few rows, which runs the code of `out`."""
    sizes = {(name, M): PRODUCTS[name] for name in ("qkv", "out", "gate_up") for M in GATE_ROWS}
    sizes |= {(name, 128): size for name, size in WIDE_GATES.items()}
    for (name, M), (N, K, kind) in sizes.items():
        tensors = [meta(*shape, dtype=torch.bfloat16) for shape in ((M, K), (N, K))]
        launch = partial(linear_triton, *tensors, None, kind == "gated", kind == "partial")
        part_k = parts_of(N, K)[1] if kind == "partial" else K
        moved = 2 * (N * K + M * K + M * (N // 2 if kind == "gated" else N))
        work = Work(N * K, moved, (part_k // BLOCK_K,))  # an element is one of the weight
        yield GateCase(f"decode_linear {name} M={M} bfloat16", launch, [work])
    x, weight, bias = (
        meta(*shape, dtype=torch.bfloat16) for shape in ((64, 2048), (2048, 2048), (2048,))
    )
    launch = partial(linear_triton, x, weight, bias, False, False, gelu=True)
    yield GateCase("decode_linear gelu M=64 bfloat16", launch)
