"""Metrics of a step, computed over all ranks.

Names end in their unit (`_s`, `_bytes`, `_tokens`); a metric without a unit is a mean per token, a
fraction in [0, 1], or a reward.
"""

from typing import Any

import torch
from torch import Tensor

from iris_fast.distributed import Ranks
from iris_fast.records import Scored, Trace
from iris_fast.rewards.alignment import align, alignment_metrics


def rollout_metrics(scored: Scored, num_generations: int, ranks: Ranks) -> dict[str, Any]:
    """Compute rewards, their spread inside groups and alignment with the metrics, certainty and
    lengths over all ranks' samples.

    Per-sample values are gathered before they are averaged, in float64, so that the result does not
    depend on the number of ranks.
    """
    rollout = scored.rollout
    columns = {
        "reward": scored.reward_N,
        **{f"rewards/{name}": values for name, values in scored.reward_terms.items()},
        **{f"metrics/{name}": values for name, values in scored.metrics.items()},
        "cot_truncated": torch.tensor(rollout.truncated),
        **trace_sums("image", rollout.image),
        **trace_sums("text", rollout.text),
    }
    table = ranks.gather(torch.stack([values.double() for values in columns.values()], dim=1))
    mean = dict(zip(columns, table.mean(dim=0).tolist(), strict=True))
    column = dict(zip(columns, table.unbind(dim=1), strict=True))
    terms = {name: column[f"rewards/{name}"] for name in scored.reward_terms}
    measured = {name: column[f"metrics/{name}"] for name in scored.metrics}
    aligned = align(terms, column["reward"], measured, num_generations)
    spread = table[:, 0].view(-1, num_generations).std(dim=1)
    metrics = {
        "reward": mean["reward"],
        "reward_std": table[:, 0].std().item(),
        "reward_std_in_groups": spread.mean().item(),
        "frac_reward_zero_std": (spread == 0).double().mean().item(),
        "reward_std_by_group": spread.tolist(),
        **{name: value for name, value in mean.items() if "/" in name},
        **alignment_metrics(aligned),
    }
    for kind in ("image", "text"):
        tokens = mean[f"{kind}_tokens"]
        if tokens:
            for name in ("nsc", "nsc_guided", "entropy"):
                metrics[f"{kind}_{name}"] = mean[f"{kind}_{name}"] / tokens
    if mean["text_tokens"]:
        metrics["cot_tokens"] = mean["text_tokens"]
        metrics["frac_cot_truncated"] = mean["cot_truncated"]
    return metrics


def trace_sums(kind: str, trace: Trace) -> dict[str, Tensor]:
    """Token counts [N] and sums [N] of token statistics per sample; names start with `kind`."""
    return {
        f"{kind}_tokens": trace.mask.sum(dim=1),
        f"{kind}_nsc": trace.conditional.nsc.sum(dim=1),
        f"{kind}_nsc_guided": trace.guided.nsc.sum(dim=1),
        f"{kind}_entropy": trace.conditional.entropy.sum(dim=1),
    }
