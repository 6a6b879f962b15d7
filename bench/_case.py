"""What a benchmark declares: cases, and for each the implementations that compute it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench._rows import dtype_name

Call = Callable[[], Any]


class WrongResult(AssertionError):
    """An implementation computed something else than it should: it is not timed."""


class Absent(Exception):
    """A peer that is not installed, or does not run on this device."""


@dataclass(frozen=True)
class Case:
    """One operation at one shape. `make_inputs(seed)` draws inputs on the device.

    `candidates` maps names to `prepare(inputs) -> call`: what `prepare` does is not timed, `call()`
    is, any number of times. A call that overwrites its inputs has an attribute `restore`: a
    function that is run before every call, and not timed. The first candidate is ours, the others
    are its peers. A peer whose `prepare` raises Absent is left out.
    `check(inputs, result)` raises WrongResult; `result` is what `call()` returned.
    `bytes` and `flops` are the least that the operation moves and computes, whoever computes it.
    """

    case: str
    shape: dict[str, int]
    dtype: torch.dtype
    metric: str
    unit: str
    bytes: int
    flops: int
    make_inputs: Callable[[int], Any]
    candidates: dict[str, Callable[[Any], Call]]
    check: Callable[[Any, Any], None]
    in_graph: bool = False  # on a GPU: timed inside a CUDA graph, as it is used

    @property
    def name(self) -> str:
        """One line for people and for test ids."""
        shape = " ".join(f"{k}={v}" for k, v in self.shape.items())
        return f"{self.case} {self.metric} {shape} {dtype_name(self.dtype)}"

    def check_call(self, inputs: Any, call: Call) -> None:
        """`check` on the result of a first call; WrongResult. One that overwrites its `inputs`,
        those of seed 0, is judged by the same ones drawn again."""
        result = call()
        self.check(self.make_inputs(0) if hasattr(call, "restore") else inputs, result)


def tensors(inputs: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(inputs, torch.Tensor):
        yield inputs
    elif isinstance(inputs, dict):
        for value in inputs.values():
            yield from tensors(value)
    elif isinstance(inputs, list | tuple):
        for value in inputs:
            yield from tensors(value)


def check_close(
    what: str, result: torch.Tensor, reference: torch.Tensor, allowed: float | None = None
) -> None:
    """||result - reference|| / ||reference|| is that of the result's precision, or `allowed`."""
    reference = reference.double()
    error = (result.double() - reference).norm() / reference.norm()
    if allowed is None:
        allowed = 1e-4 if result.dtype in (torch.float32, torch.float64) else 1e-2
    if not error <= allowed:  # NaN is wrong too
        raise WrongResult(f"{what}: relative error {error.item():.1e}, allowed {allowed:.0e}")
