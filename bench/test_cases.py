"""The same cases under pytest-benchmark, for regression tracking.

    pytest bench --benchmark-only [--benchmark-autosave] [--benchmark-compare]

On a GPU, times here include the kernel launch; those of `python -m bench.run` do not.
"""

import importlib

import pytest
import torch

from bench.harness.case import Absent
from bench.harness.clock import restore
from bench.run import benchmarks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _collect():
    for benchmark in benchmarks().values():
        module = importlib.import_module(benchmark.module)
        for case in getattr(module, "cases", lambda device: ())(DEVICE):
            for name in case.candidates:
                yield pytest.param(case, name, id=f"{case.name} {name}".replace(" ", "-"))


@pytest.mark.parametrize(("case", "name"), _collect())
def test_case(benchmark, case, name):
    inputs = case.make_inputs(0)
    try:
        call = case.candidates[name](inputs)
    except Absent as absent:
        pytest.skip(str(absent))
    case.check_call(inputs, call)

    def timed():
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.name
    benchmark.extra_info.update(shape=case.shape, bytes=case.bytes, flops=case.flops)
    benchmark.pedantic(timed, setup=lambda: restore(call), rounds=10, warmup_rounds=2)
