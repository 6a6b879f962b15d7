"""The requested path runs, or an error is raised; there is no silent fallback."""

import os
import subprocess
import sys

import pytest
import torch
from iris_kernels import cpp, token_stats, uses_triton
from iris_kernels._backend import backend, triton
from kernel_oracle import TRITON_RUNS

WITHOUT_TRITON = """
import os, sys
sys.modules["triton"] = None
import torch
from iris_kernels import token_stats
for backend in ("auto", "torch", "triton"):
    os.environ["IRIS_KERNELS_BACKEND"] = backend
    print(backend, token_stats(torch.zeros(2, 4), torch.tensor([0, 3])).entropy.shape)
"""


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_these_tests_cover_the_triton_kernels():
    """Without a GPU in the interpreter: no other module may import Triton before the conftest."""
    assert TRITON_RUNS


def test_unknown_name(monkeypatch):
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "cuda")
    with pytest.raises(ValueError, match="IRIS_KERNELS_BACKEND='cuda' is unknown"):
        token_stats(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))


def test_triton_does_not_take_float64(monkeypatch):
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "triton")
    with pytest.raises(ValueError, match="float64"):
        token_stats(torch.zeros(1, 2).double(), torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_auto_on_a_cpu(dtype, monkeypatch, paths_run):
    monkeypatch.delenv("IRIS_KERNELS_BACKEND", raising=False)
    token_stats(torch.zeros(1, 2, dtype=dtype), torch.zeros(1, dtype=torch.long))
    compiled = dtype == torch.float32 and cpp.library() is not None
    assert paths_run == ["forward_cpp" if compiled else "forward_torch"]


def test_cpp_without_a_library(monkeypatch):
    monkeypatch.setattr(cpp, "library", lambda: None)
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "auto")
    assert backend(torch.zeros(1)) == "torch"
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "cpp")
    with pytest.raises(RuntimeError, match="C\\+\\+ kernels are not compiled"):
        backend(torch.zeros(1))


def test_a_library_of_other_sources_is_not_used(monkeypatch):
    if cpp.library() is None:
        pytest.skip("the C++ kernels are not compiled")
    monkeypatch.setattr(cpp, "source_hash", lambda: "other")
    with pytest.warns(UserWarning, match="compiled from other sources"):
        assert cpp.library.__wrapped__() is None


def test_a_library_that_cannot_be_loaded_is_not_used(tmp_path):
    broken = tmp_path / "_avx2.so"
    broken.write_bytes(b"cut off")
    with pytest.warns(UserWarning, match="cannot be loaded .*run pip install again"):
        assert cpp._load(broken) is None


def test_uses_triton_answers_for_a_tensor(monkeypatch):
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "torch")
    assert not uses_triton(torch.zeros(1))
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "cuda")
    with pytest.raises(ValueError, match="set it to triton, cpp, torch or auto"):
        uses_triton(torch.zeros(1))


@pytest.mark.gpu
def test_auto_is_triton_on_a_gpu(monkeypatch, paths_run):
    monkeypatch.delenv("IRIS_KERNELS_BACKEND", raising=False)
    token_stats(torch.zeros(1, 2, device="cuda"), torch.zeros(1, dtype=torch.long, device="cuda"))
    assert paths_run == ["forward_triton"]


def python(code: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], env=inherited, capture_output=True, text=True
    )


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_triton_on_a_cpu_tensor_raises(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="the tensor is on cpu: move it to a CUDA device"):
        token_stats(torch.zeros(2, 4), torch.tensor([0, 3]))


def test_without_triton_the_torch_path_works():
    done = python(WITHOUT_TRITON)
    assert done.stdout == "auto torch.Size([2])\ntorch torch.Size([2])\n", done.stderr
    assert "Triton is not installed" in done.stderr
