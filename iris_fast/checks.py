"""Settings checked against each other: UserError, naming the setting and the remedy. Called by the
classes of `iris_fast.config` with themselves. Imports neither torch nor these classes."""

import math
from typing import Any

from iris_fast.errors import UserError, require
from iris_fast.fields import defaults
from iris_fast.rewards.table import DIFFERENTIABLE, REWARDS


def check_rewards(config: Any) -> None:
    """Raise UserError for rewards or weights that cannot be computed."""
    names, weights = config.reward_funcs, config.reward_weights
    require(bool(names), "reward_funcs", "[]", "name at least one reward")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"reward_funcs: {name} is named twice; name it once, with a weight")
        if name in REWARDS and REWARDS[name].kind == "text" and not config.cot:
            raise UserError(
                f"reward_funcs: {name} needs a chain of thought; add --cot true or remove it"
            )
    remedy = f"give one finite number for each of {', '.join(names)}"
    complete = len(weights) == len(names) and all(map(math.isfinite, weights))
    require(complete, "reward_weights", weights, remedy)


def check_alignment(config: Any) -> None:
    """Raise UserError where there is nothing that rewards and metrics could be compared on."""
    check_rewards(config)
    remedy = "name at least one metric to compare the rewards with"
    require(bool(config.metric_funcs), "metric_funcs", "[]", remedy)
    remedy = "alignment compares the images of one prompt: give 2 or more, such as 8"
    count = config.num_images_per_prompt
    require(count >= 2, "num_images_per_prompt", count, remedy)
    if config.greedy or config.temperature == 0:
        raise UserError(
            "alignment: greedy sampling gives equal images, which cannot be compared; remove "
            "--greedy and --temperature 0"
        )


def check_guard(config: Any) -> None:
    """Raise UserError for a limit or a best checkpoint that would have no effect."""
    if config.max_kl is not None and config.beta == 0:
        raise UserError("max_kl: with --beta 0 there is no reference; remove one of the two")
    if config.max_kl is None and config.max_kl_action != type(config).max_kl_action:
        remedy = "it needs a limit: add --max_kl, or leave it out"
        require(False, "max_kl_action", config.max_kl_action, remedy)
    if config.best_metric is not None:
        known = ["reward", *config.metric_funcs, *config.reward_funcs]
        remedy = f"choose from {', '.join(dict.fromkeys(known))}"
        require(config.best_metric in known, "best_metric", config.best_metric, remedy)
        if not config.save_steps:
            raise UserError(
                "best_metric: with --save_steps 0 there is one checkpoint, at the end; give "
                "--save_steps"
            )


def check_evaluation(config: Any) -> None:
    """Raise UserError for an evaluation that would measure nothing, or would not take place."""
    if config.evaluates and not config.metric_funcs:
        raise UserError(
            "eval_prompts: there is no metric to measure their images with; add --metric_funcs, or "
            "--eval_prompts none"
        )
    if config.eval_steps and not config.evaluates:
        remedy = "it needs held-out prompts: add --eval_prompts, or leave it out"
        require(False, "eval_steps", config.eval_steps, remedy)


def check_direct(config: Any) -> None:
    """Raise UserError for what `--objective direct` does not support."""
    for name in config.reward_funcs:
        if name not in DIFFERENTIABLE:
            raise UserError(
                f"objective: direct differentiates the reward, and {name} has no gradient; "
                f"choose reward_funcs from {', '.join(DIFFERENTIABLE)}, or --objective grpo"
            )
    for name in ("reward_distribution", "policy_distribution", "rollout_correction"):
        value, needed = getattr(config, name), getattr(type(config), name)
        remedy = f"--objective direct supports {needed} only; change one of the two"
        require(value == needed, name, value, remedy)


def check_lora(config: Any) -> None:
    """Raise UserError for what adapters do not support."""
    require(bool(config.lora_target_modules), "lora_target_modules", "[]", "name at least one")
    for name in config.lora_target_modules:
        known = defaults(type(config))["lora_target_modules"]
        remedy = f"choose from {', '.join(known)}"
        require(name in known, "lora_target_modules", name, remedy)
    if config.train_image_head:
        raise UserError(
            "train_image_head: --use_peft true trains adapters only; remove one of the two"
        )
    if config.offload_reference:
        raise UserError(
            "offload_reference: with --use_peft true the reference is the policy without its "
            "adapters, so there is no copy to offload; remove one of the two"
        )


def check_no_lora(config: Any) -> None:
    """Raise UserError for settings of adapters that would have no effect."""
    for name in ("lora_r", "lora_alpha", "lora_target_modules"):
        value = getattr(config, name)
        remedy = "it needs adapters: add --use_peft true, or leave it out"
        require(value == defaults(type(config))[name], name, value, remedy)
