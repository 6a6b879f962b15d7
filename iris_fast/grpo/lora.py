"""LoRA: low-rank adapters on the decoder's projections (arXiv 2106.09685), made by peft.

A projection W becomes W + alpha / r * B A, of which only A and B are trained. Without its adapters
the policy is the model that the run started from, so it serves as its own reference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from iris_fast.config import TrainConfig
from iris_fast.errors import optional_import
from iris_fast.grpo.fsdp import full
from iris_fast.models.janus import Janus
from iris_fast.records import PackedBatch

ADAPTER = "default"  # peft's name for a single adapter
BASE = ".base_layer."  # where peft puts the layer that it adapts


@dataclass(frozen=True)
class Lora:
    """The adapters of a run; `seed` gives the initial values of A (B starts at 0)."""

    r: int
    alpha: int
    target_modules: list[str]
    seed: int

    @classmethod
    def of(cls, config: TrainConfig) -> Lora | None:
        """The adapters that the settings describe; None without `use_peft`."""
        if not config.use_peft:
            return None
        return cls(config.lora_r, config.lora_alpha, config.lora_target_modules, config.seed)


def add(policy: Janus, lora: Lora) -> None:
    """Put adapters into the decoder of `policy`, in place, equal on every rank.

    Only they require a gradient; they are float32. UserError without peft.
    """
    with optional_import("peft", "use_peft: true", "leave it out"):
        from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=lora.target_modules)
    policy.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lora.seed)
        inject_adapter_in_model(settings, policy.model.language_model)
    for name, parameter in policy.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".lora_" in name


def adapted_layers(policy: nn.Module) -> dict[str, Any]:
    """peft's layers by name; empty without adapters."""
    return {name: layer for name, layer in policy.named_modules() if hasattr(layer, "lora_A")}


def merged_weight(layer: Any) -> Tensor:
    """W + alpha / r * B A of one of peft's layers, unsharded, in float32."""
    weights = (layer.get_base_layer(), layer.lora_A[ADAPTER], layer.lora_B[ADAPTER])
    base, down, up = (full(part.weight.detach()) for part in weights)
    return base.float() + layer.scaling[ADAPTER] * (up @ down)


def merged_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and unsharded values of the plain model that `policy` with its adapters is equal to."""
    layers = adapted_layers(policy)
    for name, parameter in policy.named_parameters():
        if is_adapter(name):
            continue
        module, adapted, leaf = name.rpartition(BASE)
        if adapted and leaf == "weight":
            yield f"{module}.{leaf}", merged_weight(layers[module])
        else:
            yield f"{module}.{leaf}" if adapted else name, full(parameter.detach())


@torch.no_grad()
def merge(policy: nn.Module) -> None:
    """Turn an adapted model on one device into a plain one, layer by layer."""
    for name, layer in adapted_layers(policy).items():
        plain = layer.get_base_layer()
        plain.weight.copy_(merged_weight(layer))
        policy.set_submodule(name, plain)


@dataclass(frozen=True)
class Base:
    """The policy without its adapters, as the reference model; called without a graph."""

    policy: nn.Module

    def __call__(self, packed: PackedBatch) -> Any:
        """What the forward pass of the initial policy gives."""
        with self._adapters_off():
            return self.policy(packed)

    @contextlib.contextmanager
    def _adapters_off(self) -> Iterator[None]:
        # By their scale: peft's own switch also changes requires_grad, which FSDP reads only once.
        layers = adapted_layers(self.policy).values()
        for layer in layers:
            layer.set_scale(ADAPTER, 0.0)
        try:
            yield
        finally:
            for layer in layers:
                layer.set_scale(ADAPTER, 1.0)
