"""Control: a reward that knows nothing, uniform in [0, 1), its own number for every sample."""

from __future__ import annotations

from torch import Tensor

from iris_fast.records import Rollout
from iris_fast.rewards.reduction import Distribution, Reduction
from iris_fast.rollout.random_streams import uniforms


def reward(rollout: Rollout, distribution: Distribution, reduction: Reduction) -> Tensor:
    """[N], the same for a sample whatever batch or rank it is in."""
    return uniforms(rollout.seed, "random reward", rollout.sample_numbers, 1)[:, 0]
