"""Scored rollouts -> optimizer steps: micro-batches, log-probs, the loss, one update."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iris_fast.batch import PackedBatch, Scored
from iris_fast.config import TrainConfig
from iris_fast.distributed import Ranks, full
from iris_fast.errors import UserError
from iris_fast.loss import Loss, grpo_loss, token_weights, truncated_importance
from iris_fast.packing import pack


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass needs; M counts text rows first, then image rows."""

    packed: PackedBatch
    advantage_M: Tensor
    weight_M: Tensor
    rollout_logprob_M: Tensor  # the sampler's: for the mismatch that is logged, and tis
    reference_logprob_M: Tensor | None
    old_logprob_M: Tensor | None  # None: the policy's own, as on the first pass over a rollout


def prepare(
    scored: Scored,
    policy: nn.Module,
    reference: nn.Module | None,
    config: TrainConfig,
    ranks: Ranks,
    old_logprobs: list[Tensor] | None = None,
) -> list[MicroBatch]:
    """Cut a scored rollout into its micro-batches, with reference and old log-probs computed once.

    `old_logprobs`, one tensor a micro-batch, are given when a run goes on between two passes over
    the same rollout; otherwise they are the policy's now, and only needed for num_iterations > 1.
    """
    rollout, device = scored.rollout, ranks.device
    samples = len(rollout.prompts)
    per_batch = samples // config.gradient_accumulation_steps
    tokens = int(rollout.text.mask.sum() + rollout.image.mask.sum())
    tokens_per_rank = ranks.total(tokens) / ranks.world_size
    batches = []
    for start in range(0, samples, per_batch):
        chosen = list(range(start, start + per_batch))
        part = rollout.take(chosen)
        packed, sample_M = pack(part)
        weight_M = token_weights(
            config.loss_type,
            sample_M,
            per_batch,
            max_completion_length=config.max_completion_length * config.cot
            + part.codes_NI.shape[1],
            tokens_per_rank=tokens_per_rank,
            accumulation=config.gradient_accumulation_steps,
        )
        drawn = [part.text, part.image]
        rollout_M = torch.cat([trace.conditional.logprob[trace.mask] for trace in drawn])
        packed = packed.to(device)
        old_M = None
        if old_logprobs is not None:
            old_M = old_logprobs[len(batches)].to(device)
        elif config.num_iterations > 1:
            old_M = log_probs(policy, packed)
        batches.append(
            MicroBatch(
                packed=packed,
                advantage_M=scored.advantage_N[chosen][sample_M].to(device),
                weight_M=weight_M.to(device),
                rollout_logprob_M=rollout_M.to(device),
                reference_logprob_M=log_probs(reference, packed) if reference else None,
                old_logprob_M=old_M,
            )
        )
    return batches


@torch.no_grad()
def log_probs(model: nn.Module, packed: PackedBatch) -> Tensor:
    """Log-probs [M] of a packed batch's targets, without a graph."""
    text, image = model(packed)
    return torch.cat([text.logprob, image.logprob])


def update(
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[MicroBatch],
    config: TrainConfig,
    ranks: Ranks,
    pause: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """One optimizer step over all micro-batches; the step's loss metrics, over all ranks.

    Every micro-batch's gradients are summed over the ranks at once: they are kept sharded, where
    those of a step that waits for its last one would be held whole. `pause` is called before each,
    and may raise.

    UserError, before any weight changes, if the gradient is not finite.
    """
    sums: dict[str, float] = {}
    for batch in batches:
        pause()
        text, image = policy(batch.packed)
        logprob_M = torch.cat([text.logprob, image.logprob])
        old_M = logprob_M.detach() if batch.old_logprob_M is None else batch.old_logprob_M
        correction_M = None
        if config.rollout_correction == "tis":
            cap = config.rollout_correction_cap
            correction_M = truncated_importance(old_M, batch.rollout_logprob_M, cap)
        loss = grpo_loss(
            logprob_M,
            old_M,
            batch.reference_logprob_M,
            batch.advantage_M,
            batch.weight_M,
            correction_M,
            beta=config.beta,
            epsilon=config.epsilon,
            epsilon_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
        )
        loss.value.backward()
        _add(sums, loss, logprob_M.detach(), batch)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    limit = config.max_grad_norm or float("inf")
    grad_norm = full(nn.utils.clip_grad_norm_(trained, limit)).item()
    if not math.isfinite(grad_norm):
        raise UserError(
            f"the gradient norm is {grad_norm}: training has diverged; the weights of the last "
            "checkpoint are sound; go on from there with a lower --learning_rate"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return _metrics(sums, grad_norm, ranks)


def _add(sums: dict[str, float], loss: Loss, logprob_M: Tensor, batch: MicroBatch) -> None:
    values = {
        "loss": loss.value.detach(),
        "tokens": torch.tensor(float(len(logprob_M))),
        "kl": loss.kl_M.sum(),
        "clip_ratio": loss.clipped_M.sum(),
        "ratio": loss.ratio_M.sum(),
        "logprob_mismatch": (logprob_M - batch.rollout_logprob_M).abs().sum(),
    }
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value.double().item()


def _metrics(sums: dict[str, float], grad_norm: float, ranks: Ranks) -> dict[str, float]:
    """Token means over all ranks; the loss is the ranks' mean, as their gradients are averaged."""
    totals = {name: ranks.total(value) for name, value in sums.items()}
    tokens = totals.pop("tokens")
    loss = totals.pop("loss") / ranks.world_size
    return {
        "loss": loss,
        "grad_norm": grad_norm,
        **{name: value / tokens for name, value in totals.items()},
    }
