"""From a case to a row: checked, timed, weighed, and compared with the floor of this machine."""

import gc
import math
from collections.abc import Iterable
from typing import Any

import torch

from bench._case import Absent, Call, Case, dtype_name, tensors
from bench._clock import clock_for

Row = dict[str, Any]
PER_SECOND = {"us": 1e6, "ms": 1e3}
MOST_SETS = 256
CEILINGS = "ceilings"  # the suite that measures the machine, before all others


class Bench:
    """Measures cases on one device. `failures` holds in words what went wrong."""

    def __init__(self, device: torch.device, ceilings: Iterable[Row] = ()):
        self.device = device
        self.clock = clock_for(device)
        self.failures: list[str] = []
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
        ours = next(iter(case.candidates))
        mine = results.pop(ours)
        scale = PER_SECOND[case.unit]
        floor = self.floor_seconds(case)
        row: Row = {
            "suite": suite,
            "case": case.case,
            "shape": case.shape,
            "dtype": dtype_name(case.dtype),
            "metric": case.metric,
            "value": None,
            "unit": case.unit,
            "floor": rounded(floor * scale),
            "fraction_of_floor": None,
            "fraction_of_copy": None,
            "peak_memory_bytes": mine.get("peak"),
            "peers": {name: self._peer(result, case.unit) for name, result in results.items()},
        }
        if "error" in mine:
            row["error"] = mine["error"]
        else:
            seconds = mine["seconds"]
            row["value"] = rounded(seconds * scale)
            row["fraction_of_floor"] = rounded(floor / seconds)
            row["fraction_of_copy"] = rounded(case.bytes / seconds / self.copy_bytes_per_second)
        return row

    def _peer(self, result: dict[str, Any], unit: str) -> Row:
        seconds = result.get("seconds")
        peer: Row = {
            "value": None if seconds is None else rounded(seconds * PER_SECOND[unit]),
            "unit": unit,
            "peak_memory_bytes": result.get("peak"),
        }
        return peer | {key: result[key] for key in ("error",) if key in result}

    def _run_all(self, case: Case) -> dict[str, dict[str, Any]]:
        """Seconds and peak bytes, or an error, of every candidate that is there.

        On a GPU one after the other, so that each has all the memory; on a CPU in turns.
        """
        results: dict[str, dict[str, Any]] = {}
        waiting: dict[str, list[Call]] = {}
        for number, name in enumerate(case.candidates):
            # The visible end of every error of foreign code: it becomes text in the row.
            try:
                calls, peak = self._ready(case, name)
                results[name] = {"peak": peak}
                if self.device.type == "cuda":
                    results[name]["seconds"] = self.clock.time(calls, case.in_graph)
                else:
                    waiting[name] = calls
            except Absent:
                if number == 0:
                    raise
            except torch.OutOfMemoryError:
                results[name] = {"error": "out of memory"}
                if number == 0:
                    self.failures.append(f"{case.name}: {name}: out of memory")
            except Exception as error:
                results[name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
                self.failures.append(f"{case.name}: {name}: {results[name]['error']}")
            calls = None
            self._release()
        if waiting:
            for name, seconds in self.clock.time_together(waiting).items():
                results[name]["seconds"] = seconds
        return results

    def _ready(self, case: Case, name: str) -> tuple[list[Call], int]:
        """Calls on enough sets of inputs to outgrow the cache, the first checked and weighed."""
        first = case.make_inputs(0)
        call = case.candidates[name](first)
        overwrites = hasattr(call, "restore")
        case.check(case.make_inputs(0) if overwrites else first, call())
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

    def _release(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def rounded(number: float) -> float:
    """Four significant digits: more is noise."""
    return float(f"{number:.4g}")
