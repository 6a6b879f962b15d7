"""Entropy of the chain of thought's distributions: log V - KL(p || U), the backward-KL ablation."""

from __future__ import annotations

from torch import Tensor

from iris_fast.records import Rollout
from iris_fast.rewards.reduction import Distribution, Reduction, reduce_tokens


def reward(rollout: Rollout, distribution: Distribution, reduction: Reduction) -> Tensor:
    """Reduced over the text tokens of each sample; [N] float32."""
    trace = rollout.text
    return reduce_tokens(getattr(trace, distribution).entropy, trace.mask, reduction)
