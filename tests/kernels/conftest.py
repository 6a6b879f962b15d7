"""Fixtures: all backends, poisoned memory, and which path ran.

Without a GPU the Triton kernels run in Triton's interpreter (see tests/conftest.py).
"""

from __future__ import annotations

import importlib

import pytest
import torch
from backends import TRITON
from iris_kernels import cpp
from kernel_oracle import NO_TRITON, TRITON_RUNS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["torch", "cpp", TRITON])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run each test once per backend."""
    if request.param == "triton" and not TRITON_RUNS:
        pytest.skip(NO_TRITON)
    if request.param == "cpp" and (DEVICE != "cpu" or cpp.library() is None):
        pytest.skip("the C++ kernels run on a CPU, if a compiler was found at installation")
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", request.param)
    return request.param


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill torch.empty with NaN (integers: their maximum)."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def paths_run(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the path functions that the ops call, in order."""
    names: list[str] = []
    functions = {
        "token_stats.op": [
            f"{way}_{path}"
            for way in ("forward", "backward")
            for path in ("triton", "cpp", "torch")
        ],
        "guided_sample.op": ["sample_triton", "sample_cpp", "sample_torch"],
    }
    for module_name, of_module in functions.items():
        module = importlib.import_module(f"iris_kernels.{module_name}")
        for name in of_module:
            monkeypatch.setattr(module, name, _recorded(getattr(module, name), name, names))
    return names


def _recorded(function, name: str, names: list[str]):
    def call(*arguments):
        names.append(name)
        return function(*arguments)

    return call
