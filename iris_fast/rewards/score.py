"""Rollout -> Scored: every reward term, their weighted sum, the advantages."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from iris_fast.advantage import group_advantages
from iris_fast.batch import Prompt, Rollout, Scored
from iris_fast.config import TrainConfig
from iris_fast.distributed import Ranks
from iris_fast.errors import UserError
from iris_fast.rewards import external

INTRINSIC = ("image_nsc", "text_nsc", "image_entropy", "text_entropy", "constant", "random")


def load_rewards(names: list[str]) -> dict[str, Callable[..., Any]]:
    """Name -> function; UserError for a name that is neither intrinsic nor importable."""
    functions = {}
    for name in names:
        if name in INTRINSIC:
            functions[name] = import_module(f"iris_fast.rewards.{name}").reward
        elif ":" in name:
            functions[name] = external.load(name)
        else:
            raise UserError(
                f"reward_funcs: there is no reward {name!r}; choose from {', '.join(INTRINSIC)}, "
                "or write module:function"
            )
    return functions


def check_rewards(functions: dict[str, Callable[..., Any]], prompts: list[Prompt]) -> None:
    """UserError, before anything is drawn, for an external reward that these prompts' fields do not
    fit."""
    for name, function in functions.items():
        if name not in INTRINSIC:
            external.wanted_fields(name, function, prompts)


def score(
    rollout: Rollout,
    functions: dict[str, Callable[..., Any]],
    images: Callable[[], list[Image]],
    config: TrainConfig,
    ranks: Ranks,
) -> Scored:
    """reward = sum over terms of weight * term; advantage as `group_advantages`.

    `images` decodes the rollout's pixels, and is called only if an external reward looks at them.
    Advantages are taken over all ranks' rewards, so the number of ranks changes nothing.
    """
    terms: dict[str, Tensor] = {}
    pictures: list[Image] | None = None
    for name, function in functions.items():
        if name in INTRINSIC:
            terms[name] = function(rollout, config.reward_distribution, config.reward_reduction)
        else:
            pictures = images() if pictures is None else pictures
            terms[name] = external.call(name, function, rollout.prompts, pictures)
    weights = torch.tensor(config.reward_weights)
    reward_N = (torch.stack(list(terms.values()), dim=1).float() * weights).sum(dim=1)
    everyone = ranks.gather(reward_N)
    advantages = group_advantages(everyone, config.num_generations, config.scale_rewards)
    mine = advantages.view(ranks.world_size, -1)[ranks.rank]
    return Scored(rollout=rollout, reward_terms=terms, reward_N=reward_N, advantage_N=mine)
