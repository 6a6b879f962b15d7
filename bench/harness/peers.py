"""Peers: other implementations of the same operation, and how each is set up."""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
import torch._functorch.config

from bench.harness.case import Absent

# Name for pip -> name for import.
PEERS = {
    "trl": "trl",
    "liger-kernel": "liger_kernel",
    "cut-cross-entropy": "cut_cross_entropy",
    "flash-attn": "flash_attn",
    "xformers": "xformers",
}

GENERATE = "image generation of transformers 5.17"


def absent() -> list[str]:
    """The peers that are not installed, or do not work in the installed version."""
    missing = [name for name, module in PEERS.items() if importlib.util.find_spec(module) is None]
    return missing + ([GENERATE] if generate_is_broken() else [])


def versions() -> dict[str, str]:
    """Versions of the installed peers."""
    return {name: importlib.metadata.version(name) for name in PEERS if name not in absent()}


def generate_is_broken() -> bool:
    """Whether this transformers' Janus omits an argument in a call of its own; fixed in 5.18."""
    installed = importlib.util.find_spec("transformers") is not None
    return installed and importlib.metadata.version("transformers").startswith("5.17.")


def load(module: str, device: torch.device, *, needs_gpu: bool = True) -> ModuleType:
    """Import a module of a peer.

    Raises:
        Absent: the peer is not installed, or does not run on this device. An installed peer whose
            import fails raises its own error, which is recorded in the row.
    """
    package = module.split(".")[0]
    if importlib.util.find_spec(package) is None:
        raise Absent(f"{package} is not installed")
    if needs_gpu and device.type != "cuda":
        raise Absent(f"{package} needs a GPU")
    return importlib.import_module(module)


def compiled(function: Callable, device: torch.device, *, repeats_backward: bool = False):
    """`function` through torch.compile at its best on this device, one whole graph per shape.

    `repeats_backward`: the backward pass of one forward pass is run several times.
    """
    torch._dynamo.config.recompile_limit = 64  # beyond the default limit, shapes run uncompiled
    if repeats_backward:
        torch._functorch.config.donated_buffer = False
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else "default"
    return torch.compile(function, mode=mode, dynamic=False, fullgraph=True)


def in_torch(
    function: Callable, *, repeats_backward: bool = False
) -> dict[str, Callable[[torch.device], Callable]]:
    """The two peers that plain torch offers: `function` as it is, and through torch.compile.

    Returns: peer name -> load(device) -> function.
    """
    return {
        "eager": lambda device: function,
        "torch.compile": partial(compiled, function, repeats_backward=repeats_backward),
    }
