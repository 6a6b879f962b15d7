"""Which implementation runs: Triton, C++ or torch. There is no silent fallback."""

import ctypes
import mmap
import os
import types

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import cpp

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # no Triton wheel for this platform: the torch path still works
    triton = None
    tl = types.SimpleNamespace(constexpr=None)

VARIABLE = "IRIS_KERNELS_BACKEND"


def jit(function):
    """`triton.jit` if Triton is installed, else the plain function, which is never called."""
    return function if triton is None else triton.jit(function)


def constant(value):
    """A module-level number that kernels can read."""
    return value if triton is None else tl.constexpr(value)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which needs no GPU."""
    return triton is not None and triton.knobs.runtime.interpret


def uses_triton(tensor: Tensor) -> bool:
    """Whether the ops run their Triton path on `tensor`, as `IRIS_KERNELS_BACKEND` chooses.

    `auto` (the default) is Triton for CUDA tensors other than float64, which only the torch path
    supports. For other tensors, and with `cpp`, an op takes its C++ path where it has one for the
    dtype, else its torch path.

    Raises:
        ValueError: the variable is not triton, cpp, torch or auto, or it is triton and the tensor
            is float64.
        RuntimeError: the variable is triton, and Triton cannot run here.
    """
    return _chooses_triton(tensor, os.environ.get(VARIABLE, "auto"))


def _chooses_triton(tensor: Tensor, choice: str) -> bool:
    if choice in ("torch", "cpp"):
        return False
    if choice == "auto":
        return tensor.is_cuda and triton is not None and tensor.dtype != torch.float64
    if choice != "triton":
        raise ValueError(f"{VARIABLE}={choice!r} is unknown: set it to triton, cpp, torch or auto")
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


def backend(tensor: Tensor, dtypes: tuple[torch.dtype, ...] = cpp.DTYPES) -> str:
    """Which path runs on `tensor`: "triton", "cpp" (a CPU and one of `dtypes`) or "torch".

    Raises:
        RuntimeError: IRIS_KERNELS_BACKEND is cpp, and the library has not been compiled.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if _chooses_triton(tensor, choice):
        return "triton"
    if choice != "torch" and tensor.dtype in dtypes and cpp.takes(tensor):
        return "cpp"
    if choice == "cpp" and cpp.library() is None:
        raise RuntimeError(
            f"{VARIABLE}=cpp, but the C++ kernels are not compiled: install a C++ compiler and run "
            "pip install again"
        )
    return "torch"


def direct_backend(
    tensor: Tensor, *others: Tensor | None, with_gradient: bool = False
) -> str | None:
    """Which path an op calls as a plain function, "cpp" or "torch"; None for its custom op.

    Plain functions run in eager mode on a CPU, where the dispatch of a custom op costs 8 to 300 us
    per call. A graph (torch.compile, make_fx, torch.jit.trace, fake tensors), a torch.func
    transform, forward-mode gradients, tensor subclasses, the Triton path and, unless
    `with_gradient`, arguments of which one needs a gradient take the custom op.
    """
    if (
        not tensor.is_cpu
        or torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or is_in_torch_dispatch_mode()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or not _PLAIN.issuperset(map(type, (tensor, *others)))
        or (not with_gradient and needs_gradient(tensor, *others))
    ):
        return None
    path = backend(tensor)
    return None if path == "triton" else path


def calls_directly(tensor: Tensor, *others: Tensor | None, with_gradient: bool = False) -> bool:
    """Whether there is a `direct_backend`."""
    return direct_backend(tensor, *others, with_gradient=with_gradient) is not None


_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None)})


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records an operation on these tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


# glibc allocates anything larger by mmap, so that no other data shares its pages.
MMAP_BYTES = 32 << 20


def prefer_huge_pages(tensor: Tensor) -> Tensor:
    """Advise Linux to back a large new CPU tensor by 2 MB pages, and return it.

    Page faults take most of the time of writing a new gradient: 18000 of them for 75 MB of 4 KB
    pages. This is only a hint; on other systems and for small tensors nothing happens.
    """
    if tensor.is_cpu and tensor.nbytes > MMAP_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE
        )
    return tensor
