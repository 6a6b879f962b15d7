"""What `bench.harness.fake_cuda` puts in place of a CUDA driver, of NCCL and of CUDA's autograd.

`stand_ins` lists the functions that are replaced. On a build of torch without CUDA, its C++
autograd also asks for a device guard and for streams that do not exist: see `autograd`.
"""

from __future__ import annotations

import contextlib
import ctypes
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers "fake"
from triton.backends.compiler import GPUTarget
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from iris_fast.preflight.estimate import H200

if TYPE_CHECKING:
    from bench.harness.fake_cuda import FakeCuda


class Graph:
    """`torch.cuda.CUDAGraph`."""

    gpu: FakeCuda

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def replay(self) -> None:
        self.gpu.replays += 1

    def pool(self) -> tuple[int, int]:
        return (0, 0)

    def reset(self) -> None:
        pass


def stand_ins(gpu: FakeCuda) -> Iterator[Any]:
    """Patches, as context managers: an H200's properties, graphs and streams that do nothing."""
    properties = types.SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, total_memory=int(H200.memory_bytes),
        multi_processor_count=132, L2_cache_size=60 * 2**20, warp_size=32,
        shared_memory_per_block_optin=232448, regs_per_multiprocessor=65536,
    )  # fmt: skip
    nothing: Callable[..., Any] = lambda *_, **__: None  # noqa: E731
    stream = mock.MagicMock(name="Stream")
    cuda = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": nothing,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": nothing,
        "get_device_properties": lambda *_: properties,
        "graph": gpu.capture,
        "CUDAGraph": type("CUDAGraph", (Graph,), {"gpu": gpu}),
        "graph_pool_handle": lambda: (0, 0),
        "is_current_stream_capturing": lambda: gpu.capturing,
        "Stream": stream,
        "Event": stream,
        "current_stream": lambda *_: stream,
        "stream": lambda *_: contextlib.nullcontext(),
        "device": lambda *_: contextlib.nullcontext(),
        "synchronize": gpu.wait,
        "empty_cache": nothing,
        "manual_seed_all": nothing,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": nothing,
        "memory_allocated": lambda *_: gpu.live_bytes,
        "max_memory_allocated": lambda *_: gpu.peak_bytes,
        "reset_peak_memory_stats": lambda *_: gpu.reset_peak(),
    }
    for name, value in cuda.items():
        yield mock.patch.object(torch.cuda, name, value)
    driver = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
    )
    yield mock.patch.object(triton.runtime.driver, "_active", driver)
    yield triton.knobs.runtime.scope()  # setting a knob also sets its environment variable
    yield mock.patch.object(triton.knobs.runtime, "interpret", False)
    for kernels in (JITFunction, InterpretedFunction):
        yield mock.patch.object(kernels, "run", _method(gpu.launch))
    yield mock.patch.object(torch.nn.Module, "_apply", apply)
    yield mock.patch.object(FakeTensor, "data", property(_data, _set_data), create=True)
    resize = torch.UntypedStorage.resize_
    yield mock.patch.object(torch.UntypedStorage, "resize_", gpu.resized(resize))
    yield mock.patch.object(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    yield mock.patch.object(torch, "compile", lambda function, **_: function)
    # Collectives of one process, without NCCL.
    start = torch.distributed.init_process_group
    yield mock.patch.object(
        torch.distributed, "init_process_group",
        lambda backend, **kwargs: start(backend.replace("nccl", "fake"), **kwargs),
    )  # fmt: skip
    # The fake tensors' own look for a device, which `is_available` would mislead.
    yield mock.patch.object(fake_tensor, "init_gpu_context", nothing)
    yield mock.patch.object(FakeTensorMode, "avoid_device_init", True)


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: function(self, *args, **kwargs)


def _data(tensor: Tensor) -> Tensor:
    return Tensor.data.__get__(tensor)


def _set_data(tensor: FakeTensor, value: FakeTensor) -> None:
    """`Tensor.data = ...`, which would keep the device of a fake tensor."""
    Tensor.data.__set__(tensor, value)
    tensor.fake_device = value.fake_device


def apply(module: torch.nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """`Module._apply`, which cannot exchange the content of two fake tensors: new parameters."""
    for child in module.children() if recurse else ():
        child._apply(fn)
    for parts in (module._parameters, module._buffers):
        for name, tensor in parts.items():
            if tensor is None:
                continue
            with torch.no_grad():
                applied = fn(tensor)
            if parts is module._parameters:
                applied = torch.nn.Parameter(applied, tensor.requires_grad)
            parts[name] = applied
    return module


# --- Autograd on a build without CUDA -------------------------------------------------------------

GUARDS = "_ZN3c104impl26device_guard_impl_registryE"  # c10::impl::device_guard_impl_registry
CUDA, LAZY = 1, 17  # c10::DeviceType


@contextlib.contextmanager
def autograd(gpu: FakeCuda) -> Iterator[None]:
    """Backward passes over fake CUDA tensors; nothing to do where torch has a CUDA device.

    A CUDA tensor in a graph needs a device guard. torch installs one that does nothing in place of
    a guard that counts no devices; such a guard, of the lazy backend, is put there first.

    The engine asks for streams of tensors that are on an accelerator. While it passes gradients
    from one node to the next, tensors report no device; inside a node they report their own.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (LAZY + 1)).in_dll(library, GUARDS)
    if guards[CUDA]:
        torch._C._ensureCUDADeviceGuardSet()
    else:
        guards[CUDA] = guards[LAZY]
        torch._C._ensureCUDADeviceGuardSet()
    if torch.backends.cuda.is_built():
        yield
        return
    run_backward = torch.autograd._engine_run_backward

    def tell(in_engine: bool) -> None:
        gpu.in_engine = in_engine

    def run(roots: Any, *args: Any, **kwargs: Any) -> Any:
        nodes, waiting = set(), [root.grad_fn for root in roots]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in nodes:
                nodes.add(node)
                waiting += [function for function, _ in node.next_functions]
        called: list[bool] = []

        def before(*_: Any) -> None:
            if not called:  # first of the callbacks at the end
                called.append(True)
                torch.autograd.Variable._execution_engine.queue_callback(lambda: tell(False))
            tell(False)

        hooks = [node.register_prehook(before) for node in nodes]
        hooks += [node.register_hook(lambda *_: tell(True)) for node in nodes]
        tell(True)
        try:
            with torch.autograd.set_multithreading_enabled(False):
                return run_backward(roots, *args, **kwargs)
        finally:
            tell(False)
            for hook in hooks:
                hook.remove()

    with mock.patch.object(torch.autograd, "_engine_run_backward", run):
        yield
