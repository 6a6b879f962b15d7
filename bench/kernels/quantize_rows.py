"""quantize_rows: rows [R, D] as float8_e4m3fn with one scale per row, for `scaled_mm`.

Shapes of the matmul inputs of Janus-Pro-1B and 7B in a decoding step. Minimum bytes: input, fp8
output and scales once. At these sizes the launch takes longer than moving the bytes; on a GPU timed
inside a CUDA graph, as in a decoding loop.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

import torch
from iris_kernels import quantize_rows
from iris_kernels.quantize_rows import quantize_rows_reference, quantize_rows_triton
from torch import Tensor

from bench.harness import peers
from bench.harness.case import Call, Case, check_close
from bench.harness.gates import FIRST_FP8_ARCHITECTURE, WIDTHS, GateCase, Work, meta

SUITE = "kernels"
ALLOWED = 2.0**-4  # half a unit in the last place of 3 mantissa bits
GPU_GRID = ((64,), (2048, 4096, 5632, 11008), torch.bfloat16)
CPU_GRID = ((16, 64), (2048,), torch.float32)

Compute = Callable[[Tensor], tuple[Tensor, Tensor]]


def cases(device: torch.device) -> Iterator[Case]:
    rows, widths, dtype = GPU_GRID if device.type == "cuda" else CPU_GRID
    for R, D in product(rows, widths):
        yield Case(
            case="quantize_rows",
            shape={"R": R, "D": D},
            dtype=dtype,
            metric="forward",
            unit="us",
            bytes=R * (D * (dtype.itemsize + 1) + 4),
            flops=0,
            make_inputs=partial(make_inputs, R, D, dtype, device),
            candidates={name: partial(_prepare, load, device) for name, load in CANDIDATES.items()},
            check=check,
            in_graph=True,
        )


def make_inputs(R: int, D: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(R, D, dtype=dtype, device=device, generator=generator)


def _prepare(load: Callable[[torch.device], Compute], device: torch.device, inputs: Tensor) -> Call:
    compute = load(device)
    return lambda: compute(inputs)


def ours(device: torch.device) -> Compute:
    return quantize_rows


CANDIDATES = {"ours": ours, **peers.in_torch(quantize_rows_reference)}


def check(inputs: Tensor, result: tuple[Tensor, Tensor]) -> None:
    values, scales = result
    check_close("scales", scales, quantize_rows_reference(inputs.double()).scales)
    check_close("rows", values.double() * scales.double(), inputs, ALLOWED)


def gate_cases(vocabularies: Sequence[int]) -> Iterator[GateCase]:
    for widths in WIDTHS:
        for width in widths:
            launch = partial(quantize_rows_triton, meta(64, width, dtype=torch.bfloat16))
            work = Work(64 * width, 3 * 64 * width)
            yield GateCase(f"quantize_rows D={width}", launch, [work], FIRST_FP8_ARCHITECTURE)
