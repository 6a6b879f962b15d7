"""Forward and backward of an op with plain tensor arguments, and its check against float64."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.harness.case import Call, check_close

CHECKED_ROWS = 64

# tensors -> one result or several
Compute = Callable[..., Tensor | tuple[Tensor, ...]]
# What a call returns: results, and the gradient of every argument.
Result = tuple[list[Tensor], list[Tensor]]


def forward_backward(
    compute: Compute, arguments: Sequence[Tensor], upstream: Sequence[Tensor]
) -> Call:
    """A call that computes the results and the gradients of all `arguments`."""
    leaves = [t.detach().clone().requires_grad_() for t in arguments]

    def call() -> Result:
        out = compute(*leaves)
        out = [out] if isinstance(out, Tensor) else list(out)
        return out, list(torch.autograd.grad(out, leaves, list(upstream)))

    return call


def check_gradients(
    reference: Compute, arguments: dict[str, Tensor], upstream: Sequence[Tensor], result: Result
) -> None:
    """Raise WrongResult unless results and gradients agree with `reference` in float64.

    Arguments of several dimensions have rows, of which the first are checked; the gradient of a
    vector is a sum over all rows, which are all computed.
    """
    names, sums = list(arguments), any(t.dim() == 1 for t in arguments.values())
    rows = slice(None if sums else CHECKED_ROWS)
    given = [t if t.dim() == 1 else t[rows] for t in arguments.values()]
    exact = forward_backward(reference, [t.double() for t in given], [g[rows] for g in upstream])
    for i, (found, expected) in enumerate(zip(result[0], exact()[0], strict=True)):
        check_close(f"result {i}", found[rows], expected)
    for name, found, expected in zip(names, result[1], exact()[1], strict=True):
        check_close(f"gradient of {name}", found[: len(expected)], expected)
