"""Blocks of columns: a row's sums may be computed from one block after the other."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .._row_stats import MIN_D, RowSums


@dataclass(frozen=True)
class Columns:
    """Which columns of the whole rows the logits hold, and what to add to them."""

    count: int  # columns that exist; those after them are padding
    first: int = 0
    total: int = 0  # columns of the whole row; 0: `count`
    bias: Tensor | None = None  # [count]
    state: Tensor | None = None  # [5, R], the RowSums so far; None: the rows are whole
    is_first: bool = True  # `state` holds nothing yet
    is_last: bool = True  # compute the statistics; else update `state`

    @property
    def row_width(self) -> int:
        """The number of columns of the whole row."""
        return self.total or self.count


def merge(a: RowSums, columns_a: int, b: RowSums, columns_b: int, temperature) -> RowSums:
    """The sums of both blocks together, relative to the larger maximum."""
    maximum = torch.maximum(a.maximum, b.maximum)
    m_safe = maximum.masked_fill(maximum == -torch.inf, 0.0)
    rescaled = []
    for sums, columns in ((a, columns_a), (b, columns_b)):
        shift = (sums.maximum - m_safe) / temperature
        shift = shift.masked_fill_(sums.maximum == -torch.inf, 0.0).clamp_(min=MIN_D)
        factor = shift.exp()
        sum_exp_d = (sums.sum_exp_d + shift * sums.sum_exp_others) * factor
        rescaled.append((sums.sum_exp_others * factor, sum_exp_d, sums.sum_d + shift * columns))
    sum_exp_others, sum_exp_d, sum_d = (x + y for x, y in zip(*rescaled, strict=True))
    x_token = torch.where(a.x_token.isnan(), b.x_token, a.x_token)
    return RowSums(sum_exp_others, sum_exp_d, sum_d, maximum, x_token)
