"""Rewards: one file each, and `score`, which adds them up.

An intrinsic reward is a function `reward(rollout, distribution, reduction) -> [N]`; an external one
is any callable, see `iris_fast.rewards.external`.
"""

from iris_fast.rewards.score import (
    INTRINSIC,
    OF_IMAGES,
    check_rewards,
    load_metrics,
    load_rewards,
    measure,
    score,
)

__all__ = [
    "INTRINSIC",
    "OF_IMAGES",
    "check_rewards",
    "load_metrics",
    "load_rewards",
    "measure",
    "score",
]
