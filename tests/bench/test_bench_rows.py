"""The JSON row that all benchmarks write."""

import pytest
import torch

from bench.harness.rows import Measured, make_row


def row_of(ours, unit="ms", **more):
    return make_row("s", "c", {"R": 4}, torch.bfloat16, "m", unit, ours, **more)


def test_a_time_and_its_peer():
    row = row_of(Measured(8.0, 300), floor=2.0, copy_floor=1.0, peers={"eager": Measured(24.0, 9)})
    assert row == {
        "suite": "s", "case": "c", "shape": {"R": 4}, "dtype": "bfloat16", "metric": "m",
        "value": 8.0, "unit": "ms", "floor": 2.0, "fraction_of_floor": 0.25,
        "fraction_of_copy": 0.125, "peak_memory_bytes": 300,
        "peers": {"eager": {"value": 24.0, "unit": "ms", "peak_memory_bytes": 9}},
    }  # fmt: skip


def test_a_higher_rate_is_better():
    row = row_of(Measured(10.0), unit="images/s", floor=40.0)
    assert row["fraction_of_floor"] == 0.25


def test_a_failed_measurement_has_no_value():
    row = row_of(Measured(error="boom"), floor=2.0, peers={"eager": Measured(error="no")})
    assert (row["value"], row["fraction_of_floor"], row["error"]) == (None, None, "boom")
    assert row["peers"]["eager"]["error"] == "no"
    assert row["floor"] == 2.0


def test_units():
    assert Measured(0.5, 7).times(1e3) == Measured(500.0, 7)
    assert Measured(0.5, 7).inverse(2.0).value == pytest.approx(4.0)
    assert Measured(error="e").times(2.0) == Measured(error="e").inverse(2.0) == Measured(error="e")


def test_numbers_have_four_significant_digits():
    assert row_of(Measured(1.23456), floor=0.123456)["value"] == 1.235
