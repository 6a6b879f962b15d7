"""Entropy of the image tokens' distributions: log V - KL(p || U), the backward-KL ablation."""

from __future__ import annotations

from torch import Tensor

from iris_fast.records import Rollout
from iris_fast.rewards.reduction import Distribution, Reduction, reduce_tokens


def reward(rollout: Rollout, distribution: Distribution, reduction: Reduction) -> Tensor:
    """Reduced over the image tokens of each sample; [N] float32."""
    trace = rollout.image
    return reduce_tokens(getattr(trace, distribution).entropy, trace.mask, reduction)
