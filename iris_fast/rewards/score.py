"""Rollout -> Scored: every reward term, their weighted sum, the advantages."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from iris_fast.config import TrainConfig
from iris_fast.distributed import Ranks
from iris_fast.errors import UserError
from iris_fast.grpo.advantage import group_advantages
from iris_fast.records import Prompt, Rollout, Scored
from iris_fast.rewards import external

INTRINSIC = ("image_nsc", "text_nsc", "image_entropy", "text_entropy", "constant", "random")
# External rewards that come with the package, by a short name.
OF_IMAGES = {
    "tiny_verifier": "iris_fast.tiny.verifier:reward",
    "diversity": "iris_fast.tiny.verifier:diversity_reward",
    "richness": "iris_fast.tiny.verifier:richness_reward",
}

Functions = dict[str, Callable[..., Any]]


def load_rewards(names: list[str]) -> Functions:
    """Name -> function; UserError for a name that is neither known nor importable."""
    functions = {}
    for name in names:
        if name in INTRINSIC:
            functions[name] = import_module(f"iris_fast.rewards.{name}").reward
        elif name in OF_IMAGES or ":" in name:
            functions[name] = external.load(OF_IMAGES.get(name, name))
        else:
            raise UserError(
                f"reward_funcs: there is no reward {name!r}; choose from "
                f"{', '.join([*INTRINSIC, *OF_IMAGES])}, or write module:function"
            )
    return functions


def load_metrics(names: list[str], prompts: list[Prompt]) -> Functions:
    """The same for functions that look at images alone, checked against the prompts' fields."""
    functions = {}
    for name in names:
        if name not in OF_IMAGES and ":" not in name:
            raise UserError(
                f"metric_funcs: {name!r} is no measure of images; choose from "
                f"{', '.join(OF_IMAGES)}, or write module:function"
            )
        functions[name] = external.load(OF_IMAGES.get(name, name), "metric_funcs")
        external.wanted_fields(name, functions[name], prompts, "metric_funcs")
    return functions


def check_rewards(functions: Functions, prompts: list[Prompt]) -> None:
    """UserError, before anything is drawn, for an external reward that these prompts' fields do not
    fit."""
    for name, function in functions.items():
        if name not in INTRINSIC:
            external.wanted_fields(name, function, prompts)


def measure(functions: Functions, prompts: list[Prompt], images: list[Image]) -> dict[str, Tensor]:
    """Name -> [N] of `metric_funcs`; UserError as for an external reward."""
    return {
        name: external.call(name, function, prompts, images, "metric_funcs")
        for name, function in functions.items()
    }


def score(
    rollout: Rollout,
    functions: Functions,
    images: Callable[[], list[Image]],
    config: TrainConfig,
    ranks: Ranks,
    metrics: Functions | None = None,
) -> Scored:
    """reward = sum over terms of weight * term; advantage as `group_advantages`.

    `images` decodes the rollout's pixels, and is called only if a reward or metric looks at them.
    Advantages are taken over all ranks' rewards, so the number of ranks changes nothing.
    """
    terms: dict[str, Tensor] = {}
    pictures = images() if metrics or not set(functions) <= set(INTRINSIC) else []
    for name, function in functions.items():
        if name in INTRINSIC:
            terms[name] = function(rollout, config.reward_distribution, config.reward_reduction)
        else:
            terms[name] = external.call(name, function, rollout.prompts, pictures)
    measured = measure(metrics or {}, rollout.prompts, pictures)
    weights = torch.tensor(config.reward_weights)
    reward_N = (torch.stack(list(terms.values()), dim=1).float() * weights).sum(dim=1)
    everyone = ranks.gather(reward_N)
    advantages = group_advantages(everyone, config.num_generations, config.scale_rewards)
    mine = advantages.view(ranks.world_size, -1)[ranks.rank]
    return Scored(rollout, terms, reward_N, mine, measured)
