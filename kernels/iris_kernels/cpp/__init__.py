"""The ops on a CPU, in C++: one pass over a row, one parallel region per call.

The libraries are compiled when the package is installed, and called through ctypes. They take
float32 and bfloat16; other dtypes, and installations without a C++ compiler, take the torch path.

Arguments are plain numbers and addresses: the ops have checked shapes, strides and dtypes.
"""

import ctypes
import functools
import warnings
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from .build import instruction_sets, source_hash

POINTER, LONG, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
ROWS = POINTER, LONG, LONG, LONG  # address, inner size, outer and inner stride

DTYPES = (torch.float32, torch.bfloat16)
# Below this many elements a parallel region costs more than it saves.
SERIAL_ELEMENTS = 1 << 14


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library for this CPU, or None if there is none; a warning if it is out of date."""
    name = torch.backends.cpu.get_cpu_capability().lower()
    if "base" in instruction_sets():
        name = "base"
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).parent / f"_{name}{suffix}"
        if path.exists():
            return _load(path)
    return None


def _load(path: Path) -> ctypes.CDLL | None:
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:  # compiled on another system, or cut off
        return _warn(f"{path} cannot be loaded ({error})")
    loaded.iris_sources.restype = ctypes.c_char_p
    if loaded.iris_sources().decode() != source_hash():
        return _warn(f"{path} was compiled from other sources")
    return loaded


def _warn(reason: str) -> None:
    warnings.warn(
        f"{reason}, and CPU ops take their slower torch path: run pip install again", stacklevel=3
    )


def function(name: str, result: type | None, *arguments: type) -> Callable[[], Callable]:
    """Declare a C function; the result returns that of the present library."""

    @functools.cache
    def bind(loaded: ctypes.CDLL) -> Callable:
        found = getattr(loaded, name)
        found.restype, found.argtypes = result, arguments
        return found

    return lambda: bind(library())


def takes(tensor: Tensor) -> bool:
    """Whether there is a library for tensors of this device and dtype."""
    return tensor.is_cpu and tensor.dtype in DTYPES and library() is not None


def threads(elements: int) -> int:
    """How many threads a call with this much work uses."""
    return 1 if elements < SERIAL_ELEMENTS else torch.get_num_threads()


def address(tensor: Tensor | None) -> int | None:
    """Where the first element is."""
    return None if tensor is None else tensor.data_ptr()
