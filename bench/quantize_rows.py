"""quantize_rows: rows [R, D] as float8_e4m3fn with a scale each, for a product by `scaled_mm`.

Shapes of the inputs of Janus-Pro-1B's and 7B's products in a decoding step. Least bytes: input
once, 8 bits of it and the scales once. At these sizes a launch takes longer than the bytes do; on a
GPU timed inside a CUDA graph, as a decoding loop runs it.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from iris_kernels import quantize_rows
from torch import Tensor

from bench import _peers
from bench._case import Call, Case, check_close

SUITE = "kernels"
FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
STEP = 2.0**-4  # half a step of 3 bits of mantissa
GPU_GRID = ((64,), (2048, 4096, 5632, 11008), torch.bfloat16)
CPU_GRID = ((64,), (2048,), torch.float32)

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


def plain(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.float()
    scales = wide.abs().amax(dim=-1, keepdim=True) / LARGEST
    return (wide / scales).clamp(-LARGEST, LARGEST).to(FP8), scales


def eager(device: torch.device) -> Compute:
    return plain


def compiled(device: torch.device) -> Compute:
    return _peers.compiled(plain, device)


CANDIDATES = {"ours": ours, "eager": eager, "torch.compile": compiled}


def check(inputs: Tensor, result: tuple[Tensor, Tensor]) -> None:
    values, scales = result
    largest = inputs.double().abs().amax(dim=-1, keepdim=True)
    check_close("scales", scales, largest / LARGEST)
    check_close("rows", values.double() * scales.double(), inputs, STEP)
