"""`bench` is not installed: it runs from the root of the repository. Measurements are short."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    """A few rounds, and inputs that exceed a cache of 1 MB: the cache of a server can be 500 MB."""
    monkeypatch.setattr("bench.harness.clock.CPU_SECONDS", 0.01)
    monkeypatch.setattr("bench.harness.clock.CpuClock.cache_bytes", lambda _: 1 << 20)
