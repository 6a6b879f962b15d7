"""Warnings for runs that look healthy and are not."""

import math
import statistics
from typing import Any

KL_SPIKE_FACTOR = 10.0
KL_SPIKE_MINIMUM = 0.05
ENTROPY_COLLAPSE_FRACTION = 0.1
HISTORY_STEPS = 20


def find_warnings(metrics: dict[str, Any], history: list[dict[str, Any]]) -> dict[str, str]:
    """Return name -> message for every problem that this step and the ones before it show."""
    found = {}
    if metrics["frac_reward_zero_std"] == 1:
        found["no spread"] = (
            "every group's rewards are equal, so every advantage is 0 and only the KL term acts; "
            "look at reward_funcs, temperature and num_generations"
        )
    if metrics.get("frac_cot_truncated") == 1:
        found["cot cut"] = (
            "every chain of thought was cut at max_completion_length; raise it, or check that the "
            "template is the model's"
        )
    # On the first step the policy is the reference, and its KL is 0.
    recent = [row["kl"] for row in history[-HISTORY_STEPS:] if row["kl"] > 0]
    median = statistics.median(recent) if recent else math.inf
    if metrics["kl"] > max(KL_SPIKE_MINIMUM, KL_SPIKE_FACTOR * median):
        found["kl spike"] = (
            f"KL to the reference jumped to {metrics['kl']:.3g} (median of the last {len(recent)} "
            f"steps: {median:.3g}); lower learning_rate or raise beta"
        )
    for name in ("image_entropy", "text_entropy"):
        first = history[0].get(name, 0.0) if history else 0.0
        if metrics.get(name, math.inf) < ENTROPY_COLLAPSE_FRACTION * first:
            found[f"{name} collapse"] = (
                f"{name} has collapsed to {metrics[name]:.3g} nats (step {history[0]['step']}: "
                f"{first:.3g}); the samples of a group will soon be alike"
            )
    return found
