"""The tensors that both paths fill."""

from typing import NamedTuple

import torch
from torch import Tensor


class Recording(NamedTuple):
    """Where a step of a decoding loop is recorded: the column `step` [1] of L."""

    step: Tensor
    token_ids: Tensor  # [R, L]
    conditional: Tensor  # [4, R, L]
    guided: Tensor  # [4, R, L]


def empty_outputs(cond: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, and the four statistics of both distributions, for rows of `shape`."""
    return (
        cond.new_empty(shape, dtype=torch.int64),
        cond.new_empty((4, *shape), dtype=torch.float32),
        cond.new_empty((4, *shape), dtype=torch.float32),
    )
