"""NSC of the image tokens, -KL(U || p): the reward of IRIS (arXiv 2509.25562)."""

from __future__ import annotations

from torch import Tensor

from iris_fast.records import Rollout
from iris_fast.rewards.reduction import Distribution, Reduction, reduce_tokens


def reward(rollout: Rollout, distribution: Distribution, reduction: Reduction) -> Tensor:
    """Reduced over the image tokens of each sample; [N] float32."""
    trace = rollout.image
    return reduce_tokens(getattr(trace, distribution).nsc, trace.mask, reduction)
