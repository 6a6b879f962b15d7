"""NSC of the chain of thought, -KL(U || p): the reward of IRIS (arXiv 2509.25562)."""

from __future__ import annotations

from torch import Tensor

from iris_fast.records import Rollout
from iris_fast.rewards.reduction import Distribution, Reduction, reduce_tokens


def reward(rollout: Rollout, distribution: Distribution, reduction: Reduction) -> Tensor:
    """Reduced over the text tokens of each sample; [N] float32."""
    trace = rollout.text
    return reduce_tokens(getattr(trace, distribution).nsc, trace.mask, reduction)
