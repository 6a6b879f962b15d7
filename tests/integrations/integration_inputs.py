"""Logits in the layouts that trainers produce, and the error budget against float64."""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "sliced", "transposed_batch")


def make_logits(layout: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """(3, 7, 501): 501 is not a multiple of any block size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (3 * torch.randn(shape, generator=generator)).to(dtype)

    if layout == "contiguous":
        return normal(3, 7, 501)
    if layout == "sliced":  # logits[:, :-1] of a causal model, with a padded vocabulary
        return normal(3, 8, 512)[:, :-1, :501]
    return normal(7, 3, 501).transpose(0, 1)


def assert_within(ours: Tensor, theirs: Tensor, oracle: Tensor) -> None:
    """error(ours) <= 1.5 error(theirs) + fp32 round-off, both against the float64 `oracle`."""
    error = (ours.double() - oracle).abs().max().item()
    budget = 1.5 * (theirs.double() - oracle).abs().max().item()
    assert error <= budget + 1e-5 * (1 + oracle.abs().max().item()), (error, budget)


def make_token_ids() -> Tensor:
    return torch.randint(0, 501, (3, 7), generator=torch.Generator().manual_seed(1))


def make_upstream(seed: int = 2) -> Tensor:
    """A random upstream gradient: neither ones nor of one sign."""
    return torch.randn(3, 7, generator=torch.Generator().manual_seed(seed))
