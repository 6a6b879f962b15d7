"""LoRA: low-rank adapters on the decoder's projections (arXiv 2106.09685), made by peft.

A projection W becomes W + alpha / r * B A, of which A and B alone are trained. Without the adapters
the policy is the model that the run started from: it is its own reference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from iris_fast.config import TrainConfig
from iris_fast.errors import optional
from iris_fast.grpo.fsdp import full
from iris_fast.models.janus import Janus
from iris_fast.records import PackedBatch

ADAPTER = "default"  # peft's name for the only one
BASE = ".base_layer."  # where peft puts what it adapts


@dataclass(frozen=True)
class Lora:
    """What the adapters of a run are; `seed` is that of A's initial values (B begins at 0)."""

    r: int
    alpha: int
    target_modules: list[str]
    seed: int

    @classmethod
    def of(cls, config: TrainConfig) -> Lora | None:
        """The settings' adapters, None without."""
        if not config.use_peft:
            return None
        return cls(config.lora_r, config.lora_alpha, config.lora_target_modules, config.seed)


def add(policy: Janus, lora: Lora) -> None:
    """Put adapters into `policy`'s decoder, in place; they alone require a gradient, in float32.

    Equal on every rank. UserError without peft.
    """
    with optional("peft", "use_peft: true", "leave it out"):
        from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=lora.target_modules)
    policy.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lora.seed)
        inject_adapter_in_model(settings, policy.model.language_model)
    for parameter in trained(policy):
        parameter.data = parameter.data.float()


def trained(policy: nn.Module) -> list[nn.Parameter]:
    """The adapters' parameters."""
    return [value for name, value in policy.named_parameters() if is_adapter(name)]


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return ".lora_" in name


def adapted_layers(policy: nn.Module) -> dict[str, Any]:
    """peft's layers by name; none without adapters."""
    return {name: layer for name, layer in policy.named_modules() if hasattr(layer, "lora_A")}


def merged_weight(layer: Any) -> Tensor:
    """W + alpha / r * B A of one of peft's layers, whole, in float32."""
    weights = (layer.get_base_layer(), layer.lora_A[ADAPTER], layer.lora_B[ADAPTER])
    base, down, up = (full(part.weight.detach()) for part in weights)
    return base.float() + layer.scaling[ADAPTER] * (up @ down)


def whole_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and whole values (gathered if sharded) of the plain model that `policy` amounts to."""
    layers = adapted_layers(policy)
    for name, parameter in policy.named_parameters():
        if is_adapter(name):
            continue
        place, adapted, leaf = name.rpartition(BASE)
        if not adapted:
            yield name, full(parameter.detach())
        elif leaf == "weight":
            yield f"{place}.{leaf}", merged_weight(layers[place])
        else:
            yield f"{place}.{leaf}", full(parameter.detach())


@torch.no_grad()
def merge(policy: nn.Module) -> None:
    """Make an adapted model on one device a plain one, layer by layer."""
    for name, layer in adapted_layers(policy).items():
        plain = layer.get_base_layer()
        plain.weight.copy_(merged_weight(layer))
        policy.set_submodule(name, plain)


@dataclass(frozen=True)
class Base:
    """The policy without its adapters, as the reference model; never with a graph."""

    policy: nn.Module

    def __call__(self, packed: PackedBatch) -> Any:
        """What the policy's forward gave before training."""
        with self._switched_off():
            return self.policy(packed)

    @contextlib.contextmanager
    def _switched_off(self) -> Iterator[None]:
        # By their scale: peft's own switch also changes requires_grad, which FSDP reads once.
        layers = adapted_layers(self.policy).values()
        for layer in layers:
            layer.set_scale(ADAPTER, 0.0)
        try:
            yield
        finally:
            for layer in layers:
                layer.set_scale(ADAPTER, 1.0)
