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

GENERATE = "image generation of transformers 5.17"


def absent() -> list[str]:
    """The peers that are not installed, or do not work as they are."""
    missing = [name for name, module in PEERS.items() if importlib.util.find_spec(module) is None]
    return missing + ([GENERATE] if generate_is_broken() else [])


def versions() -> dict[str, str]:
    """The versions of those that are there."""
    return {name: importlib.metadata.version(name) for name in PEERS if name not in absent()}


def generate_is_broken() -> bool:
    """Whether this is a transformers whose Janus calls a function of the library without one of its
    arguments; it is mended in 5.18."""
    installed = importlib.util.find_spec("transformers") is not None
    return installed and importlib.metadata.version("transformers").startswith("5.17.")


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
