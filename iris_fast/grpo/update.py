"""Micro-batches -> one optimizer step: forward, loss, backward, clipping, AdamW."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from iris_fast.config import TrainConfig
from iris_fast.distributed import Ranks
from iris_fast.errors import UserError
from iris_fast.grpo.fsdp import discard_pass
from iris_fast.grpo.lora import Base
from iris_fast.grpo.loss import Loss, direct_loss, grpo_loss, truncated_importance
from iris_fast.grpo.micro_batches import MicroBatch, prepare
from iris_fast.grpo.optimizer import clip_gradients, set_learning_rate
from iris_fast.grpo.policy import copy_weights
from iris_fast.models.janus import Janus
from iris_fast.records import Scored
from iris_fast.rewards.intrinsic import token_rewards


@dataclass
class Learner:
    """What learns: the policy, its frozen reference (None with beta 0) and the optimizer.

    `pieces`: into how many parts each micro-batch is split; doubled when the GPU runs out of
    memory.
    """

    policy: Janus
    reference: Janus | Base | None
    optimizer: torch.optim.Optimizer
    config: TrainConfig
    ranks: Ranks
    pieces: int = 1

    def prepare(self, scored: Scored, old_logprobs: list[Tensor] | None) -> list[MicroBatch]:
        """The micro-batches of a scored rollout; see `micro_batches.prepare`."""
        return prepare(scored, self.policy, self.reference, self.config, self.ranks, old_logprobs)

    def update(
        self, batches: list[MicroBatch], step: int, pause: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Take the optimizer step that leads from `step` to `step + 1`; its metrics, over all
        ranks.

        The gradients of each micro-batch are reduced over the ranks at once, because they are kept
        sharded; those of a step that waits for its last micro-batch would be held unsharded.
        `pause` is called before each micro-batch and may raise.

        When the GPU runs out of memory, the step starts again with twice as many pieces per
        micro-batch: weights are unchanged until the end.

        UserError, before any weight changes, if the gradient is not finite or if one sample does
        not fit.
        """
        set_learning_rate(self.optimizer, step, self.config)
        sums = None
        while sums is None:
            # Handled after the block: inside it, the exception still holds the pass's tensors.
            with contextlib.suppress(torch.OutOfMemoryError):
                sums = self._accumulate(batches, pause)
            if sums is None:
                self._split_further(max(len(batch.rollout.prompts) for batch in batches))
        grad_norm = self._clip()
        self.optimizer.step()
        self.discard_gradients()
        return {
            **step_metrics(sums, grad_norm, self.ranks),
            "micro_batch_pieces": self.pieces,
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
            "attn_implementation": self.policy.attn_implementation,
        }

    def discard_gradients(self) -> None:
        """Free the gradients of a finished or interrupted step."""
        self.optimizer.zero_grad(set_to_none=True)

    def copy_weights_to(self, model: Janus) -> None:
        """Give `model`, such as the sampler's, the policy's weights, in place."""
        copy_weights(self.policy, model)

    def _accumulate(self, batches: list[MicroBatch], pause: Callable[[], None]) -> dict[str, float]:
        """Forward and backward of all micro-batches; sums of their metrics."""
        sums: dict[str, float] = {}
        for batch in batches:
            pause()
            for piece in batch.split(self.pieces):
                text, image = self.policy(piece.packed)
                logprob_M = torch.cat([text.logprob, image.logprob])
                if self.config.objective == "direct":
                    gain_M = token_rewards(self._reward_weights(), text, image)
                    reference_M, weight_M = piece.reference_logprob_M, piece.weight_M
                    beta = self.config.beta
                    loss = direct_loss(gain_M, logprob_M, reference_M, weight_M, beta=beta)
                else:
                    loss = policy_loss(logprob_M, piece, self.config)
                loss.value.backward()
                add_metrics(sums, loss, logprob_M.detach(), piece)
        return sums

    def _reward_weights(self) -> dict[str, float]:
        names, weights = self.config.reward_funcs, self.config.reward_weights
        return dict(zip(names or [], weights or [], strict=True))

    def _split_further(self, samples: int) -> None:
        """Double the pieces of a micro-batch of `samples` samples, after out of memory; UserError
        if that cannot help."""
        if self.ranks.world_size > 1:
            # The other ranks are inside a collective that this one has left.
            raise UserError(
                "per_device_train_batch_size: out of memory in the training pass, and with several "
                "ranks a step cannot be restarted: lower it and raise "
                "--gradient_accumulation_steps, or add --gradient_checkpointing true"
            )
        if self.pieces >= samples:
            raise UserError(
                "max_completion_length: out of memory in the training pass of a single sample; add "
                "--gradient_checkpointing true, or use more GPUs"
            )
        self.pieces *= 2
        discard_pass(self.policy)
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()

    def _clip(self) -> float:
        """Clip the gradients to `max_grad_norm` (0: never); the norm before. UserError if it is not
        finite."""
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        grad_norm = clip_gradients(trained, self.config.max_grad_norm).item()
        if not math.isfinite(grad_norm):
            raise UserError(
                f"the gradient norm is {grad_norm}: training has diverged; the weights of the last "
                "checkpoint, if there is one, are sound; resume from it, or start again, with a "
                "lower --learning_rate"
            )
        return grad_norm


def policy_loss(logprob_M: Tensor, batch: MicroBatch, config: TrainConfig) -> Loss:
    """GRPO's loss of a micro-batch, with the correction for the sampler if it is asked for."""
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


def add_metrics(sums: dict[str, float], loss: Loss, logprob_M: Tensor, batch: MicroBatch) -> None:
    """Add a micro-batch's loss and its sums over tokens to `sums`."""
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


def step_metrics(sums: dict[str, float], grad_norm: float, ranks: Ranks) -> dict[str, float]:
    """Means over the tokens of all ranks. The loss is the mean over the ranks, as the gradient
    is."""
    totals = {name: ranks.total(value) for name, value in sums.items()}
    tokens = totals.pop("tokens")
    loss = totals.pop("loss") / ranks.world_size
    return {
        "loss": loss,
        "grad_norm": grad_norm,
        **{name: value / tokens for name, value in totals.items()},
    }
