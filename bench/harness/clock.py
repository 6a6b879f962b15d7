"""Time and peak memory of a call, on a GPU or a CPU."""

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch

from bench.harness.case import Call

HOLD_CYCLES_PER_S = 2e9  # rate at which torch.cuda._sleep is assumed to count
GPU_SECONDS, CPU_SECONDS = 0.3, 3.0  # measuring time per implementation
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h
MAX_ROUNDS, MIN_ROUNDS = 200, 5


def restore(call: Call) -> None:
    """Restore the inputs that the last call overwrote, if it overwrites any; never timed."""
    if hasattr(call, "restore"):
        call.restore()


class CudaClock:
    """CUDA events around each call, recorded while the host is ahead of the device."""

    def warm_up(self, calls: Sequence[Call]) -> None:
        """Two calls per set of inputs, for compilation, library handles and the allocator."""
        for call in (*calls, *calls):
            restore(call)
            call()
        torch.cuda.synchronize()

    def time(self, calls: Sequence[Call], in_graph: bool) -> float:
        """Median seconds of one call. Each of `calls` has its own inputs; they alternate."""
        self.warm_up(calls)
        if in_graph:
            graph = self._capture(calls)
            return self._median([graph.replay]) / len(calls)
        return self._median(calls)

    def _median(self, calls: Sequence[Call]) -> float:
        restore(calls[0])
        torch.cuda.synchronize()
        started = time.perf_counter()
        calls[0]()
        host_seconds = time.perf_counter() - started
        torch.cuda.synchronize()
        once = max(time.perf_counter() - started, 1e-6)
        rounds = int(min(max(GPU_SECONDS / once, MIN_ROUNDS), MAX_ROUNDS))
        # The host queues the call while the device sleeps, so that launch gaps are not timed.
        hold = int(min(2 * host_seconds, 0.02) * HOLD_CYCLES_PER_S)
        events = []
        for i in range(rounds):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            restore(calls[i % len(calls)])
            torch.cuda._sleep(hold)
            start.record()
            calls[i % len(calls)]()
            stop.record()
            events.append((start, stop))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(stop) for start, stop in events) / 1e3

    def _capture(self, calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        torch.cuda.synchronize()
        return graph

    def peak_bytes(self, call: Call) -> int:
        """Device memory that one call allocates on top of what is allocated already."""
        restore(call)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def cache_bytes(self) -> int:
        """Size of the L2 cache; the inputs of a measurement must exceed it several times."""
        return torch.cuda.get_device_properties(0).L2_cache_size


class CpuClock:
    """perf_counter; implementations alternate, so that noise of the machine affects all alike, in a
    random order, because what ran before decides what is in the cache."""

    def time_together(self, calls: dict[str, Sequence[Call]]) -> dict[str, float]:
        """Median seconds of one call, per implementation."""
        for each in calls.values():
            for call in each:
                restore(call)
                call()
        slowest = sum(self._once(each[0]) for each in calls.values())
        rounds = int(min(max(CPU_SECONDS * len(calls) / slowest, MIN_ROUNDS), MAX_ROUNDS))
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        order, random = list(calls), Random(0)
        for i in range(rounds):
            random.shuffle(order)
            for name in order:
                seconds[name].append(self._once(calls[name][i % len(calls[name])]))
        return {name: statistics.median(each) for name, each in seconds.items()}

    def _once(self, call: Call) -> float:
        restore(call)
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    def peak_bytes(self, call: Call) -> int:
        """Resident memory that one call needs on top of what is resident already.

        Linux's high-water mark, reset before the call; memory never touched does not count.
        """
        restore(call)
        gc.collect()
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)  # memory that malloc keeps after a free would hide new use
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 18)  # freed memory returns to the system at once
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
        before = _status_bytes("VmRSS")
        call()
        peak = _status_bytes("VmHWM")
        # The values that malloc's dynamic thresholds reach after large blocks have been freed.
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 64 << 20)
        return max(0, peak - before)

    def cache_bytes(self) -> int:
        """Size of the last-level cache as Linux reports it, else 32 MB."""
        found = [
            int(p.read_text().removesuffix("K\n")) * 1024
            for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        ]
        return max(found, default=32 << 20)


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


def clock_for(device: torch.device) -> CudaClock | CpuClock:
    return CudaClock() if device.type == "cuda" else CpuClock()
