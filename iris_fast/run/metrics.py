"""Metrics of a step over all ranks, and metrics.jsonl read back.

Units stand in the names (`_s`, `_bytes`, `_tokens`); what has none is a mean per token, a share in
[0, 1], or a reward.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iris_fast.config import TrainConfig
from iris_fast.distributed import Ranks
from iris_fast.errors import UserError
from iris_fast.records import Scored, Trace


def rollout_metrics(scored: Scored, config: TrainConfig, ranks: Ranks) -> dict[str, float]:
    """Rewards, their spread inside groups, certainty and lengths, over all ranks' samples.

    Per-sample numbers are gathered before they are averaged, in float64, so that the number of
    ranks does not show.
    """
    rollout = scored.rollout
    columns = {
        "reward": scored.reward_N,
        **{f"rewards/{name}": values for name, values in scored.reward_terms.items()},
        **{f"metrics/{name}": values for name, values in scored.metrics.items()},
        "cot_truncated": torch.tensor(rollout.truncated),
    }
    for kind, trace in (("image", rollout.image), ("text", rollout.text)):
        columns |= _trace_columns(kind, trace)
    names = list(columns)
    table = ranks.gather(torch.stack([columns[name].double() for name in names], dim=1))
    mean = dict(zip(names, table.mean(dim=0).tolist(), strict=True))
    spread = table[:, 0].view(-1, config.num_generations).std(dim=1)
    metrics = {
        "reward": mean["reward"],
        "reward_std": table[:, 0].std().item(),
        "reward_std_in_groups": spread.mean().item(),
        "frac_reward_zero_std": (spread == 0).double().mean().item(),
        "reward_std_by_group": spread.tolist(),
        **{name: value for name, value in mean.items() if "/" in name},
    }
    for kind in ("image", "text"):
        tokens = mean[f"{kind}_tokens"]
        if tokens:
            for name in ("nsc", "nsc_guided", "entropy"):
                metrics[f"{kind}_{name}"] = mean[f"{kind}_{name}"] / tokens
    if config.cot:
        metrics["cot_tokens"] = mean["text_tokens"]
        metrics["frac_cot_truncated"] = mean["cot_truncated"]
    return metrics


def _trace_columns(kind: str, trace: Trace) -> dict[str, Tensor]:
    return {
        f"{kind}_tokens": trace.mask.sum(dim=1),
        f"{kind}_nsc": trace.conditional.nsc.sum(dim=1),
        f"{kind}_nsc_guided": trace.guided.nsc.sum(dim=1),
        f"{kind}_entropy": trace.conditional.entropy.sum(dim=1),
    }


def read_metrics(path: Path, up_to: float = math.inf) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl up to a step; a last line cut short by a crash is left out. UserError
    for any other line that is no row."""
    if not path.is_file():
        return []
    rows, lines = [], path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:  # not JSON, or not text
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            if number == len(lines):
                break
            raise UserError(
                f"output_dir: {path} line {number} is no step's metrics; mend or delete the line"
            )
        if row["step"] <= up_to:
            rows.append(row)
    return rows
