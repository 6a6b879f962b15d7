"""AdamW over what is trained, and the course of its learning rate."""

from __future__ import annotations

import torch
from torch import nn

from iris_fast.config import TrainConfig


def make_optimizer(policy: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over what is trained."""
    return torch.optim.AdamW(
        [parameter for parameter in policy.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, config: TrainConfig) -> None:
    """The rate of the update that leads from `step` to `step + 1`: a function of the step alone."""
    if step < config.warmup_steps:
        share = (step + 1) / (config.warmup_steps + 1)
    else:
        span = max(config.max_steps - config.warmup_steps, 1)
        left = 1 - (step - config.warmup_steps) / span
        cosine = 0.5 * (1 + torch.cos(torch.tensor((1 - left) * torch.pi, dtype=torch.float64)))
        share = {"linear": left, "cosine": cosine.item(), "constant": 1.0}[config.lr_scheduler_type]
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * share
