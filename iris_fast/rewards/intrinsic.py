"""Rewards that need no labels and no reward model: statistics of the sampled tokens, and controls.

With U uniform over the V classes and p the distribution of a token:

    nsc      -KL(U || p) = log V - logsumexp(x) + mean(x), the reward of IRIS (arXiv 2509.25562)
    entropy  log V - KL(p || U), the ablation with the backward KL divergence
"""

from typing import Literal

import torch
from iris_kernels import TokenStats
from torch import Tensor

from iris_fast.records import Rollout
from iris_fast.rewards.table import REWARDS
from iris_fast.rollout.random_streams import uniforms

Distribution = Literal["conditional", "guided"]
Reduction = Literal["sum", "mean"]


def intrinsic_reward(
    name: str, rollout: Rollout, distribution: Distribution, reduction: Reduction
) -> Tensor:
    """One reward of the table per sample, [N] float32.

    A statistic is reduced over the sample's tokens. `constant` is 1, so every advantage is 0 and
    only the KL term acts; `random` is uniform in [0, 1), the same for a sample on any rank.
    """
    if name == "constant":
        return torch.ones(len(rollout.prompts))
    if name == "random":
        return uniforms(rollout.seed, "random reward", rollout.sample_numbers, 1)[:, 0]
    trace = rollout.image if REWARDS[name].kind == "image" else rollout.text
    stats = trace.conditional if distribution == "conditional" else trace.guided
    return reduce_tokens(getattr(stats, REWARDS[name].statistic), trace.mask, reduction)


def reduce_tokens(values_NL: Tensor, mask_NL: Tensor, reduction: Reduction) -> Tensor:
    """Sum or mean of each row's values inside the mask, [N]; 0 for a row without tokens."""
    total = values_NL.masked_fill(~mask_NL, 0.0).sum(dim=1)
    return total if reduction == "sum" else total / mask_NL.sum(dim=1).clamp(min=1)


def token_rewards(weights: dict[str, float], text: TokenStats, image: TokenStats) -> Tensor:
    """The weighted sum of differentiable rewards per token, [M], text tokens first, with gradient.

    `weights`: reward name -> weight. For `--objective direct`.
    """
    totals = {"text": torch.zeros_like(text.logprob), "image": torch.zeros_like(image.logprob)}
    stats = {"text": text, "image": image}
    for name, weight in weights.items():
        reward = REWARDS[name]
        value = getattr(stats[reward.kind], reward.statistic)
        totals[reward.kind] = totals[reward.kind] + weight * value
    return torch.cat([totals["text"], totals["image"]])
