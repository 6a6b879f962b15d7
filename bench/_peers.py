"""Other libraries with the same operation: which are here, and their imports."""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from bench._case import Absent

# What `pip install` and `import` call them.
PEERS = {
    "trl": "trl",
    "liger-kernel": "liger_kernel",
    "cut-cross-entropy": "cut_cross_entropy",
    "flash-attn": "flash_attn",
    "xformers": "xformers",
}


def absent() -> list[str]:
    """The peers that are not installed."""
    return [name for name, module in PEERS.items() if importlib.util.find_spec(module) is None]


def versions() -> dict[str, str]:
    """The versions of those that are."""
    return {name: importlib.metadata.version(name) for name in PEERS if name not in absent()}


def load(module: str, device: torch.device, *, needs_gpu: bool = True) -> ModuleType:
    """A module of a peer; Absent where the peer is not installed or this device is not for it.

    An installed peer that fails to import raises what it raises: that is recorded as an error.
    """
    package = module.split(".")[0]
    if importlib.util.find_spec(package) is None:
        raise Absent(f"{package} is not installed")
    if needs_gpu and device.type != "cuda":
        raise Absent(f"{package} needs a GPU")
    return importlib.import_module(module)


def compiled(function: Callable, device: torch.device, **options: Any) -> Callable:
    """`function` by torch.compile at its best on this device, one graph a shape."""
    torch._dynamo.config.recompile_limit = 64  # or the later shapes would run uncompiled
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else "default"
    return torch.compile(function, mode=mode, dynamic=False, **options)
