"""Where a call's time goes: its longest kernels, and the time the GPU is idle."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from bench.harness.rows import rounded

LONGEST = 15
MAX_NAME_CHARACTERS = 100  # names of C++ templates contain all of their types


class Span(NamedTuple):
    """One kernel or copy on the GPU."""

    name: str
    start_us: float
    end_us: float


class Total(NamedTuple):
    """All calls of one kernel, or on a CPU of one op excluding the ops it calls."""

    name: str
    calls: int
    us: float


def profile(call: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Profile one call; make the same call once before, to warm up.

    Returns `wall_ms`; `idle_share`, the fraction of it in which no kernel and no copy ran (None on
    a CPU); and `longest`, the kernels (on a CPU, ops) with the longest total time, each with
    `name`, `calls`, `ms` and `share` of the total over all kernels. The profiler slows the host
    down, so a GPU is idle for longer than without it.
    """
    gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as found:
        started = time.perf_counter()
        call()
        if gpu:
            torch.cuda.synchronize()
        wall_us = 1e6 * (time.perf_counter() - started)
    if gpu:
        spans = gpu_spans(found.events())
        totals, idle_share = totals_of(spans), 1 - busy_us(spans) / wall_us
    else:
        averages = found.key_averages()
        totals = [Total(each.key, each.count, each.self_cpu_time_total) for each in averages]
        idle_share = None
    return {
        "wall_ms": rounded(wall_us / 1e3),
        "idle_share": None if idle_share is None else rounded(idle_share),
        "longest": longest(totals),
    }


def gpu_spans(events: Iterable[Any]) -> list[Span]:
    """What ran on the GPU. Named ranges of the host appear there too and are left out."""
    return [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]


def busy_us(spans: Iterable[Span]) -> float:
    """Length of the union of all spans; kernels of several streams overlap."""
    busy, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start_us):
        busy += max(0.0, span.end_us - max(span.start_us, until))
        until = max(until, span.end_us)
    return busy


def totals_of(spans: Iterable[Span]) -> list[Total]:
    calls: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        calls[span.name].append(span.end_us - span.start_us)
    return [Total(name, len(each), sum(each)) for name, each in calls.items()]


def longest(totals: Iterable[Total]) -> list[dict[str, Any]]:
    """The first LONGEST, with their share of the total."""
    ordered = sorted(totals, key=lambda total: total.us, reverse=True)
    everything = sum(total.us for total in ordered)
    return [
        {
            "name": total.name[:MAX_NAME_CHARACTERS],
            "calls": total.calls,
            "ms": rounded(total.us / 1e3),
            "share": rounded(total.us / everything),
        }
        for total in ordered[:LONGEST]
    ]
