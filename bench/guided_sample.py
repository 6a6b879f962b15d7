"""guided_sample: R pairs of cond and uncond logits [R, V] -> tokens and both their statistics.

Least bytes: both logits once. On a GPU timed inside a CUDA graph, as a decoding loop runs it.
"""

import math
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from iris_kernels import guided_sample
from torch import Tensor

from bench import _peers
from bench._case import Call, Case, WrongResult, check_close

SUITE = "kernels"
CFG_WEIGHT = 5.0
CDF_SLACK = 1e-5  # how far from its step a token may be found, in probability
GPU_GRID = ((16, 64, 256), (16384,), torch.bfloat16)
CPU_GRID = ((64,), (16384,), torch.float32)


class Inputs(NamedTuple):
    """Logits [R, V] of both branches and a uniform number [R]."""

    cond: Tensor
    uncond: Tensor
    uniform: Tensor


class Result(NamedTuple):
    """Tokens [R] and, by name, the statistics [R] of both distributions."""

    token_ids: Tensor
    conditional: dict[str, Tensor]
    guided: dict[str, Tensor]


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
            candidates={"ours": ours, "eager": eager, "torch.compile": compiled},
            check=check,
            in_graph=True,
        )


def make_inputs(R: int, V: int, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    cond, uncond = (
        torch.randn(R, V, dtype=dtype, device=device, generator=generator).mul_(2) for _ in range(2)
    )
    return Inputs(cond, uncond, torch.rand(R, device=device, generator=generator))


def ours(inputs: Inputs) -> Call:
    def call():
        drawn = guided_sample(*inputs, cfg_weight=CFG_WEIGHT)
        return Result(drawn.token_ids, drawn.conditional._asdict(), drawn.guided._asdict())

    return call


def _statistics(logits: Tensor, token_ids: Tensor) -> dict[str, Tensor]:
    logprobs = logits.log_softmax(-1)
    return {
        "logprob": logprobs.gather(-1, token_ids)[:, 0],
        "nsc": logprobs.mean(-1) + math.log(logits.shape[-1]),
        "entropy": -(logprobs.exp() * logprobs).sum(-1),
    }


def plain(cond: Tensor, uncond: Tensor, uniform: Tensor) -> Result:
    """The same in plain torch, float32 as in the kernel; a graph can capture it."""
    cond, uncond = cond.float(), uncond.float()
    mixed = uncond + CFG_WEIGHT * (cond - uncond)
    cumulated = mixed.softmax(-1).cumsum(-1)
    wanted = uniform[:, None] * cumulated[:, -1:]
    token_ids = torch.searchsorted(cumulated, wanted, right=True).clamp(max=cond.shape[-1] - 1)
    return Result(token_ids[:, 0], _statistics(cond, token_ids), _statistics(mixed, token_ids))


def eager(inputs: Inputs) -> Call:
    return lambda: plain(*inputs)


def compiled(inputs: Inputs) -> Call:
    function = _peers.compiled(plain, inputs.cond.device)
    return lambda: function(*inputs)


def check(inputs: Inputs, result: Result) -> None:
    """The token is where the float64 CDF crosses the uniform number; statistics in float64."""
    cond, uncond = inputs.cond.double(), inputs.uncond.double()
    mixed = uncond + CFG_WEIGHT * (cond - uncond)
    token_ids = result.token_ids[:, None]
    cumulated = mixed.softmax(-1).cumsum(-1)
    above = cumulated.gather(-1, token_ids)
    below = above - mixed.softmax(-1).gather(-1, token_ids)
    uniform = inputs.uniform[:, None].double()
    if not ((below - CDF_SLACK <= uniform) & (uniform <= above + CDF_SLACK)).all():
        raise WrongResult("a token lies off the CDF's step at its uniform number")
    for which, logits in (("conditional", cond), ("guided", mixed)):
        reference = _statistics(logits, token_ids)
        for name, value in reference.items():
            check_close(f"{which} {name}", getattr(result, which)[name], value)
