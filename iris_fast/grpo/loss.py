"""Log-probs and advantages -> the GRPO loss. Pure functions.

M tokens of N samples, text and image tokens alike, in any order; `sample_M` is the sample of each.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo"]


@dataclass(frozen=True)
class Loss:
    """The scalar to differentiate, and per-token values (detached) to log."""

    value: Tensor
    kl_M: Tensor  # k3 estimate of KL(policy || reference); 0 without a reference
    ratio_M: Tensor
    clipped_M: Tensor  # bool: the clipped term was the minimum, so the policy gradient is 0


def token_weights(
    loss_type: LossType,
    sample_M: Tensor,
    num_samples: int,
    *,
    max_completion_length: int,
    tokens_per_rank: float,
    accumulation: int,
) -> Tensor:
    """Weights w_M with loss = sum(w_M * token loss), so that a sum over the micro-batches and a
    mean over the ranks give what TRL's GRPOConfig.loss_type describes:

        grpo     mean over samples of each sample's mean over its tokens
        bnpo     mean over the micro-batch's tokens (depends on how the batch is split)
        dr_grpo  sum over tokens / (samples * max_completion_length)
        dapo     mean over all tokens of the optimizer step, on every rank

    `tokens_per_rank`: all tokens of the step / ranks (dapo). `accumulation`: micro-batches per
    step.
    """
    if loss_type == "dapo":
        return torch.full_like(sample_M, 1.0 / max(tokens_per_rank, 1.0), dtype=torch.float32)
    if loss_type == "bnpo":
        scale = torch.full_like(sample_M, 1.0 / max(len(sample_M), 1), dtype=torch.float32)
    elif loss_type == "dr_grpo":
        share = 1.0 / (num_samples * max_completion_length)
        scale = torch.full_like(sample_M, share, dtype=torch.float32)
    else:
        lengths = torch.bincount(sample_M, minlength=num_samples).float()
        scale = 1.0 / (lengths[sample_M] * num_samples)
    return scale / accumulation


def truncated_importance(old_logprob_M: Tensor, sampler_logprob_M: Tensor, cap: float) -> Tensor:
    """c = min(exp(old - sampler), cap): the trainer's probability of a token over the sampler's,
    which makes the expectation the trainer's, up to the cap. Without gradient.

    Both log-probs belong to the same distribution but are computed by two programs, so they differ
    with the precision and the kernels. Source: truncated importance sampling (Ionides 2008), per
    token as in TRL's vLLM correction.
    """
    return (old_logprob_M - sampler_logprob_M).exp().clamp(max=cap).detach()


def grpo_loss(
    logprob_M: Tensor,
    old_logprob_M: Tensor,
    reference_logprob_M: Tensor | None,
    advantage_M: Tensor,
    weight_M: Tensor,
    correction_M: Tensor | None = None,
    *,
    beta: float,
    epsilon: float,
    epsilon_high: float,
) -> Loss:
    """sum_m w_m * -(c min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) - beta k3), where

        rho = exp(logprob - old_logprob)
        k3  = exp(ref - logprob) - (ref - logprob) - 1  >= 0
        c   = `correction_M`, see `truncated_importance`; 1 if None

    All inputs are float32 [M]; the gradient flows through `logprob_M` only.
    Source: GRPO (arXiv 2402.03300) equations 3 and 4, per token as in TRL.
    """
    ratio = torch.exp(logprob_M - old_logprob_M)
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    unclipped_gain, clipped_gain = ratio * advantage_M, clipped * advantage_M
    loss_M = -torch.minimum(unclipped_gain, clipped_gain)
    if correction_M is not None:
        loss_M = loss_M * correction_M
    kl_M = k3(logprob_M, reference_logprob_M)
    return Loss(
        value=(weight_M * (loss_M + beta * kl_M)).sum(),
        kl_M=kl_M.detach(),
        ratio_M=ratio.detach(),
        clipped_M=(clipped_gain < unclipped_gain).detach(),
    )


def direct_loss(
    gain_M: Tensor,
    logprob_M: Tensor,
    reference_logprob_M: Tensor | None,
    weight_M: Tensor,
    *,
    beta: float,
) -> Loss:
    """sum_m w_m * -(gain_m - beta k3): `gain_M` is the reward of each token, with its gradient.

    The sampled tokens are treated as constants: the effect of earlier tokens on the reward of later
    ones, which the policy gradient accounts for, is ignored. Inputs as in `grpo_loss`.
    """
    kl_M = k3(logprob_M, reference_logprob_M)
    return Loss(
        value=(weight_M * (beta * kl_M - gain_M)).sum(),
        kl_M=kl_M.detach(),
        ratio_M=torch.ones_like(gain_M),
        clipped_M=torch.zeros_like(gain_M, dtype=torch.bool),
    )


def k3(logprob_M: Tensor, reference_logprob_M: Tensor | None) -> Tensor:
    """exp(ref - lp) - (ref - lp) - 1 >= 0, an estimate of KL(policy || reference) from tokens
    sampled from the policy (Schulman's k3), [M]; 0 without a reference."""
    if reference_logprob_M is None:
        return torch.zeros_like(logprob_M)
    gap = reference_logprob_M - logprob_M
    return torch.exp(gap) - gap - 1
