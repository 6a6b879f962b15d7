"""linear_token_stats: statistics of hidden [R, D] @ weight [V, D].T, without holding the logits.

Minimum operations: forward one matmul of 2 R D V; backward one more for the hidden states and one
for the weight if it is trained. Minimum bytes: the inputs once, and each gradient once. The peer
"matmuls" is torch's matmuls alone, with nothing between them and all logits in memory.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from iris_kernels import linear_token_stats
from iris_kernels.linear_token_stats import linear_token_stats_reference
from iris_kernels.token_stats import Columns, backward_triton, forward_triton
from torch import Tensor

from bench.harness import peers
from bench.harness.case import Call, Case, check_close
from bench.harness.gates import ISSUE_LIMIT, GateCase, Work, meta, vectors, vocabulary_cases
from bench.kernels import token_stats
from bench.kernels.token_stats import OUTPUTS

SUITE = "kernels"
SAMPLED_ROWS = 16  # of the forward pass, checked in float64
GPU_GRID = ((4608,), 2048, (16384, 102400), torch.bfloat16)
CPU_GRID = ((16, 256), 256, (16384,), torch.float32)
MATMULS = {"forward": 1, "forward+backward": 3, "forward+backward, frozen weight": 2}


class Inputs(NamedTuple):
    """Hidden states [R, D], weight [V, D], token ids [R], an upstream gradient [R] per output."""

    hidden: Tensor
    weight: Tensor
    token_ids: Tensor
    upstream: dict[str, Tensor]


Compute = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]


def cases(device: torch.device) -> Iterator[Case]:
    rows, D, vocabularies, dtype = GPU_GRID if device.type == "cuda" else CPU_GRID
    for V, R, (metric, count) in product(vocabularies, rows, MATMULS.items()):
        moved = {1: R * D + V * D, 2: 2 * R * D + V * D, 3: 2 * (R * D + V * D)}[count]
        yield Case(
            case="linear_token_stats",
            shape={"R": R, "D": D, "V": V},
            dtype=dtype,
            metric=metric,
            unit="us" if device.type == "cuda" else "ms",
            bytes=moved * dtype.itemsize,
            flops=2 * count * R * D * V,
            make_inputs=partial(make_inputs, R, D, V, dtype, device, count == 3),
            candidates={
                name: partial(_prepare, metric == "forward", load, device)
                for name, load in CANDIDATES.items()
            }
            | {"matmuls": partial(matmuls, count)},
            check=check_forward if metric == "forward" else check_backward,
        )


def make_inputs(
    R: int, D: int, V: int, dtype: torch.dtype, device: torch.device, trained: bool, seed: int
) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    return Inputs(
        randn(R, D).requires_grad_(),
        randn(V, D).mul_(3 / math.sqrt(D)).requires_grad_(trained),
        torch.randint(0, V, (R,), device=device, generator=generator),
        {name: randn(R, dtype=torch.float32) for name in OUTPUTS},
    )


# --- What is timed --------------------------------------------------------------------------------


def _prepare(forward_only: bool, load: Callable, device: torch.device, inputs: Inputs) -> Call:
    compute: Compute = load(device)
    hidden, weight, token_ids, upstream = inputs

    @torch.no_grad()
    def forward():
        return compute(hidden, weight, token_ids)

    def forward_backward():
        outputs = compute(hidden, weight, token_ids)
        above = [upstream[name].to(out.dtype) for name, out in outputs.items()]
        return [*outputs], torch.autograd.grad([*outputs.values()], _leaves(inputs), above)

    return forward if forward_only else forward_backward


def _leaves(inputs: Inputs) -> list[Tensor]:
    return [t for t in (inputs.hidden, inputs.weight) if t.requires_grad]


def matmuls(count: int, inputs: Inputs) -> Call:
    """The same matmuls by torch.mm, into preallocated tensors."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    logits = hidden @ weight.t()
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def call():
        torch.mm(hidden, weight.t(), out=logits)
        if count > 1:
            torch.mm(logits, weight, out=d_hidden)
        if count > 2:
            torch.mm(logits.t(), hidden, out=d_weight)

    return call


# --- Ours and the peers ---------------------------------------------------------------------------


def ours(device: torch.device) -> Compute:
    def compute(hidden, weight, token_ids):
        stats = linear_token_stats(hidden, weight, token_ids)
        return {"logprob": stats.logprob, "nsc": stats.nsc, "entropy": stats.entropy}

    return compute


def plain(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> dict[str, Tensor]:
    """Plain torch: the logits in the head's dtype, the statistics in float32."""
    return token_stats.plain(hidden @ weight.t(), token_ids)


def trl(device: torch.device) -> Compute:
    """TRL's fused head: logprob and entropy."""
    module = peers.load("trl.kernels.chunked_logprob", device, needs_gpu=False)
    function, columns = module.ChunkedLogProbFunction, 32768  # the value its trainers pass

    def compute(hidden, weight, token_ids):
        logprob, entropy, *_ = function.apply(
            hidden, weight, None, token_ids, 1.0, columns, None, 1.0, ("entropy",)
        )
        return {"logprob": logprob, "entropy": entropy}

    return compute


def liger(device: torch.device) -> Compute:
    """Liger's fused linear cross entropy: logprob."""
    module = peers.load("liger_kernel.ops.fused_linear_cross_entropy", device)
    apply = module.LigerFusedLinearCrossEntropyFunction.apply
    options = (None, None, -100, 0.0, 0.0, "none")
    return lambda h, w, ids: {"logprob": -apply(h, w, ids, *options)[0]}


def cut_cross_entropy(device: torch.device) -> Compute:
    """cut-cross-entropy: logprob. Its backward drops terms below its default threshold."""
    function = peers.load("cut_cross_entropy", device).linear_cross_entropy
    return lambda h, w, ids: {"logprob": -function(h, w, ids, reduction="none")}


CANDIDATES = {
    "ours": ours,
    **peers.in_torch(plain),
    "trl": trl,
    "liger": liger,
    "cut-cross-entropy": cut_cross_entropy,
}


# --- Correctness ----------------------------------------------------------------------------------


def check_forward(inputs: Inputs, result: dict[str, Tensor] | None) -> None:
    if result is None:  # the peer "matmuls"
        return
    count = len(inputs.token_ids)
    rows = torch.linspace(0, count - 1, min(SAMPLED_ROWS, count)).long().to(inputs.hidden.device)
    hidden, weight = inputs.hidden.detach()[rows].double(), inputs.weight.detach().double()
    reference = linear_token_stats_reference(hidden, weight, inputs.token_ids[rows])
    # Half-precision logits have an error of up to half a unit in the last place.
    allowed = None if inputs.hidden.dtype == torch.float32 else 1e-2
    for name, value in result.items():
        check_close(name, value[rows], getattr(reference, name), allowed)


def check_backward(inputs: Inputs, result: tuple[list[str], tuple[Tensor, ...]] | None) -> None:
    if result is None:
        return
    names, gradients = result
    leaves = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs[:2]]
    reference = linear_token_stats_reference(*leaves, inputs.token_ids)
    total = sum((getattr(reference, name) * inputs.upstream[name].double()).sum() for name in names)
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    for name, gradient, expected in zip(
        ("d hidden", "d weight"), gradients, torch.autograd.grad(total, trained), strict=False
    ):
        check_close(name, gradient, expected)


# --- Compiled without a GPU -----------------------------------------------------------------------

TILE_SIDE = 2048  # rows and columns of a tile at the width of Janus-Pro-1B


def _gate_tile(vocab_size: int, dtype: torch.dtype) -> None:
    """A tile in the middle of a row, with a bias; fp32 logits, gradients in `dtype`."""
    side = TILE_SIDE
    ids, bias, state = meta(side, dtype=torch.int64), meta(side, dtype=dtype), meta(5, side)
    tile = Columns(side, side, vocab_size, bias, state, is_first=False, is_last=False)
    logits, grad = meta(side, side), meta(side, side, dtype=dtype)
    forward_triton(logits, ids, None, 1.0, tile, vectors(6, side))
    backward_triton(logits, grad, ids, None, vectors(3, side), vectors(4, side), 1.0, tile)


def _tile_work(vocab_size: int, dtype: torch.dtype) -> list[Work]:
    elements = TILE_SIDE**2
    trips = token_stats.forward_trips(TILE_SIDE, torch.float32)
    return [
        Work(elements, elements * 4, trips, ISSUE_LIMIT),
        Work(elements, elements * (4 + dtype.itemsize), (), ISSUE_LIMIT),
    ]


def gate_cases(vocabularies: Sequence[int]) -> Iterator[GateCase]:
    # A tile's kernels do not depend on the vocabulary.
    return vocabulary_cases("linear_token_stats tile", _gate_tile, _tile_work, vocabularies[:1])
