"""Rewards -> advantages. A pure function."""

from typing import Literal

from torch import Tensor

EPSILON = 1e-4


def group_advantages(
    rewards_N: Tensor, num_generations: int, scale_rewards: Literal["group", "batch", "none"]
) -> Tensor:
    """A_i = (r_i - mean_group) / (std + 1e-4), with the unbiased std of the group or of the batch;
    `none`: not divided.

    `rewards_N` [N] float, prompt-major: each run of `num_generations` is one prompt's group.
    Returns [N]. A group whose rewards are equal gives exactly 0. Source: GRPO (arXiv 2402.03300)
    equation 3; `scale_rewards` as in TRL's GRPOConfig.
    """
    groups = rewards_N.view(-1, num_generations)
    centred = groups - groups.mean(dim=1, keepdim=True)
    # The mean of equal numbers can differ from them by rounding, which a tiny std would amplify.
    equal = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    centred = centred.masked_fill(equal, 0.0)
    if scale_rewards == "group":
        centred = centred / (groups.std(dim=1, keepdim=True) + EPSILON)
    elif scale_rewards == "batch":
        centred = centred / (rewards_N.std() + EPSILON)
    return centred.flatten()
