"""Scored rollout -> micro-batches: what each forward and backward pass of a step reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from iris_kernels import TokenStats
from torch import Tensor

from iris_fast.config import TrainConfig
from iris_fast.distributed import Ranks
from iris_fast.grpo.loss import token_weights
from iris_fast.grpo.packing import pack
from iris_fast.records import CONDITIONAL, Guidance, PackedBatch, Rollout, Scored

# A model: statistics of a packed batch's text and image targets.
Forward = Callable[[PackedBatch], tuple[TokenStats, TokenStats]]


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass reads, for the tokens M of the legend in `records`."""

    rollout: Rollout
    sample_M: Tensor  # index in the rollout of the sample that a token belongs to; on the CPU
    packed: PackedBatch
    advantage_M: Tensor
    weight_M: Tensor
    rollout_logprob_M: Tensor  # the sampler's: for the logged mismatch, and for tis
    reference_logprob_M: Tensor | None
    old_logprob_M: Tensor | None  # None: the policy's own, as in the first pass over a rollout

    def split(self, pieces: int) -> list[MicroBatch]:
        """Split the samples into up to `pieces` micro-batches.

        The sum of their gradients is the same: token weights are those of the whole micro-batch.
        """
        if pieces == 1:
            return [self]
        samples = torch.arange(len(self.rollout.prompts))
        return [self._take(part) for part in samples.chunk(pieces)]

    def _take(self, samples: Tensor) -> MicroBatch:
        device = self.advantage_M.device
        rollout = self.rollout.take(samples.tolist())
        packed, sample_M = pack(rollout, self.packed.guidance)
        kept_M = torch.isin(self.sample_M, samples).to(device)
        reference_M, old_M = self.reference_logprob_M, self.old_logprob_M
        return MicroBatch(
            rollout=rollout,
            sample_M=sample_M,
            packed=packed.to(device),
            advantage_M=self.advantage_M[kept_M],
            weight_M=self.weight_M[kept_M],
            rollout_logprob_M=self.rollout_logprob_M[kept_M],
            reference_logprob_M=None if reference_M is None else reference_M[kept_M],
            old_logprob_M=None if old_M is None else old_M[kept_M],
        )


def prepare(
    scored: Scored,
    policy: Forward,
    reference: Forward | None,
    config: TrainConfig,
    ranks: Ranks,
    old_logprobs: list[Tensor] | None = None,
) -> list[MicroBatch]:
    """Split a scored rollout into `gradient_accumulation_steps` micro-batches.

    Reference and old log-probs are computed here, once per rollout. `old_logprobs`, one tensor per
    micro-batch, are passed when a run resumes between two passes over the same rollout; otherwise
    they are the current policy's, and needed only for num_iterations > 1.
    """
    rollout, device = scored.rollout, ranks.device
    samples = len(rollout.prompts)
    per_batch = samples // config.gradient_accumulation_steps
    tokens = int(rollout.text.mask.sum() + rollout.image.mask.sum())
    tokens_per_rank = ranks.total(tokens) / ranks.world_size
    guidance = CONDITIONAL
    if config.policy_distribution == "guided":
        guidance = Guidance(config.cfg_weight, config.temperature)
    longest_cot = config.max_completion_length if config.cot else 0
    batches = []
    for number, start in enumerate(range(0, samples, per_batch)):
        chosen = list(range(start, start + per_batch))
        part = rollout.take(chosen)
        packed, sample_M = pack(part, guidance)
        packed = packed.to(device)
        weight_M = token_weights(
            config.loss_type,
            sample_M,
            per_batch,
            max_completion_length=longest_cot + part.codes_NI.shape[1],
            tokens_per_rank=tokens_per_rank,
            accumulation=config.gradient_accumulation_steps,
        )
        old_M = None
        if old_logprobs is not None:
            old_M = old_logprobs[number].to(device)
        elif config.num_iterations > 1:
            old_M = log_probs(policy, packed)
        batches.append(
            MicroBatch(
                rollout=part,
                sample_M=sample_M,
                packed=packed,
                advantage_M=scored.advantage_N[chosen][sample_M].to(device),
                weight_M=weight_M.to(device),
                rollout_logprob_M=sampler_log_probs(part, config.policy_distribution).to(device),
                reference_logprob_M=log_probs(reference, packed) if reference else None,
                old_logprob_M=old_M,
            )
        )
    return batches


def sampler_log_probs(rollout: Rollout, distribution: str) -> Tensor:
    """Log-probs [M] of the sampled tokens as the sampler computed them."""
    parts = []
    for trace in (rollout.text, rollout.image):
        stats = trace.guided if distribution == "guided" else trace.conditional
        parts.append(stats.logprob[trace.mask])
    return torch.cat(parts)


@torch.no_grad()
def log_probs(model: Forward, packed: PackedBatch) -> Tensor:
    """Log-probs [M] of the targets of a packed batch, without a graph."""
    text, image = model(packed)
    return torch.cat([text.logprob, image.logprob])
