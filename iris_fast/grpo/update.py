"""Scored rollouts -> optimizer steps: micro-batches, log-probs, the loss, one update."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from iris_kernels import TokenStats
from torch import Tensor, nn

from iris_fast.config import TrainConfig
from iris_fast.distributed import Ranks
from iris_fast.errors import UserError
from iris_fast.grpo.fsdp import full, give_up_pass
from iris_fast.grpo.loss import Loss, direct_loss, grpo_loss, token_weights, truncated_importance
from iris_fast.grpo.packing import pack
from iris_fast.records import CONDITIONAL, Guidance, PackedBatch, Rollout, Scored

# A model: statistics of a packed batch's text and image targets.
Forward = Callable[[PackedBatch], tuple[TokenStats, TokenStats]]


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass needs; M counts text rows first, then image rows."""

    rollout: Rollout
    sample_M: Tensor  # which of the rollout's samples a token is of; on the CPU
    packed: PackedBatch
    advantage_M: Tensor
    weight_M: Tensor
    rollout_logprob_M: Tensor  # the sampler's: for the mismatch that is logged, and tis
    reference_logprob_M: Tensor | None
    old_logprob_M: Tensor | None  # None: the policy's own, as on the first pass over a rollout

    def cut(self, pieces: int) -> list[MicroBatch]:
        """The same tokens in up to `pieces` micro-batches of whole samples. Gradients add up to the
        same: what a token weighs was settled for the micro-batch as a whole."""
        if pieces == 1:
            return [self]
        cut = []
        for chosen in torch.arange(len(self.rollout.prompts)).chunk(pieces):
            rollout = self.rollout.take(chosen.tolist())
            packed, sample_M = pack(rollout, self.packed.guidance)
            kept_M = torch.isin(self.sample_M, chosen).to(self.advantage_M.device)
            values = {
                name: None if value is None else value[kept_M]
                for name, value in vars(self).items()
                if name.endswith("_M") and name != "sample_M"
            }
            packed = packed.to(self.advantage_M.device)
            cut.append(replace(self, rollout=rollout, sample_M=sample_M, packed=packed, **values))
        return cut


@dataclass
class Pieces:
    """Into how many pieces each micro-batch is cut, as the GPU's memory asks for."""

    count: int = 1

    def double(self, samples: int, ranks: Ranks) -> None:
        """Halve the pieces of `samples` samples; UserError where that is no way out."""
        if ranks.world_size > 1:
            # The other ranks are in the middle of a collective that this one has left.
            raise UserError(
                "per_device_train_batch_size: out of memory in the training pass; with several "
                "ranks that cannot be mended in mid-step: lower it and raise "
                "--gradient_accumulation_steps, or add --gradient_checkpointing true"
            )
        if self.count >= samples:
            raise UserError(
                "num_generations: out of memory in the training pass of a single sample; add "
                "--gradient_checkpointing true, or use more GPUs"
            )
        self.count *= 2


def prepare(
    scored: Scored,
    policy: nn.Module,
    reference: Forward | None,
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
    guidance = CONDITIONAL
    if config.policy_distribution == "guided":
        guidance = Guidance(config.cfg_weight, config.temperature)
    batches = []
    for start in range(0, samples, per_batch):
        chosen = list(range(start, start + per_batch))
        part = rollout.take(chosen)
        packed, sample_M = pack(part, guidance)
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
        trained = config.policy_distribution
        rollout_M = torch.cat([getattr(trace, trained).logprob[trace.mask] for trace in drawn])
        packed = packed.to(device)
        old_M = None
        if old_logprobs is not None:
            old_M = old_logprobs[len(batches)].to(device)
        elif config.num_iterations > 1:
            old_M = log_probs(policy, packed)
        batches.append(
            MicroBatch(
                rollout=part,
                sample_M=sample_M,
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
def log_probs(model: Forward, packed: PackedBatch) -> Tensor:
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
    pieces: Pieces | None = None,
) -> dict[str, float]:
    """One optimizer step over all micro-batches; the step's loss metrics, over all ranks.

    Every micro-batch's gradients are summed over the ranks at once: they are kept sharded, where
    those of a step that waits for its last one would be held whole. `pause` is called before each,
    and may raise.

    Where the GPU has no memory left, all starts over with the micro-batches in twice as many
    `pieces`: weights are untouched until the end, so nothing but time is lost.

    UserError, before any weight changes, if the gradient is not finite, or one sample does not fit.
    """
    pieces = pieces or Pieces()
    sums = None
    while sums is None:
        # Mended after the block: inside, the exception still holds the failed pass's tensors.
        with contextlib.suppress(torch.OutOfMemoryError):
            sums = _accumulate(policy, batches, config, pause, pieces.count)
        if sums is None:
            pieces.double(max(len(batch.rollout.prompts) for batch in batches), ranks)
            give_up_pass(policy)
            if ranks.device.type == "cuda":
                torch.cuda.empty_cache()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    limit = config.max_grad_norm or float("inf")
    grad_norm = full(nn.utils.clip_grad_norm_(trained, limit)).item()
    if not math.isfinite(grad_norm):
        raise UserError(
            f"the gradient norm is {grad_norm}: training has diverged; the weights of the last "
            "checkpoint, if there is one, are sound; go on from there, or start anew, with a lower "
            "--learning_rate"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return _metrics(sums, grad_norm, ranks)


def _accumulate(
    policy: nn.Module,
    batches: list[MicroBatch],
    config: TrainConfig,
    pause: Callable[[], None],
    pieces: int,
) -> dict[str, float]:
    """Forward and backward of all micro-batches; sums of their metrics."""
    sums: dict[str, float] = {}
    for batch in batches:
        pause()
        for piece in batch.cut(pieces):
            _forward_backward(policy, piece, config, sums)
    return sums


def _forward_backward(
    policy: nn.Module, batch: MicroBatch, config: TrainConfig, sums: dict[str, float]
) -> None:
    text, image = policy(batch.packed)
    logprob_M = torch.cat([text.logprob, image.logprob])
    if config.objective == "direct":
        gains = [token_rewards(config, "text", text), token_rewards(config, "image", image)]
        reference_M, weight_M = batch.reference_logprob_M, batch.weight_M
        loss = direct_loss(torch.cat(gains), logprob_M, reference_M, weight_M, beta=config.beta)
    else:
        loss = policy_loss(logprob_M, batch, config)
    loss.value.backward()
    _add(sums, loss, logprob_M.detach(), batch)


def policy_loss(logprob_M: Tensor, batch: MicroBatch, config: TrainConfig) -> Loss:
    """GRPO's loss of a micro-batch, corrected for the sampler where that is asked for."""
    old_M = logprob_M.detach() if batch.old_logprob_M is None else batch.old_logprob_M
    correction_M = None
    if config.rollout_correction == "tis":
        cap = config.rollout_correction_cap
        correction_M = truncated_importance(old_M, batch.rollout_logprob_M, cap)
    return grpo_loss(
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


def token_rewards(config: TrainConfig, kind: str, stats: TokenStats) -> Tensor:
    """The weighted sum of the intrinsic rewards of each token of one kind, with gradient."""
    total = torch.zeros_like(stats.logprob)
    for name, weight in zip(config.reward_funcs, config.reward_weights, strict=True):
        if name.startswith(f"{kind}_"):
            total = total + weight * getattr(stats, name.removeprefix(f"{kind}_"))
    return total


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
