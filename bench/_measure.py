"""From a case to a row: checked, timed, weighed, and compared with the floor of this machine."""

import gc
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from bench._case import Absent, Call, Case, tensors
from bench._clock import clock_for
from bench._profile import profile
from bench._rows import Measured, Row, dtype_name, make_row

PER_SECOND = {"us": 1e6, "ms": 1e3}
MOST_SETS = 256
CEILINGS = "ceilings"  # the suite that measures the machine, before all others


class Bench:
    """Measures cases on one device. `failures` holds in words what went wrong, `profiles` what
    `profile` found."""

    def __init__(self, device: torch.device, ceilings: Iterable[Row] = ()):
        self.device = device
        self.clock = clock_for(device)
        self.failures: list[str] = []
        self.profiles: dict[str, dict[str, Any]] = {}
        self.copy_bytes_per_second = math.nan
        self.flops_per_second: dict[str, float] = {}
        for row in ceilings:
            if row["case"] == "copy":
                self.copy_bytes_per_second = row["value"] * 1e9
            else:
                self.flops_per_second[row["dtype"]] = row["value"] * 1e12

    def floor_seconds(self, case: Case) -> float:
        """The larger of bytes over copy bandwidth and operations over matmul rate."""
        floor = case.bytes / self.copy_bytes_per_second
        if case.flops:
            floor = max(floor, case.flops / self.flops_per_second[dtype_name(case.dtype)])
        return floor

    def measure(self, suite: str, case: Case) -> Row:
        """One row. What fails is recorded in it, in words, under "error"."""
        results = self._run_all(case)
        scale = PER_SECOND[case.unit]
        mine, *_ = results
        return make_row(
            suite,
            case.case,
            case.shape,
            case.dtype,
            case.metric,
            case.unit,
            results.pop(mine).times(scale),
            floor=self.floor_seconds(case) * scale,
            copy_floor=case.bytes / self.copy_bytes_per_second * scale,
            peers={name: result.times(scale) for name, result in results.items()},
        )

    def compare(
        self, what: str, measures: dict[str, Callable[[], Measured]]
    ) -> dict[str, Measured]:
        """What each measured, by name, ours first; peers that are absent are left out."""
        found = {
            name: self._guarded(f"{what}: {name}", measure, is_peer=number > 0)
            for number, (name, measure) in enumerate(measures.items())
        }
        return {name: result for name, result in found.items() if result is not None}

    def profile(self, name: str, call: Call) -> None:
        """Profile the second of two calls; `name` begins with the suite and a slash."""

        def measure() -> Measured:
            call()
            self.profiles[name] = profile(call, self.device)
            return Measured()

        self._guarded(f"profile {name}", measure, is_peer=False)

    def _guarded(
        self, what: str, measure: Callable[[], Measured], is_peer: bool
    ) -> Measured | None:
        """What `measure` returns, or in words why it failed; None where a peer is absent.

        A peer that needs more memory than there is is a result; all else goes to `failures`.
        """
        # The visible end of every error of foreign code: it becomes text in the row.
        try:
            return measure()
        except Absent:
            if not is_peer:
                raise
            return None
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:2000]
            if isinstance(error, torch.OutOfMemoryError):
                text = "out of memory"
            if not (is_peer and isinstance(error, torch.OutOfMemoryError)):
                self.failures.append(f"{what}: {text}")
            return Measured(error=text)
        finally:
            self.release()

    def _run_all(self, case: Case) -> dict[str, Measured]:
        """Seconds and peak bytes, or an error, of every candidate that is there; ours first.

        On a GPU one after the other, so that each has all the memory; on a CPU in turns.
        """
        waiting: dict[str, list[Call]] = {}

        def measure(name: str) -> Measured:
            calls, peak = self._ready(case, name)
            if self.device.type == "cuda":
                return Measured(self.clock.time(calls, case.in_graph), peak)
            waiting[name] = calls
            return Measured(None, peak)

        results = self.compare(
            case.name, {name: partial(measure, name) for name in case.candidates}
        )
        if waiting:
            for name, seconds in self.clock.time_together(waiting).items():
                results[name] = results[name]._replace(value=seconds)
        return results

    def _ready(self, case: Case, name: str) -> tuple[list[Call], int]:
        """Calls on enough sets of inputs to outgrow the cache, the first checked and weighed."""
        first = case.make_inputs(0)
        call = case.candidates[name](first)
        case.check_call(first, call)
        peak = self.clock.peak_bytes(call)
        calls = [call]
        for seed in range(1, self._sets(first)):
            calls.append(case.candidates[name](case.make_inputs(seed)))
        return calls, peak

    def _sets(self, inputs: Any) -> int:
        size = sum(t.numel() * t.element_size() for t in tensors(inputs))
        cache = self.clock.cache_bytes()
        fewest = 1 if size > 32 * cache else 2
        return min(max(fewest, math.ceil(4 * cache / size)), MOST_SETS)

    def release(self) -> None:
        """Give back what is no longer held."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
