"""Rewards: one file each, and `score`, which adds them up.

An intrinsic reward is a function `reward(rollout, distribution, reduction) -> [N]`; an external one
is any callable, see `iris_fast.rewards.external`.
"""

from iris_fast.rewards.score import INTRINSIC, check_rewards, load_rewards, score

__all__ = ["INTRINSIC", "check_rewards", "load_rewards", "score"]
