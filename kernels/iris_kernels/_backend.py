"""Which implementation runs: Triton or torch. Nothing here falls back in silence."""

import ctypes
import mmap
import os
import types

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # no Triton wheel for this platform: the torch path still works
    triton = None
    tl = types.SimpleNamespace(constexpr=None)

VARIABLE = "IRIS_KERNELS_BACKEND"


def jit(function):
    """`triton.jit` where Triton is installed; else the plain function, which nothing calls."""
    return function if triton is None else triton.jit(function)


def constant(value):
    """A module-level number that kernels may read."""
    return value if triton is None else tl.constexpr(value)


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, which needs no GPU."""
    return triton is not None and triton.knobs.runtime.interpret


def use_triton(tensor: Tensor) -> bool:
    """Whether the Triton path computes on `tensor`, as `IRIS_KERNELS_BACKEND` asks.

    `auto` (the default) is Triton for CUDA tensors, except float64, which only the torch path
    computes; torch for all others.

    Raises:
        ValueError: the variable holds an unknown name, or asks for Triton on a float64 tensor.
        RuntimeError: Triton was asked for and cannot run here.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice == "torch":
        return False
    if choice == "auto":
        return tensor.is_cuda and triton is not None and tensor.dtype != torch.float64
    if choice != "triton":
        raise ValueError(f"{VARIABLE}={choice!r} is unknown: set it to triton, torch or auto")
    if tensor.dtype == torch.float64:
        raise ValueError(
            f"{VARIABLE}=triton, but the tensor is float64: pass float32, bfloat16 or float16, "
            f"or set {VARIABLE}=torch"
        )
    if triton is None:
        raise RuntimeError(f"{VARIABLE}=triton, but Triton is not installed: pip install triton")
    if not (tensor.is_cuda or interpreted()):
        raise RuntimeError(
            f"{VARIABLE}=triton, but the tensor is on {tensor.device}: move it to a CUDA device, "
            "or set TRITON_INTERPRET=1 before triton is imported to run the interpreter"
        )
    return True


# glibc gives every larger tensor a mapping of its own, so that no other data shares its pages.
OWN_MAPPING_BYTES = 32 << 20


def prefer_huge_pages(tensor: Tensor) -> Tensor:
    """Ask Linux to back a large new CPU tensor by 2 MB pages, and return it.

    Page faults are most of the time that writing a new gradient takes: with 4 KB pages, 18000 of
    them for 75 MB. Only a hint; elsewhere and on small tensors nothing happens.
    """
    if tensor.is_cpu and tensor.nbytes > OWN_MAPPING_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE
        )
    return tensor
