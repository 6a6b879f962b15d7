"""token_stats: logprob, nsc, entropy and lse of logits [R, V], forward and backward.

Minimum bytes: forward reads the logits once, backward reads them and writes as many;
forward+backward reads twice and writes once. Some peers compute fewer statistics; their docstrings
say which.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from iris_kernels import token_stats
from iris_kernels.token_stats import (
    Columns,
    backward_triton,
    forward_launch,
    forward_triton,
    token_stats_reference,
)
from torch import Tensor

from bench.harness import peers
from bench.harness.case import Call, Case, WrongResult, check_close
from bench.harness.gates import ISSUE_LIMIT, GateCase, Work, meta, vectors, vocabulary_cases

SUITE = "kernels"
SAMPLED_ROWS = 16  # checked in float64
GPU_GRID = ((4608, 36864), (16384, 102400, 151936), torch.bfloat16)
# Few shapes: whether malloc reuses memory, without page faults, depends on what else has run.
CPU_GRID = ((16, 1152), (16384,), torch.float32)


class Inputs(NamedTuple):
    """Logits [R, V], token ids [R], and an upstream gradient [R] for each output."""

    logits: Tensor
    token_ids: Tensor
    upstream: dict[str, Tensor]


Compute = Callable[[Tensor, Tensor], dict[str, Tensor]]


def cases(device: torch.device) -> Iterator[Case]:
    rows, vocabularies, dtype = GPU_GRID if device.type == "cuda" else CPU_GRID
    for V, R, metric in product(vocabularies, rows, METRICS):
        passes = {"forward": 1, "backward": 2}.get(metric, 3)
        yield Case(
            case="token_stats",
            shape={"R": R, "V": V},
            dtype=dtype,
            metric=metric,
            unit="us" if device.type == "cuda" else "ms",
            bytes=passes * R * V * dtype.itemsize,
            flops=0,
            make_inputs=partial(make_inputs, R, V, dtype, device),
            candidates={
                name: partial(_prepare, METRICS[metric], load, device)
                for name, load in (IN_PLACE if metric.endswith("in place") else CANDIDATES).items()
                if metric in COMPUTES.get(name, METRICS)
            },
            check=check_forward if metric == "forward" else check_backward,
        )


def make_inputs(R: int, V: int, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(R, V, dtype=dtype, device=device, generator=generator).mul_(4)
    return Inputs(
        logits.requires_grad_(),
        torch.randint(0, V, (R,), device=device, generator=generator),
        {name: torch.randn(R, device=device, generator=generator) for name in OUTPUTS},
    )


OUTPUTS = ("logprob", "nsc", "entropy")


# --- What is timed --------------------------------------------------------------------------------


def _prepare(metric: Callable, load: Callable, device: torch.device, inputs: Inputs) -> Call:
    return metric(load(device), inputs)


def _gradient(outputs: dict[str, Tensor], inputs: Inputs, again: bool) -> Tensor:
    upstream = [inputs.upstream[name].to(out.dtype) for name, out in outputs.items()]
    return torch.autograd.grad([*outputs.values()], inputs.logits, upstream, retain_graph=again)[0]


def _forward(compute: Compute, inputs: Inputs) -> Call:
    @torch.no_grad()
    def call():
        return compute(inputs.logits, inputs.token_ids)

    return call


def _backward(compute: Compute, inputs: Inputs) -> Call:
    outputs = compute(inputs.logits, inputs.token_ids)
    return lambda: ([*outputs], _gradient(outputs, inputs, again=True))


def _forward_backward(compute: Compute, inputs: Inputs) -> Call:
    def call():
        outputs = compute(inputs.logits, inputs.token_ids)
        return [*outputs], _gradient(outputs, inputs, again=False)

    return call


class _OpOutput(torch.autograd.Function):
    """An alias of the logits that autograd takes for an op's output: neither a leaf nor a view."""

    @staticmethod
    def forward(ctx, logits):
        alias = logits.new_empty(0)
        return alias.set_(logits.untyped_storage(), 0, logits.shape, logits.stride())

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def _in_place(compute: Compute, inputs: Inputs) -> Call:
    """forward+backward on logits that may be overwritten, as a model's output may be."""
    source = inputs.logits.detach().clone()

    def call():
        outputs = compute(_OpOutput.apply(inputs.logits), inputs.token_ids)
        return [*outputs], _gradient(outputs, inputs, again=False)

    call.restore = lambda: inputs.logits.data.copy_(source)
    return call


METRICS = {
    "forward": _forward,
    "backward": _backward,
    "forward+backward": _forward_backward,
    "forward+backward in place": _in_place,
}


# --- Ours and the peers ---------------------------------------------------------------------------


def ours(device: torch.device, in_place: bool = False) -> Compute:
    def compute(logits, token_ids):
        stats = token_stats(logits, token_ids, inplace_backward=in_place)
        return {"logprob": stats.logprob, "nsc": stats.nsc, "entropy": stats.entropy}

    return compute


def plain(logits: Tensor, token_ids: Tensor) -> dict[str, Tensor]:
    """Fastest plain torch: one log_softmax in float32 and everything from it, without the lse."""
    logprobs = logits.float().log_softmax(-1)
    return {
        "logprob": logprobs.gather(-1, token_ids[:, None])[:, 0],
        "nsc": logprobs.mean(-1) + math.log(logits.shape[-1]),
        "entropy": -(logprobs.exp() * logprobs).sum(-1),
    }


def trl(device: torch.device) -> Compute:
    """TRL: logprob and entropy; a Triton kernel on a GPU, a torch function on a CPU."""
    if device.type == "cuda":
        function = peers.load("trl.kernels.logprob_entropy", device)
    else:
        function = peers.load("trl.trainer.utils", device, needs_gpu=False)
    function = function.selective_log_softmax_and_entropy

    def compute(logits, token_ids):
        logprob, entropy = function(logits, token_ids)
        return {"logprob": logprob, "entropy": entropy}

    return compute


def liger(device: torch.device) -> Compute:
    """Liger's cross entropy: logprob. Where a gradient is needed, it overwrites the logits."""
    function = peers.load("liger_kernel.ops.cross_entropy", device).LigerCrossEntropyFunction
    options = (None, -100, 0.0, 0.0, "none", None, False, False, False)
    return lambda logits, ids: {"logprob": -function.apply(logits, ids, *options)[0]}


def flash_attn(device: torch.device, in_place: bool = False) -> Compute:
    """flash-attn's cross entropy: logprob."""
    function = peers.load("flash_attn.ops.triton.cross_entropy", device).cross_entropy_loss
    return lambda logits, ids: {"logprob": -function(logits, ids, inplace_backward=in_place)[0]}


CANDIDATES = {
    "ours": ours,
    **peers.in_torch(plain, repeats_backward=True),
    "trl": trl,
    "liger": liger,
    "flash-attn": flash_attn,
}
IN_PLACE = CANDIDATES | {
    "ours": partial(ours, in_place=True),
    "flash-attn": partial(flash_attn, in_place=True),
}
COMPUTES = {"liger": ("forward", "forward+backward in place")}  # all that it offers


# --- Correctness ----------------------------------------------------------------------------------


def _sampled_rows(inputs: Inputs) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Row indices, float64 logits of these rows as a leaf, and their statistics."""
    count = len(inputs.token_ids)
    rows = torch.linspace(0, count - 1, min(SAMPLED_ROWS, count)).long().to(inputs.logits.device)
    logits = inputs.logits.detach()[rows].double().requires_grad_()
    return rows, logits, token_stats_reference(logits, inputs.token_ids[rows])._asdict()


def check_forward(inputs: Inputs, result: dict[str, Tensor]) -> None:
    rows, _, reference = _sampled_rows(inputs)
    for name, value in result.items():
        check_close(name, value[rows], reference[name])


def check_backward(inputs: Inputs, result: tuple[list[str], Tensor]) -> None:
    names, gradient = result
    rows, logits, reference = _sampled_rows(inputs)
    total = sum((reference[name] * inputs.upstream[name][rows].double()).sum() for name in names)
    if gradient.shape != inputs.logits.shape:
        raise WrongResult(f"gradient of shape {tuple(gradient.shape)}")
    check_close("gradient", gradient[rows], torch.autograd.grad(total, logits)[0])


# --- Compiled without a GPU -----------------------------------------------------------------------

GATE_ROWS = 4608


def _gate_forward(vocab_size: int, dtype: torch.dtype) -> None:
    logits, ids = meta(GATE_ROWS, vocab_size, dtype=dtype), meta(GATE_ROWS, dtype=torch.int64)
    forward_triton(logits, ids, None, 1.0, Columns(vocab_size), vectors(6, GATE_ROWS))


def _forward_work(vocab_size: int, dtype: torch.dtype) -> list[Work]:
    elements = GATE_ROWS * vocab_size
    trips = forward_trips(vocab_size, dtype)
    return [Work(elements, elements * dtype.itemsize, trips, ISSUE_LIMIT)]


def forward_trips(columns: int, dtype: torch.dtype) -> tuple[int]:
    """How often the forward kernel's loop runs: once per full tile."""
    launch = forward_launch(columns, dtype.itemsize)
    return (columns // (4 * launch["L"] * launch["K"]),)


def _gate_backward(vocab_size: int, dtype: torch.dtype) -> None:
    logits, grad = (meta(GATE_ROWS, vocab_size, dtype=dtype) for _ in range(2))
    ids, stats, upstream = (
        meta(GATE_ROWS, dtype=torch.int64), vectors(3, GATE_ROWS), vectors(4, GATE_ROWS)
    )  # fmt: skip
    backward_triton(logits, grad, ids, None, stats, upstream, 1.0, Columns(vocab_size))


def _backward_work(vocab_size: int, dtype: torch.dtype) -> list[Work]:
    elements = GATE_ROWS * vocab_size
    return [Work(elements, 2 * elements * dtype.itemsize, (), ISSUE_LIMIT)]


def _gate_variants() -> None:
    """The temperature in memory, a mask, padding, and one upstream gradient."""
    V = 16384
    logits, ids, mask = meta(64, V, dtype=torch.bfloat16), *vectors(2, 64, torch.int64)
    temperature, columns = torch.empty((), device="meta"), Columns(V - 16)
    forward_triton(logits, ids, mask.bool(), temperature, columns, vectors(6, 64))
    upstream = [meta(64), None, None, None]
    backward_triton(
        logits, logits, ids, mask.bool(), vectors(3, 64), upstream, temperature, columns
    )


def gate_cases(vocabularies: Sequence[int]) -> Iterator[GateCase]:
    forward = ("token_stats forward", _gate_forward, _forward_work)
    backward = ("token_stats backward", _gate_backward, _backward_work)
    yield from vocabulary_cases(*forward, vocabularies)
    yield from vocabulary_cases(*backward, vocabularies)
    yield GateCase("token_stats variants bfloat16", _gate_variants)
