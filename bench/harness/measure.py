"""From a case to a row: check, time, measure memory, compare with the floor of this machine."""

import gc
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from bench.harness.case import Absent, Call, Case, tensors
from bench.harness.clock import clock_for
from bench.harness.profile import profile
from bench.harness.rows import Measured, Row, dtype_name, make_row

PER_SECOND = {"us": 1e6, "ms": 1e3}
MAX_INPUT_SETS = 256


class Bench:
    """Measures cases on one device.

    `ceilings`: the rows of the suite of that name, for the floors. `failures` lists what went wrong
    as text, `profiles` holds the results of `profile` by name.

    `only_model` and `only_case` are the flags --model and --case: a benchmark of several models
    takes those of `models`, and measures what `wants` names.
    """

    def __init__(
        self,
        device: torch.device,
        ceilings: Iterable[Row] = (),
        only_model: str | None = None,
        only_case: str | None = None,
    ):
        self.device = device
        self._only_model, self._only_case = only_model, only_case
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

    def models(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that --model leaves."""
        return [name for name in names if self._only_model in (None, name)]

    def wants(self, name: str) -> bool:
        """Whether --case, a part of the name of a case, leaves this one."""
        return self._only_case is None or self._only_case in name

    def floor_seconds(self, case: Case) -> float:
        """The larger of bytes / copy bandwidth and operations / matmul rate."""
        floor = case.bytes / self.copy_bytes_per_second
        if case.flops:
            floor = max(floor, case.flops / self.flops_per_second[dtype_name(case.dtype)])
        return floor

    def measure(self, suite: str, case: Case) -> Row:
        """Measure one case. A failure is recorded in the row, as text under "error"."""
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
        """Run each measurement, ours first; the result leaves out absent peers."""
        found = {
            name: self._guarded(f"{what}: {name}", measure, is_peer=number > 0)
            for number, (name, measure) in enumerate(measures.items())
        }
        return {name: result for name, result in found.items() if result is not None}

    def profile(self, name: str, call: Call) -> None:
        """Profile the second of two calls; `name` is "SUITE/what"."""

        def measure() -> Measured:
            call()
            self.profiles[name] = profile(call, self.device)
            return Measured()

        self._guarded(f"profile {name}", measure, is_peer=False)

    def _guarded(
        self, what: str, measure: Callable[[], Measured], is_peer: bool
    ) -> Measured | None:
        """The result of `measure`, or its error as text; None if a peer is absent.

        A peer that runs out of memory is a result; every other error is added to `failures`.
        """
        # Peers may raise anything: the error becomes text in the row, and the run continues.
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
        """Seconds and peak bytes, or an error, of every available candidate; ours first.

        On a GPU one after the other, so that each has all the memory. On a CPU alternating, with
        inputs made in turn: the pages that a process gets first can be slower than later ones.
        """
        waiting: dict[str, list[Call]] = {}
        more: range = range(0)

        def measure(name: str) -> Measured:
            nonlocal more
            call, peak, more = self._ready(case, name)
            if self.device.type == "cuda":
                calls = [call, *(self._prepare(case, name, seed) for seed in more)]
                return Measured(self.clock.time(calls, case.in_graph), peak)
            waiting[name] = [call]
            return Measured(None, peak)

        results = self.compare(
            case.name, {name: partial(measure, name) for name in case.candidates}
        )
        if waiting:
            for seed in more:
                for name, calls in waiting.items():
                    calls.append(self._prepare(case, name, seed))
            for name, seconds in self.clock.time_together(waiting).items():
                results[name] = results[name]._replace(value=seconds)
        return results

    def _ready(self, case: Case, name: str) -> tuple[Call, int, range]:
        """A checked call, its peak bytes, and the seeds of as many more sets of inputs as exceed
        the cache."""
        first = case.make_inputs(0)
        call = case.candidates[name](first)
        case.check_call(first, call)
        return call, self.clock.peak_bytes(call), range(1, self._input_sets(first))

    def _prepare(self, case: Case, name: str, seed: int) -> Call:
        return case.candidates[name](case.make_inputs(seed))

    def _input_sets(self, inputs: Any) -> int:
        size = sum(t.numel() * t.element_size() for t in tensors(inputs))
        cache = self.clock.cache_bytes()
        fewest = 1 if size > 32 * cache else 2
        return min(max(fewest, math.ceil(4 * cache / size)), MAX_INPUT_SETS)

    def release(self) -> None:
        """Free memory that is no longer referenced."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
