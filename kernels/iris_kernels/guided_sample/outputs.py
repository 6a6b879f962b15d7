"""The tensors that both paths fill."""

import torch
from torch import Tensor


def empty_outputs(cond: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, and the four statistics of both distributions, for rows of `shape`."""
    return (
        cond.new_empty(shape, dtype=torch.int64),
        cond.new_empty((4, *shape), dtype=torch.float32),
        cond.new_empty((4, *shape), dtype=torch.float32),
    )
