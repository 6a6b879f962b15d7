"""Rollout -> Rewards: every reward term, their weighted sum, and metrics that are only logged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from iris_fast.config import SamplingConfig
from iris_fast.errors import UserError
from iris_fast.records import Prompt, Rewards, Rollout
from iris_fast.rewards import external
from iris_fast.rewards.intrinsic import Distribution, Reduction, intrinsic_reward
from iris_fast.rewards.table import OF_IMAGES, REWARDS, is_external

ImageFunctions = dict[str, Callable[..., Any]]  # name -> function(prompts, images, **fields)


@dataclass(frozen=True)
class Scorer:
    """Judges a rollout: rewards are trained on, metrics are only logged.

    `weights`: reward name -> weight, in the order of the settings. `functions`: the external ones
    among the rewards. `decode`: codes [N, I] -> N images.
    """

    weights: dict[str, float]
    functions: ImageFunctions
    metrics: ImageFunctions
    decode: Callable[[Tensor], list[Image]]
    distribution: Distribution = "conditional"
    reduction: Reduction = "sum"

    @classmethod
    def of(
        cls,
        config: SamplingConfig,
        functions: ImageFunctions,
        prompts: list[Prompt],
        decode: Callable[[Tensor], list[Image]],
    ) -> Scorer:
        """The rewards (whose `functions` are loaded) and metrics that the settings name.

        UserError, before anything is sampled, for a function that does not accept the fields of
        these prompts, and for an unknown metric.
        """
        for name, function in functions.items():
            external.wanted_fields(name, function, prompts)
        assert config.reward_funcs and config.reward_weights, "filled in by the settings"
        weights = dict(zip(config.reward_funcs, config.reward_weights, strict=True))
        metrics = load_metrics(config.metric_funcs or [], prompts)
        reads = (config.reward_distribution, config.reward_reduction)
        return cls(weights, functions, metrics, decode, *reads)

    def score(self, rollout: Rollout) -> Rewards:
        """Compute total_N = sum over the rewards of weight * term, and the metrics.

        The images are decoded only if a function looks at them. UserError if a function raises, or
        does not return one finite number per sample.
        """
        images = self.decode(rollout.codes_NI) if self.functions or self.metrics else []
        found = self.intrinsic_terms(rollout) | self.external_terms(rollout.prompts, images)
        terms = {name: found[name] for name in self.weights}
        return Rewards(terms, self.total(terms), self.measure(rollout.prompts, images))

    def intrinsic_terms(self, rollout: Rollout) -> dict[str, Tensor]:
        """Name -> [N] of the rewards that are not functions of the images."""
        names = [name for name in self.weights if name not in self.functions]
        reads = (self.distribution, self.reduction)
        return {name: intrinsic_reward(name, rollout, *reads) for name in names}

    def external_terms(self, prompts: list[Prompt], images: list[Image]) -> dict[str, Tensor]:
        """Name -> [N] of the rewards that are; UserError as for `score`."""
        return {
            name: external.call(name, function, prompts, images)
            for name, function in self.functions.items()
        }

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """The weighted sum of all terms, [N]."""
        weights = torch.tensor(list(self.weights.values()))
        return (torch.stack(list(terms.values()), dim=1).float() * weights).sum(dim=1)

    def measure(self, prompts: list[Prompt], images: list[Image]) -> dict[str, Tensor]:
        """Name -> [N] of the metrics; UserError as for an external reward."""
        return {
            name: external.call(name, function, prompts, images, "metric_funcs")
            for name, function in self.metrics.items()
        }


def load_rewards(names: list[str]) -> ImageFunctions:
    """The functions of the external rewards among `names`; UserError for an unknown name."""
    functions = {}
    for name in names:
        if name not in REWARDS and ":" not in name:
            raise UserError(
                f"reward_funcs: there is no reward {name!r}; choose from {', '.join(REWARDS)}, or "
                "write module:function"
            )
        if is_external(name):
            functions[name] = _load(name, "reward_funcs")
    return functions


def load_metrics(names: list[str], prompts: list[Prompt]) -> ImageFunctions:
    """The functions that `metric_funcs` names; UserError for an unknown name, or for a function
    that does not accept the fields of these prompts."""
    functions = {}
    for name in names:
        if name not in OF_IMAGES and ":" not in name:
            raise UserError(
                f"metric_funcs: {name!r} is not an image metric; choose from "
                f"{', '.join(OF_IMAGES)}, or write module:function"
            )
        functions[name] = _load(name, "metric_funcs")
        external.wanted_fields(name, functions[name], prompts, "metric_funcs")
    return functions


def _load(name: str, setting: str) -> Callable[..., Any]:
    return external.load(REWARDS[name].statistic if name in REWARDS else name, setting)
