"""silu_mul: gate and up projections [R, 2 I] of one matmul -> [R, I].

Shapes of a decoding step of Janus-Pro-1B and 7B. Minimum bytes: input once, output once. At these
sizes the launch takes longer than moving the bytes; on a GPU timed inside a CUDA graph, as in a
decoding loop. There also forward+backward from two tensors, at the rows of a training pass: 8 R I
elements, where 3 R I are those of the forward pass.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

import torch
from iris_kernels import silu_mul
from iris_kernels.silu_mul import silu_mul_backward_triton, silu_mul_reference, silu_mul_triton
from torch import Tensor

from bench.harness import peers
from bench.harness.case import Call, Case, check_close
from bench.harness.gates import DTYPES, ISSUE_LIMIT, WIDTHS, GateCase, Work, meta
from bench.harness.gradients import check_gradients, forward_backward

SUITE = "kernels"
TRAINING_ROWS = 40320
GPU_GRID = ((64, 256), (5632, 11008), torch.bfloat16)
CPU_GRID = ((16, 64), (5632,), torch.float32)

Compute = Callable[[Tensor], Tensor]


def cases(device: torch.device) -> Iterator[Case]:
    rows, widths, dtype = GPU_GRID if device.type == "cuda" else CPU_GRID
    for R, width in product(rows, widths):
        yield Case(
            case="silu_mul",
            shape={"R": R, "I": width},
            dtype=dtype,
            metric="forward",
            unit="us",
            bytes=3 * R * width * dtype.itemsize,
            flops=0,
            make_inputs=partial(make_inputs, R, width, dtype, device),
            candidates={name: partial(prepare, device) for name, prepare in CANDIDATES.items()},
            check=check,
            in_graph=True,
        )
    if device.type == "cuda":
        yield from (_training_case(TRAINING_ROWS, width, dtype, device) for width in widths)


def _training_case(R: int, width: int, dtype: torch.dtype, device: torch.device) -> Case:
    return Case(
        case="silu_mul",
        shape={"R": R, "I": width},
        dtype=dtype,
        metric="forward+backward",
        unit="us",
        bytes=8 * R * width * dtype.itemsize,
        flops=0,
        make_inputs=partial(make_halves, R, width, dtype, device),
        candidates={name: partial(_prepare_both, load, device) for name, load in TRAINED.items()},
        check=check_both,
    )


def make_halves(
    R: int, width: int, dtype: torch.dtype, device: torch.device, seed: int
) -> list[Tensor]:
    """Gates, ups and the upstream gradient, [R, I] each."""
    generator = torch.Generator(device).manual_seed(seed)
    return [
        torch.randn(R, width, dtype=dtype, device=device, generator=generator) for _ in range(3)
    ]


def make_inputs(R: int, width: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(R, 2 * width, dtype=dtype, device=device, generator=generator) * 2


def _prepare(load: Callable[[torch.device], Compute], device: torch.device, inputs: Tensor) -> Call:
    compute = load(device)
    return lambda: compute(inputs)


def _prepare_both(load: Callable, device: torch.device, inputs: list[Tensor]) -> Call:
    return forward_backward(load(device), inputs[:2], inputs[2:])


def ours(device: torch.device) -> Compute:
    return silu_mul


def plain(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def _plain_halves(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


def _liger_trained(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Liger's function; its backward pass overwrites gates and ups with their gradients."""
    function = peers.load("liger_kernel.ops.swiglu", device).LigerSiLUMulFunction
    return lambda gate, up: function.apply(gate.clone(), up.clone())


def _liger(device: torch.device, inputs: Tensor) -> Call:
    """Liger's kernel, forward only; it takes contiguous halves, which are made beforehand."""
    forward = peers.load("liger_kernel.ops.swiglu", device).swiglu_forward
    gate, up = (half.contiguous() for half in inputs.chunk(2, dim=-1))
    return lambda: forward(gate, up)[2]


CANDIDATES = {
    name: partial(_prepare, load) for name, load in {"ours": ours, **peers.in_torch(plain)}.items()
} | {"liger": _liger}
TRAINED = {"ours": ours, **peers.in_torch(_plain_halves), "liger": _liger_trained}


def check_both(inputs: list[Tensor], result: tuple[list[Tensor], list[Tensor]]) -> None:
    named = dict(zip(("gate", "up"), inputs[:2], strict=True))
    check_gradients(silu_mul_reference, named, inputs[2:], result)


def check(inputs: Tensor, result: Tensor) -> None:
    check_close("product", result, silu_mul_reference(inputs.double()))


def gate_cases(vocabularies: Sequence[int]) -> Iterator[GateCase]:
    for dtype_name, dtype in DTYPES.items():
        for _, inner in WIDTHS:
            launch = partial(silu_mul_triton, meta(64, 2 * inner, dtype=dtype))
            work = Work(64 * inner, 3 * 64 * inner * dtype.itemsize)
            yield GateCase(f"silu_mul I={inner} {dtype_name}", launch, [work])
            halves = [meta(TRAINING_ROWS, inner, dtype=dtype) for _ in range(3)]
            elements = halves[0].numel()
            work = Work(elements, 5 * elements * dtype.itemsize, issue_limit=ISSUE_LIMIT)
            backward = partial(silu_mul_backward_triton, *halves)
            yield GateCase(f"silu_mul backward I={inner} {dtype_name}", backward, [work])
