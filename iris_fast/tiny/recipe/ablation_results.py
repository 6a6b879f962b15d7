"""What the folder of an ablation holds: accuracies, and alignments before training."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from iris_fast.config import PRESETS
from iris_fast.rewards.alignment import Alignment, group_correlations
from iris_fast.run.provenance import commit, hardware
from iris_fast.tiny.recipe.ablation_plan import ARMS, METRIC, TERMS, Plan, Run, read_measurements
from iris_fast.tiny.world import WORLDS


def collect_results(plan: Plan, failed: dict[str, str]) -> dict[str, Any]:
    """All measurements that are there, with the commit, hardware and settings that they are from,
    and the names of the runs that are not."""
    worlds = {world: collect_world(plan, world) for world in plan.worlds}
    missing = [
        run.name
        for run in plan.runs()
        if not run.after_file.is_file() and run.arm not in _run_once(worlds[run.world])
    ]
    pictures = {
        arm["before"]["images"]
        for world in worlds.values()
        for arm in world["arms"].values()
        if arm["before"]
    }
    return {
        "commit": commit(),
        "hardware": hardware(),
        "steps": plan.settings.get("max_steps", PRESETS["tiny"]["max_steps"]),
        "seeds": plan.seeds,
        "pictures": max(pictures, default=0),
        "worlds": worlds,
        "not_run": missing,
        "failed": failed,
    }


def collect_world(plan: Plan, world: str) -> dict[str, Any]:
    """The world's settings, alignments by seed, and arms with their measurements."""
    arms = {}
    for arm in plan.arms:
        runs = [Run(plan, world, arm, seed) for seed in plan.seeds]
        before = runs[0].before_file
        measured = read_measurements(before) if before.is_file() else None
        after = {str(run.seed): _after(run) for run in runs if run.after_file.is_file()}
        arms[arm] = {"settings": ARMS[arm], "before": measured, "after": after if measured else {}}
    alignments = {
        str(seed): read_alignments(plan, world, path)
        for seed in plan.seeds
        if (path := Run(plan, world, "nsc", seed).model.alignment_file(seed)).is_file()
    }
    return {"settings": asdict(WORLDS[world]), "alignment": alignments, "arms": arms}


def read_alignments(plan: Plan, world: str, path: Path) -> dict[str, dict[str, Any]]:
    """`terms`: reward term -> its alignment with the verifier; `arms`: the same of the weighted sum
    that selects an arm's images, for arms that sample as the file's images were sampled. Direct
    optimisation selects none."""
    found = json.loads(path.read_text(encoding="utf-8"))
    values = {name: torch.tensor(rows).flatten() for name, rows in found["values"].items()}
    group = found["images_per_prompt"]

    def align(reward: torch.Tensor) -> dict[str, Any]:
        return Alignment.of(group_correlations(reward, values[METRIC], group))._asdict()

    arms = {}
    for arm in plan.arms:
        config = Run(plan, world, arm, found["seed"]).config
        names, weights = config.reward_funcs or [], config.reward_weights or []
        is_selected = config.objective == "grpo" and set(names) <= set(TERMS)
        if is_selected and config.cot == found["cot"]:
            parts = [weight * values[name] for name, weight in zip(names, weights, strict=True)]
            arms[arm] = align(torch.stack(parts).sum(dim=0))
    return {"terms": {name: align(values[name]) for name in TERMS}, "arms": arms}


def _after(run: Run) -> dict[str, Any]:
    """The measurements of a trained model, with the KL of its last step."""
    kl = round(run.rows[-1]["kl"], 4)
    return read_measurements(run.after_file) | {"kl": kl, "unchanged": run.is_unchanged()}


def _run_once(world: dict[str, Any]) -> list[str]:
    """The arms that need no other seed, because training left the initial model."""
    return [
        name
        for name, arm in world["arms"].items()
        if any(run["unchanged"] for run in arm["after"].values())
    ]
