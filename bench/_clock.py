"""Time and peak memory of a call, on a GPU and on a CPU."""

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench._case import Call

HOLD_CLOCK = 2e9  # cycles a second at which torch.cuda._sleep is taken to count
GPU_SECONDS, CPU_SECONDS = 0.3, 3.0  # of measuring per implementation
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
MOST_ROUNDS, FEWEST_ROUNDS = 200, 5


def restore(call: Call) -> None:
    """Undo what the last call did to its inputs, where it has something to undo; never timed."""
    if hasattr(call, "restore"):
        call.restore()


class CudaClock:
    """CUDA events around each call, the queue held until the host is ahead; median, seconds."""

    def warm_up(self, calls: Sequence[Call]) -> None:
        """Compilation, handles, allocator: two calls on every set of inputs."""
        for call in (*calls, *calls):
            restore(call)
            call()
        torch.cuda.synchronize()

    def time(self, calls: Sequence[Call], in_graph: bool) -> float:
        """Seconds of one call; the calls take turns, one set of inputs each."""
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
        rounds = int(min(max(GPU_SECONDS / once, FEWEST_ROUNDS), MOST_ROUNDS))
        # While the device sleeps, the host queues the call: launch gaps are not timed.
        hold = int(min(2 * host_seconds, 0.02) * HOLD_CLOCK)
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
        """Device memory that one call needs beside what is there already."""
        restore(call)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def cache_bytes(self) -> int:
        """What inputs must not fit into, several times over."""
        return torch.cuda.get_device_properties(0).L2_cache_size


class CpuClock:
    """perf_counter; implementations take turns, so that a noisy machine is noisy for all."""

    def time_together(self, calls: dict[str, Sequence[Call]]) -> dict[str, float]:
        """Median seconds of one call of each."""
        for each in calls.values():
            for call in each:
                restore(call)
                call()
        slowest = sum(self._once(each[0]) for each in calls.values())
        rounds = int(min(max(CPU_SECONDS * len(calls) / slowest, FEWEST_ROUNDS), MOST_ROUNDS))
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for i in range(rounds):
            for name, each in calls.items():
                seconds[name].append(self._once(each[i % len(each)]))
        return {name: statistics.median(each) for name, each in seconds.items()}

    def _once(self, call: Call) -> float:
        restore(call)
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    def peak_bytes(self, call: Call) -> int:
        """Resident memory that one call needs beside what is there already.

        The kernel's high-water mark, set back before the call; untouched memory does not count.
        """
        restore(call)
        gc.collect()
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)  # freed memory that malloc keeps would hide new use
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 18)  # what is freed goes back at once
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
        before = _status_bytes("VmRSS")
        call()
        peak = _status_bytes("VmHWM")
        # Where malloc's moving thresholds end once large blocks have been freed.
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 64 << 20)
        return max(0, peak - before)

    def cache_bytes(self) -> int:
        """The last-level cache as Linux tells it; 32 MB where it does not."""
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
