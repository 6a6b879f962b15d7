"""Numbers that stay run-time values: a new temperature or guidance weight compiles nothing."""

import torch
from torch import Tensor

from ._backend import jit, tl


def to_scalar_tensor(value: float | Tensor, like: Tensor) -> Tensor:
    """The 0-dim tensor that a custom op takes for `value`: torch.compile would bake in a float.

    In eager mode it is on the CPU, so that a kernel gets it by value. In a compiled graph, and
    where the user passed a tensor, it is on the device of `like`, and the kernel loads it.
    """
    if isinstance(value, Tensor):
        return value.detach()
    if torch.compiler.is_compiling():
        return like.new_ones((), dtype=torch.float32) * value
    return torch.tensor(value, dtype=torch.float64)


def to_kernel_argument(value: Tensor) -> float | Tensor:
    """What the launchers take: the number, or the tensor if reading it would wait for the GPU."""
    return float(value) if value.is_cpu else value


@jit
def load_scalar(value, IN_MEMORY: tl.constexpr):
    """The same inside a kernel, in fp32: `value` is a pointer if IN_MEMORY, else the number."""
    # Not an early return: Triton would compile what follows it, and cannot add to a pointer.
    return tl.load(value).to(tl.float32) if IN_MEMORY else tl.zeros([], tl.float32) + value
