"""What a profile contains: kernels by total time, and the idle time of the GPU."""

import contextlib
import types

import pytest
import torch
from torch.autograd import DeviceType

from bench.harness import profile
from bench.harness.measure import Bench
from bench.harness.peers import generate_is_broken
from bench.harness.profile import Span, Total
from bench.trainer import rollout, step, training


def test_busy_time_is_the_union_of_all_spans():
    spans = [Span("c", 30, 40), Span("a", 0, 10), Span("b", 5, 12), Span("inside", 1, 2)]
    assert profile.busy_us(spans) == 12 + 10
    assert profile.busy_us([]) == 0


def event(name, start, end, device=DeviceType.CUDA, is_range=False):
    time_range = types.SimpleNamespace(start=start, end=end)
    return types.SimpleNamespace(
        name=name, time_range=time_range, device_type=device, is_user_annotation=is_range
    )


def test_a_profile_of_a_gpu(monkeypatch):
    events = [
        event("gemm", 0, 40), event("copy", 30, 50), event("gemm", 60, 90),
        event("FSDP::pre_forward", 0, 100, is_range=True),
        event("cudaLaunchKernel", 0, 100, device=DeviceType.CPU),
    ]  # fmt: skip
    found = types.SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: contextlib.nullcontext(found))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    clock = iter([2.0, 2.0002])  # 200 us
    monkeypatch.setattr(profile.time, "perf_counter", lambda: next(clock))
    result = profile.profile(lambda: None, torch.device("cuda"))
    assert result["wall_ms"] == pytest.approx(0.2)
    assert result["idle_share"] == pytest.approx(1 - 80 / 200)
    assert result["longest"] == [
        {"name": "gemm", "calls": 2, "ms": 0.07, "share": 0.7778},
        {"name": "copy", "calls": 1, "ms": 0.02, "share": 0.2222},
    ]


def test_the_longest_are_fifteen_and_shares_are_of_the_total():
    totals = [Total(f"k{i}", 1, 10.0) for i in range(20)] + [Total("n" * 500, 3, 200.0)]
    found = profile.longest(totals)
    assert len(found) == 15
    assert found[0]["share"] == 0.5 and found[0]["calls"] == 3
    assert len(found[0]["name"]) == 100


def test_ops_on_a_cpu():
    a = torch.randn(64, 64)
    result = profile.profile(lambda: [a @ a for _ in range(5)], torch.device("cpu"))
    (product,) = (each for each in result["longest"] if each["name"] == "aten::mm")
    assert product["calls"] == 5
    assert result["idle_share"] is None
    assert sum(each["share"] for each in result["longest"]) == pytest.approx(1, abs=1e-3)


def test_bench_profiles_the_second_call_and_records_failures():
    def fails():
        raise RuntimeError("no profiler")

    bench, calls = Bench(torch.device("cpu")), []
    bench.profile("step/x", lambda: calls.append(torch.ones(3).sum()))
    bench.profile("step/y", fails)
    assert list(bench.profiles) == ["step/x"] and len(calls) == 2
    assert bench.failures == ["profile step/y: RuntimeError: no profiler"]


@pytest.mark.parametrize(
    ("suite", "calls"), [(rollout, 2 if generate_is_broken() else 3), (training, 2), (step, 1)]
)
def test_suites_that_profile_whole_calls(suite, calls, monkeypatch):
    monkeypatch.setattr(step, "CPU_SIZE", step.Size(prompts=2, group=2, cot=2, batch=1))
    monkeypatch.setattr(rollout, "CPU_COMPARED", (2,))
    monkeypatch.setattr(rollout, "PROFILED_TOKENS", 2)
    bench = Bench(torch.device("cpu"))
    suite.profiles(bench)
    assert bench.failures == []
    assert [name.split("/")[0] for name in bench.profiles] == [suite.SUITE] * calls
    for found in bench.profiles.values():
        assert "aten::mm" in {each["name"] for each in found["longest"]}
