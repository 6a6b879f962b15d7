"""Per-token values -> one number a sample."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Distribution = Literal["conditional", "guided"]
Reduction = Literal["sum", "mean"]


def reduce_tokens(values_NL: Tensor, mask_NL: Tensor, reduction: Reduction) -> Tensor:
    """Sum, or mean, of each row's values where the mask holds; 0 for a row without tokens. [N]."""
    total = values_NL.masked_fill(~mask_NL, 0.0).sum(dim=1)
    return total if reduction == "sum" else total / mask_NL.sum(dim=1).clamp(min=1)
