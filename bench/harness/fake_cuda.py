"""Fake CUDA tensors: the code for the GPU runs on a CPU, and no kernel computes anything.

    with fake_cuda() as gpu:
        ...  # torch.device("cuda") works; so do CUDA graphs, autograd and Triton launches
    gpu.launches, gpu.peak_bytes

CPU tensors are real. A tensor on the GPU is torch's FakeTensor: it has a shape, strides, a dtype
and a device, and no values. Operations that mix devices or dtypes fail as they would on a GPU. The
custom ops of iris_kernels run their launchers, and each Triton launch is recorded instead of made.
What is copied to the CPU is zero.

Recorded are kernel launches with the bytes of their arguments, copies between CPU and GPU, waits
for the GPU, and the memory that is allocated. Inside a capture a copy from the CPU or a wait is an
error, as on a GPU. Memory is counted per tensor, rounded up to 512 bytes, without fragmentation.

What needs a driver is replaced in `bench.harness.fake_driver`.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.harness.fake_driver import apply, autograd, stand_ins

aten = torch.ops.aten
ALLOCATION_BYTES = 512  # torch's allocator rounds up to this
# Their results alias their first argument, or are not written yet: no kernel runs.
NO_KERNEL = {
    aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default,
    aten.new_empty.default, aten.new_empty_strided.default, aten.detach.default,
    aten._unsafe_view.default, aten._reshape_alias.default, aten.lift_fresh.default,
    aten.set_.source_Storage_storage_offset, aten.is_same_size.default,
}  # fmt: skip
# Their floating point operands must have one dtype, which fake tensors do not check.
ONE_DTYPE = {
    aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm, aten.convolution, aten.index_copy_,
    aten.index_put_, aten.index_add_, aten.native_group_norm,
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One kernel: an ATen op that is not a view, or a Triton kernel.

    `tensors`: its tensor arguments and results, as (shape, dtype, storage), with the names that a
    Triton kernel gives them. `options`: what else the launcher passed by name, such as num_warps.
    """

    name: str
    tensors: dict[str, "Operand"]
    triton: bool = False
    grid: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Bytes of all operands, each part of memory once."""
        return sum({operand.start: operand.bytes for operand in self.tensors.values()}.values())


@dataclass(frozen=True)
class Operand:
    """Layout of a tensor argument. `start` identifies its first byte."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    start: tuple[int, int]

    @classmethod
    def of(cls, tensor: Tensor) -> "Operand":
        """A broadcast dimension is counted once."""
        shape, strides = tensor.shape, tensor.stride()
        count = 1
        for size, stride in zip(shape, strides, strict=True):
            count *= size if stride or not size else 1
        start = (tensor.untyped_storage()._cdata, tensor.storage_offset())
        return cls(tuple(shape), tensor.dtype, count * tensor.element_size(), start)


@contextlib.contextmanager
def fake_cuda(custom_ops: bool = True) -> Iterator["FakeCuda"]:
    """A process with one GPU, an H200, for the duration of the `with` block.

    `custom_ops`: run the code of iris_kernels' ops down to their launches; otherwise each is one
    launch, and the memory that it needs inside is not counted, which is faster.
    """
    gpu = FakeCuda(custom_ops)
    before = torch._C._only_lift_cpu_tensors()
    with contextlib.ExitStack() as stack:
        for patch in stand_ins(gpu):
            stack.enter_context(patch)
        stack.enter_context(autograd(gpu))
        # Or torch.tensor(..., device="cuda") would create the tensor there.
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        yield stack.enter_context(gpu)


class FakeCuda(TorchDispatchMode):
    """The device; see the module docstring.

    `launches`: kernels in order; those of a capture are in `captured`, and count as `launches` too.
    `copies`, `waits`: names of the operations that copied from the CPU, or waited for the GPU.
    `live_bytes`, `peak_bytes`: allocated now, and at most since `reset_peak`.
    """

    def __init__(self, custom_ops: bool = True) -> None:
        super().__init__()
        self._custom_ops = custom_ops
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.launches: list[Launch] = []
        self.captured: list[list[Launch]] = []
        self.replays = 0
        self.copies: list[str] = []
        self.waits: list[str] = []
        self.live_bytes = self.peak_bytes = 0
        self._sizes: dict[int, int] = {}
        self._agreed: set[tuple] = set()
        self.capturing = self._fake_host = self.in_engine = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(kind not in (Tensor, Parameter, FakeTensor) for kind in types):
            return NotImplemented  # a sharded or quantized tensor calls again with its parts
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        device = torch.device(kwargs["device"]).type if kwargs.get("device") else None
        real = not any(isinstance(t, FakeTensor) for t in tensors)
        if real and device != "cuda" and not self._fake_host:
            return func(*args, **kwargs)
        if func is torch.ops.prim.device.default:
            return torch.device("meta") if self.in_engine else args[0].device
        name = str(func)
        on_gpu = [t for t in tensors if t.is_cuda]
        from_cpu = any(t.is_cpu and t.dim() for t in tensors)
        if from_cpu and (on_gpu or device == "cuda") and func not in NO_KERNEL:
            self._not_captured("a copy from the CPU", name, self.copies)
        if func is aten._local_scalar_dense.default:
            self._not_captured("a wait for the GPU", name, self.waits)
            return torch.zeros((), dtype=args[0].dtype).item()
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            if not on_gpu:  # between tensors of the host, which may be as large as a model
                return args[0]
            self._not_captured("a wait for the GPU", name, self.waits)
            return args[0].zero_()
        if on_gpu and device == "cpu" and func not in NO_KERNEL:
            self._not_captured("a wait for the GPU", name, self.waits)
            with self._fake:
                layout = func(*args, **kwargs)
            return torch.zeros(layout.shape, dtype=layout.dtype)
        # With `out_dtype`, the sum and the output are of another dtype than the factors.
        factors = args[1:] if func is aten.addmm.dtype_out else tensors
        dtypes = {t.dtype for t in factors if isinstance(t, Tensor) and t.is_floating_point()}
        if func.overloadpacket in ONE_DTYPE and len(dtypes) > 1:
            raise RuntimeError(f"{name}: operands must have the same dtype, got {dtypes}")
        if func is aten._pin_memory.default:
            return args[0]
        if func.namespace == "iris_kernels" and self._custom_ops:
            return self._run_custom(func, args, kwargs)
        result = self._run(func, args, kwargs)
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        launched = any(t.is_cuda for t in outputs) or (func._schema.is_mutable and on_gpu)
        if func.is_view or func in NO_KERNEL:
            launched = False
        if launched:
            operands = {str(i): Operand.of(t) for i, t in enumerate([*tensors, *outputs])}
            self._record(Launch(name, operands))
        return result

    def _run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        with self._fake:
            result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, FakeTensor) and tensor.is_cuda:
                self._allocated(tensor)
        return result

    def _run_custom(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The op's own code. Once per op and layout of its result, its fake must agree."""
        with self, torch._C._AutoDispatchBelowAutograd():
            result = OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        layout = (func, *((t.shape, t.dtype, t.stride()) for t in tree_leaves(result)))
        if layout in self._agreed:
            return result
        self._agreed.add(layout)
        with self._fake:
            expected = func(*args, **kwargs)
        for one, other in zip(tree_leaves(result), tree_leaves(expected), strict=True):
            same = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
            assert same and one.stride() == other.stride(), (func, one, other)
        return result

    def _record(self, launch: Launch) -> None:
        self.launches.append(launch)
        if self.capturing:
            self.captured[-1].append(launch)

    def _not_captured(self, what: str, name: str, seen: list[str]) -> None:
        """Count a copy or wait; RuntimeError while a graph is captured."""
        if self.capturing:
            raise RuntimeError(f"{what} by {name} is not permitted when stream is capturing")
        seen.append(name)

    @contextlib.contextmanager
    def fake_host(self) -> Iterator[None]:
        """CPU tensors that are created here have no values either: models of true size."""
        before, self._fake_host = self._fake_host, True
        try:
            yield
        finally:
            self._fake_host = before

    def without_values(self, module: torch.nn.Module) -> torch.nn.Module:
        """`module`, opened on the CPU, with parameters and buffers that have no values."""
        convert = self._fake.from_tensor
        return apply(module, lambda t: t if isinstance(t, FakeTensor) else convert(t.detach()))

    # --- Memory -----------------------------------------------------------------------------------

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak_bytes = self.live_bytes

    def _allocated(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0
            weakref.finalize(storage, self._resize, key, None)
        if storage.nbytes() != self._sizes[key]:
            self._resize(key, storage.nbytes())

    def _resize(self, key: int, size: int | None) -> None:
        rounded = -(-(size or 0) // ALLOCATION_BYTES) * ALLOCATION_BYTES
        self.live_bytes += rounded - self._sizes.get(key, 0)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        if size is None:
            self._sizes.pop(key, None)
        else:
            self._sizes[key] = rounded

    def resized(self, resize: Callable[..., Any]) -> Callable[..., Any]:
        """`UntypedStorage.resize_`, with which FSDP frees gathered weights."""

        def resize_and_count(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            resize(storage, size)
            if storage._cdata in self._sizes:
                self._resize(storage._cdata, size)
            return storage

        return resize_and_count

    # --- Stand-ins for what needs a driver --------------------------------------------------------

    @contextlib.contextmanager
    def capture(self, *_: Any, **__: Any) -> Iterator[None]:
        """`torch.cuda.graph`."""
        assert not self.capturing, "captures are not nested"
        self.capturing = True
        self.captured.append([])
        try:
            yield
        finally:
            self.capturing = False

    def wait(self, *_: Any) -> None:
        """`torch.cuda.synchronize`."""
        self._not_captured("a wait for the GPU", "synchronize", self.waits)

    def launch(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        """`kernel[grid](*args, **kwargs)` of a Triton kernel."""
        named = dict(zip(kernel.arg_names, args, strict=False))
        operands = {}
        for name, value in (named | kwargs).items():
            if isinstance(value, Tensor):
                assert value.is_cuda, f"{kernel.__name__}: {name} is on {value.device}"
                operands[name] = Operand.of(value)
        if callable(grid):
            grid = grid(named | kwargs)
        options = {k: v for k, v in kwargs.items() if not isinstance(v, Tensor)}
        self._record(Launch(kernel.__name__, operands, True, tuple(grid), options))
