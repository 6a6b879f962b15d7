"""The GPU clock on a simulated device: what lies between the events."""

import contextlib
import types

import pytest
import torch

from bench.harness.clock import CudaClock
from bench.harness.measure import Bench

from test_bench_measure import CEILINGS, make_case  # isort: skip


class Device:
    """A simulated queue: `now` is its total time in microseconds, `log` lists what was queued."""

    def __init__(self):
        self.now = 0.0
        self.log = []
        self.capturing = None

    def spend(self, what, microseconds):
        self.log.append(what)
        if self.capturing is not None:
            self.capturing.append((what, microseconds))
        else:
            self.now += microseconds


@pytest.fixture
def device(monkeypatch):
    device = Device()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            device.log.append("event")
            self.at = device.now

        def elapsed_time(self, other):
            return (other.at - self.at) / 1e3  # ms

    class Graph:
        def replay(self):
            device.log.append("replay")
            device.now += sum(microseconds for _, microseconds in self.nodes)

    @contextlib.contextmanager
    def capture(graph):
        device.capturing = graph.nodes = []
        yield
        device.capturing = None

    for name, fake in {
        "Event": Event, "CUDAGraph": Graph, "graph": capture, "synchronize": lambda: None,
        "empty_cache": lambda: None, "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 100, "max_memory_allocated": lambda: 350,
        "get_device_properties": lambda i: types.SimpleNamespace(L2_cache_size=1 << 20),
        "_sleep": lambda cycles: device.spend("hold", 1000.0),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    return device


def call_of(device, microseconds):
    return lambda: device.spend("call", microseconds)


def test_median_of_the_time_between_the_events(device):
    calls = [call_of(device, t) for t in (10.0, 30.0, 20.0)]
    assert CudaClock().time(calls, in_graph=False) == pytest.approx(20e-6)
    start = device.log.index("hold")
    assert device.log[start : start + 4] == ["hold", "event", "call", "event"]


def test_restoring_inputs_is_not_timed(device):
    call = call_of(device, 7.0)
    call.restore = lambda: device.spend("restore", 500.0)
    assert CudaClock().time([call], in_graph=False) == pytest.approx(7e-6)
    hold = device.log.index("hold")
    assert device.log[hold - 1] == "restore"


def test_a_graph_holds_one_call_per_set_of_inputs(device):
    calls = [call_of(device, 4.0) for _ in range(8)]
    assert CudaClock().time(calls, in_graph=True) == pytest.approx(4e-6)
    assert "replay" in device.log


def test_peak_excludes_what_was_allocated_before(device):
    assert CudaClock().peak_bytes(call_of(device, 1.0)) == 250


def test_a_row_from_the_gpu(device):
    bench = Bench(torch.device("cpu"), CEILINGS)
    bench.device, bench.clock = types.SimpleNamespace(type="cuda"), CudaClock()

    def prepare(microseconds):
        def make(inputs):
            def call():
                device.spend("call", microseconds)
                return inputs * 2

            return call

        return make

    case = make_case({"ours": prepare(50.0), "peer": prepare(80.0)}, unit="us", in_graph=True)
    row = bench.measure("kernels", case)
    assert (row["value"], row["peers"]["peer"]["value"]) == (50.0, 80.0)
    assert row["peak_memory_bytes"] == 250
    assert bench.failures == []
