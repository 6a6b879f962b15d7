"""The float64 oracle and the error budget of all kernel tests.

Budget: error(ours) <= 1.5 error(eager in the same dtype) + floor, both against float64, as the
largest absolute error. The floor is what float32 cannot avoid: a few roundings of the largest term
that enters a value, and one rounding to the gradient's own dtype.
"""

from __future__ import annotations

import math
import os

import torch
from iris_kernels import TokenStats, token_stats
from iris_kernels.token_stats import token_stats_reference
from torch import Tensor

try:
    from triton import knobs

    INTERPRETED = knobs.runtime.interpret
except ModuleNotFoundError:
    INTERPRETED = False
TRITON_RUNS = torch.cuda.is_available() or INTERPRETED
NO_TRITON = "needs a GPU, or Triton imported with TRITON_INTERPRET=1"
EPS = torch.finfo(torch.float32).eps
FIELDS = TokenStats._fields


def random_case(
    shape: tuple[int, ...], V: int, dtype: torch.dtype, device: str, scale: float = 3.0, seed=0
) -> tuple[Tensor, Tensor]:
    """Logits (*shape, V) and token ids (*shape)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, V, generator=generator) * scale
    token_ids = torch.randint(V, shape, generator=generator)
    return logits.to(device, dtype), token_ids.to(device)


def upstream_gradients(shape, device: str, seed: int = 1) -> list[Tensor]:
    """Random gradients of the four statistics: ones would hide wrong signs and sums."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device) for _ in FIELDS]


def run(function, logits: Tensor, token_ids: Tensor, gradients, **kwargs):
    """(statistics, gradient of the logits) for upstream `gradients`, None for those unused."""
    leaf = logits.detach().clone().requires_grad_()
    out = function(leaf, token_ids, **kwargs)
    used = [(o, g.to(o.dtype)) for o, g in zip(out, gradients, strict=True) if g is not None]
    (gradient,) = torch.autograd.grad([o for o, _ in used], leaf, [g for _, g in used])
    return out, gradient


def assert_within_budget(logits, token_ids, gradients=None, *, temperature=1.0) -> None:
    """Assert that all four statistics and the gradient of token_stats are within the budget."""
    gradients = gradients or upstream_gradients(token_ids.shape, logits.device)
    arguments = (token_ids, gradients)
    ours, our_grad = run(token_stats, logits, *arguments, temperature=temperature)
    eager, eager_grad = run(token_stats_reference, logits, *arguments, temperature=temperature)
    exact, exact_grad = run(
        token_stats_reference, logits.double(), *arguments, temperature=temperature
    )
    spread = float((logits.double().amax(-1) - logits.double().amin(-1)).amax()) / temperature
    largest = float(logits.double().abs().amax()) / temperature
    for name, mine, theirs, truth in zip(FIELDS, ours, eager, exact, strict=True):
        assert mine.dtype == torch.float32
        floor = 4 * EPS * ((largest if name == "lse" else spread) + math.log(logits.shape[-1]))
        assert_close(name, mine, theirs, truth, floor)
    assert our_grad.dtype == logits.dtype
    # Every term of the gradient is at most an upstream gradient times 1, log V or the spread.
    weight = max(float(g.abs().amax()) for g in gradients if g is not None) / temperature
    floor = 4 * EPS * weight * (1 + spread + math.log(logits.shape[-1]))
    floor += rounding(logits.dtype) * float(exact_grad.abs().amax())
    assert_close("gradient", our_grad, eager_grad, exact_grad, floor)


def rounding(dtype: torch.dtype) -> float:
    """Relative error of a conversion to `dtype`; Triton's interpreter truncates."""
    if dtype == torch.float32:
        return 0.0
    truncates = INTERPRETED and os.environ.get("IRIS_KERNELS_BACKEND") == "triton"
    return torch.finfo(dtype).eps * (1.0 if truncates else 0.5)


def assert_close(name: str, mine: Tensor, theirs: Tensor, truth: Tensor, floor: float) -> None:
    truth = truth.detach()
    error = float((mine.detach().double() - truth).abs().amax())
    budget = 1.5 * float((theirs.detach().double() - truth).abs().amax()) + floor
    assert error <= budget, f"{name}: error {error:.3g} exceeds its budget {budget:.3g}"


def gradients(function, tensors: list[Tensor], upstream: list[Tensor | None]) -> list[Tensor]:
    """Gradients of `tensors` under `function(*tensors)`, one result or several; None upstream: a
    result that is not used."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    pairs = zip((out,) if isinstance(out, Tensor) else out, upstream, strict=True)
    used = [(o, g.to(o.dtype)) for o, g in pairs if g is not None]
    return list(torch.autograd.grad([o for o, _ in used], leaves, [g for _, g in used]))


def assert_gradients_within_budget(
    ours, reference, tensors: dict[str, Tensor], upstream: list[Tensor | None], term: float = 0.0
) -> None:
    """Assert that every gradient of `ours` is within the budget of those of `reference`, in the
    dtype of the tensors and in float64. The floor: a dozen fp32 roundings of the largest term (of
    the result, or `term` where terms cancel), and two roundings to the dtype, one of the forward
    pass and one of the gradient."""
    given = list(tensors.values())
    mine = gradients(ours, given, upstream)
    theirs = gradients(reference, given, upstream)
    truth = gradients(reference, [t.double() for t in given], upstream)
    for name, tensor, a, b, exact in zip(tensors, given, mine, theirs, truth, strict=True):
        assert a.dtype == tensor.dtype and a.shape == tensor.shape
        largest = float(exact.abs().max())
        floor = 12 * EPS * max(largest, term) + 2 * rounding(tensor.dtype) * largest
        assert_close(f"gradient of {name}", a, b, exact, floor)
