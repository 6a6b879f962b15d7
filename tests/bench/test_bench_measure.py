"""From a case to a row: what is recorded, and how failures are recorded."""

import json

import pytest
import torch

from bench.harness.case import Absent, Case, WrongResult, check_close
from bench.harness.clock import CpuClock
from bench.harness.measure import Bench

CEILINGS = [
    {"case": "copy", "dtype": "float32", "value": 10.0},  # GB/s
    {"case": "matmul", "dtype": "float32", "value": 0.05},  # TFLOP/s
]
KEYS = {
    "suite", "case", "shape", "dtype", "metric", "value", "unit", "floor", "fraction_of_floor",
    "fraction_of_copy", "peak_memory_bytes", "peers",
}  # fmt: skip


@pytest.fixture
def bench():
    return Bench(torch.device("cpu"), CEILINGS)


def double(inputs):
    return lambda: inputs * 2


def make_case(candidates=None, **changes):
    def check(inputs, result):
        if not torch.equal(result, inputs * 2):
            raise WrongResult("not twice the input")

    return Case(**{
        "case": "double", "shape": {"R": 4, "V": 8}, "dtype": torch.float32, "metric": "forward",
        "unit": "ms", "bytes": 20_000_000, "flops": 0,
        "make_inputs": lambda seed: torch.full((1 << 20,), float(seed + 1)),
        "candidates": candidates or {"ours": double, "peer": double}, "check": check,
    } | changes)  # fmt: skip


def fails(message):
    def prepare(inputs):
        raise RuntimeError(message)

    return prepare


def absent(inputs):
    raise Absent("not installed")


def test_a_row_has_the_documented_keys_and_is_json(bench):
    row = bench.measure("kernels", make_case())
    assert set(row) == KEYS
    assert set(row["peers"]["peer"]) == {"value", "unit", "peak_memory_bytes"}
    assert row["shape"] == {"R": 4, "V": 8}
    assert row["dtype"] == "float32"
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert bench.failures == []


def test_floor_of_bytes_and_of_operations(bench):
    row = bench.measure("kernels", make_case())
    assert row["floor"] == 2.0  # ms: 20 MB at 10 GB/s
    assert row["fraction_of_floor"] == pytest.approx(row["floor"] / row["value"], rel=2e-3)
    assert row["fraction_of_copy"] == row["fraction_of_floor"]
    row = bench.measure("kernels", make_case(flops=250_000_000, unit="us"))
    assert row["floor"] == 5000.0  # us: 250 MFLOP at 0.05 TFLOP/s, longer than the bytes take
    assert row["fraction_of_copy"] == pytest.approx(2000 / row["value"], rel=2e-3)


def test_a_peer_that_fails_is_text_in_the_row(bench):
    case = make_case({"ours": double, "broken": fails("no such kernel"), "peer": double})
    row = bench.measure("kernels", case)
    assert row["peers"]["broken"]["error"] == "RuntimeError: no such kernel"
    assert row["peers"]["broken"]["value"] is None
    assert row["value"] > 0 and row["peers"]["peer"]["value"] > 0
    assert len(bench.failures) == 1 and "no such kernel" in bench.failures[0]


def test_a_wrong_result_is_not_timed(bench):
    row = bench.measure("kernels", make_case({"ours": lambda inputs: lambda: inputs * 3}))
    assert row["value"] is None
    assert row["fraction_of_floor"] is None
    assert row["error"] == "WrongResult: not twice the input"
    assert bench.failures


def test_an_absent_peer_is_left_out_and_is_no_failure(bench):
    row = bench.measure("kernels", make_case({"ours": double, "peer": absent}))
    assert row["peers"] == {}
    assert bench.failures == []


def test_a_peer_out_of_memory_is_recorded_and_is_no_failure(bench):
    def prepare(inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    row = bench.measure("kernels", make_case({"ours": double, "eager": prepare}))
    assert row["peers"]["eager"]["error"] == "out of memory"
    assert bench.failures == []


def test_inputs_exceed_the_cache(bench):
    cache = bench.clock.cache_bytes()
    assert bench._input_sets(torch.empty(cache // 4, dtype=torch.uint8)) == 16
    assert bench._input_sets(torch.empty(cache * 3, dtype=torch.uint8)) == 2
    assert bench._input_sets(torch.empty(1)) == 256
    seeds = []

    def make_inputs(seed):
        seeds.append(seed)
        return torch.full((cache // 4,), float(seed))  # four bytes each: the size of the cache

    bench.measure("kernels", make_case({"ours": double}, make_inputs=make_inputs))
    assert seeds == [0, 1, 2, 3]


@pytest.mark.parametrize("mebibytes", [8, 64])
def test_peak_memory_of_a_call(mebibytes):
    clock = CpuClock()

    def kept():
        return torch.ones(mebibytes << 18)  # 4 bytes each

    def freed():
        kept()

    def untouched():
        return torch.empty(mebibytes << 18)

    kept()
    for call, expected in ((kept, mebibytes), (freed, mebibytes), (untouched, 0)):
        assert clock.peak_bytes(call) / 2**20 == pytest.approx(expected, abs=2), call


def test_check_close_allows_for_precision_and_rejects_nan():
    reference = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    check_close("x", reference.float(), reference)
    check_close("x", reference.bfloat16(), reference)
    with pytest.raises(WrongResult, match="x: relative error"):
        check_close("x", reference.float() * 1.001, reference)
    with pytest.raises(WrongResult):
        check_close("x", reference.float().index_fill(0, torch.tensor([3]), torch.nan), reference)
