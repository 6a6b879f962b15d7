"""What a benchmark declares: cases, and for each the implementations that compute it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench.harness.rows import dtype_name

Call = Callable[[], Any]


class WrongResult(AssertionError):
    """An implementation computed a wrong result; it is not timed."""


class Absent(Exception):
    """A peer is not installed or does not run on this device."""


@dataclass(frozen=True)
class Case:
    """One operation at one shape. `make_inputs(seed)` samples inputs on the device.

    `candidates` maps names to `prepare(inputs) -> call`. `prepare` is not timed; `call()` is, and
    can be repeated any number of times. A call that overwrites its inputs has an attribute
    `restore`, a function that runs untimed before every call. The first candidate is ours, the
    others are its peers. A peer whose `prepare` raises Absent is left out.
    `check(inputs, result)` raises WrongResult; `result` is what `call()` returned.
    `bytes` and `flops` are the minimum that any implementation must move and compute.
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
        """Case, metric, shape and dtype, for people and for test ids."""
        shape = " ".join(f"{k}={v}" for k, v in self.shape.items())
        return f"{self.case} {self.metric} {shape} {dtype_name(self.dtype)}"

    def check_call(self, inputs: Any, call: Call) -> None:
        """Check the result of a first call; raise WrongResult.

        A call that overwrites its `inputs` (those of seed 0) is checked against a fresh copy.
        """
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
    """Raise WrongResult unless ||result - reference|| / ||reference|| is at most `allowed`.

    The default of `allowed` follows from the precision of `result`.
    """
    reference = reference.double()
    error = (result.double() - reference).norm() / reference.norm()
    if allowed is None:
        allowed = 1e-4 if result.dtype in (torch.float32, torch.float64) else 1e-2
    if not error <= allowed:  # NaN is wrong too
        raise WrongResult(f"{what}: relative error {error.item():.1e}, allowed {allowed:.0e}")
