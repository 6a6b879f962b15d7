"""guided_sample: R pairs of cond and uncond logits [R, V] -> tokens and statistics of both.

Minimum bytes: both logits once. On a GPU timed inside a CUDA graph, as in a decoding loop.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from iris_kernels import guided_sample
from iris_kernels.guided_sample import sample_launch, sample_triton
from iris_kernels.guided_sample.triton_path import Recording
from iris_kernels.token_stats import token_stats_reference
from torch import Tensor

from bench.harness import peers
from bench.harness.case import Call, Case, WrongResult, check_close
from bench.harness.gates import GateCase, Work, meta, vocabulary_cases
from bench.kernels import token_stats

SUITE = "kernels"
CFG_WEIGHT = 5.0
CDF_TOLERANCE = 1e-5  # distance of the uniform number from the token's CDF step
GPU_GRID = ((16, 64, 256), (16384,), torch.bfloat16)
CPU_GRID = ((16, 64), (16384,), torch.float32)


class Inputs(NamedTuple):
    """Logits [R, V] of both branches and a uniform number [R]."""

    cond: Tensor
    uncond: Tensor
    uniform: Tensor


class Result(NamedTuple):
    """Token ids [R], and the statistics [R] of both distributions by name."""

    token_ids: Tensor
    conditional: dict[str, Tensor]
    guided: dict[str, Tensor]


# (cond, uncond, uniform) -> result
Compute = Callable[[Tensor, Tensor, Tensor], Result]


def cases(device: torch.device) -> Iterator[Case]:
    rows, vocabularies, dtype = GPU_GRID if device.type == "cuda" else CPU_GRID
    for R, V in product(rows, vocabularies):
        yield Case(
            case="guided_sample",
            shape={"R": R, "V": V},
            dtype=dtype,
            metric="forward",
            unit="us",
            bytes=2 * R * V * dtype.itemsize,
            flops=0,
            make_inputs=partial(make_inputs, R, V, dtype, device),
            candidates={name: partial(_prepare, load, device) for name, load in CANDIDATES.items()},
            check=check,
            in_graph=True,
        )


def make_inputs(R: int, V: int, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    cond, uncond = (
        torch.randn(R, V, dtype=dtype, device=device, generator=generator).mul_(2) for _ in range(2)
    )
    return Inputs(cond, uncond, torch.rand(R, device=device, generator=generator))


def _prepare(load: Callable[[torch.device], Compute], device: torch.device, inputs: Inputs) -> Call:
    compute = load(device)
    return lambda: compute(*inputs)


def ours(device: torch.device) -> Compute:
    def compute(cond: Tensor, uncond: Tensor, uniform: Tensor) -> Result:
        sampled = guided_sample(cond, uncond, uniform, cfg_weight=CFG_WEIGHT)
        return Result(sampled.token_ids, sampled.conditional._asdict(), sampled.guided._asdict())

    return compute


def plain(cond: Tensor, uncond: Tensor, uniform: Tensor) -> Result:
    """Plain torch, in float32 as in the kernel; can run in a CUDA graph."""
    cond, uncond = cond.float(), uncond.float()
    mixed = uncond + CFG_WEIGHT * (cond - uncond)
    cumulated = mixed.softmax(-1).cumsum(-1)
    threshold = uniform[:, None] * cumulated[:, -1:]
    token_ids = torch.searchsorted(cumulated, threshold, right=True).clamp(max=cond.shape[-1] - 1)
    token_ids = token_ids[:, 0]
    return Result(
        token_ids, token_stats.plain(cond, token_ids), token_stats.plain(mixed, token_ids)
    )


CANDIDATES = {"ours": ours, **peers.in_torch(plain)}


def check(inputs: Inputs, result: Result) -> None:
    """The float64 CDF crosses the uniform number at the token; statistics match in float64."""
    cond, uncond = inputs.cond.double(), inputs.uncond.double()
    mixed = uncond + CFG_WEIGHT * (cond - uncond)
    token_ids = result.token_ids[:, None]
    cumulated = mixed.softmax(-1).cumsum(-1)
    above = cumulated.gather(-1, token_ids)
    below = above - mixed.softmax(-1).gather(-1, token_ids)
    uniform = inputs.uniform[:, None].double()
    if not ((below - CDF_TOLERANCE <= uniform) & (uniform <= above + CDF_TOLERANCE)).all():
        raise WrongResult("a token is not where the CDF crosses its uniform number")
    for which, logits in (("conditional", cond), ("guided", mixed)):
        reference = token_stats_reference(logits, result.token_ids)
        for name in token_stats.OUTPUTS:
            value = getattr(result, which)[name]
            check_close(f"{which} {name}", value, getattr(reference, name))


GATE_ROWS = 64


def _gate(vocab_size: int, dtype: torch.dtype) -> None:
    pair = (meta(GATE_ROWS, vocab_size, dtype=dtype) for _ in range(2))
    sample_triton(*pair, meta(GATE_ROWS), None, 5.0, 1.0, False, vocab_size)


def _work(vocab_size: int, dtype: torch.dtype) -> list[Work]:
    """An element is a pair of logits. Each pass loops over the tiles, if there are several."""
    tiles = sample_launch(vocab_size, dtype.itemsize)["TILES"]
    trips = (tiles, tiles) if tiles > 1 else ()
    elements = GATE_ROWS * vocab_size
    return [Work(elements, 2 * elements * dtype.itemsize, trips)]


def _gate_variants() -> None:
    """Numbers and a threshold in memory; without guidance, greedy; recorded as a step."""
    row = meta(GATE_ROWS, 16384, dtype=torch.bfloat16)
    number, uniform = torch.empty((), device="meta"), meta(GATE_ROWS)
    sample_triton(row, row, uniform, meta(GATE_ROWS), number, number, False, 16384)
    sample_triton(row, None, uniform, None, 1.0, 1.0, True, 16384)
    steps = 576
    buffers = meta(1, dtype=torch.int64), meta(GATE_ROWS, steps, dtype=torch.int64)
    stats = (meta(4, GATE_ROWS, steps) for _ in range(2))
    recording = Recording(*buffers, *stats)
    sample_triton(
        row, row, meta(GATE_ROWS * steps), None, 5.0, 1.0, False, 16384, recording=recording
    )


def gate_cases(vocabularies: Sequence[int]) -> Iterator[GateCase]:
    yield from vocabulary_cases("guided_sample", _gate, _work, vocabularies)
    yield GateCase("guided_sample variants bfloat16", _gate_variants)
