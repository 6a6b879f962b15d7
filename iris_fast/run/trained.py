"""The trained model of a run folder."""

import sys
from pathlib import Path
from typing import Any

import torch

from iris_fast.config import TrainConfig
from iris_fast.errors import UserError, read_yaml, require
from iris_fast.models.pretrained.load import LoadedJanus
from iris_fast.preflight.inputs import open_model
from iris_fast.run.best import Judge
from iris_fast.run.checkpoint import load_policy_weights, newest, ranked, step_folders
from iris_fast.run.log import read_metrics
from iris_fast.run.manifest import find_fault


def open_trained(run_folder: Path, checkpoint: str = "newest") -> tuple[LoadedJanus, Path]:
    """Open a run's model with the weights of a valid checkpoint, adapters merged.

    `checkpoint` is newest, best (by the run's `best_metric`), or a name such as step_00050. Also
    returns the checkpoint's path. Newer or better checkpoints that are damaged are reported on
    standard error. Raises UserError if the folder has no config.yaml or no such checkpoint.
    """
    remedy = "give the folder of a run, or restore the file"
    settings = read_yaml("run_folder", run_folder / "config.yaml", remedy)
    path, faults = _find(run_folder, checkpoint, settings)
    for fault in faults:
        print(f"warning: {fault}", file=sys.stderr)
    if path is None:
        raise UserError(f"run_folder: {run_folder} has no valid checkpoint; train first")
    opened = open_model(settings.get("model", TrainConfig.model), torch.float32)
    load_policy_weights(path, opened.model)
    return opened, path


def _find(run_folder: Path, name: str, settings: dict[str, Any]) -> tuple[Path | None, list[str]]:
    """The checkpoint that `name` means, and a line for each one passed over because of a fault."""
    folder = run_folder / "checkpoints"
    if name == "newest":
        return newest(folder)
    if name == "best":
        return _find_best(run_folder, settings)
    there = [path.name for path in step_folders(folder)]
    is_name = name.startswith("step_") and name[5:].isdecimal()
    require(is_name, "checkpoint", name, "give newest, best or the name of a folder: step_00050")
    fault = find_fault(folder / name)
    if fault:
        raise UserError(f"checkpoint: {folder / name}: {fault}; there are {', '.join(there)}")
    return folder / name, []


def _find_best(run_folder: Path, settings: dict[str, Any]) -> tuple[Path | None, list[str]]:
    metrics = run_folder / "metrics.jsonl"
    judge = Judge.of(settings, read_metrics(metrics))
    if judge is None:
        raise UserError(
            f"checkpoint: {run_folder} was trained without --best_metric, so that its best "
            "checkpoint was not kept; give newest, or the name of a folder in checkpoints/"
        )
    paths, faults = ranked(run_folder / "checkpoints", judge), []
    if not paths:
        raise UserError(f"checkpoint: {metrics} has no {judge.key} for any checkpoint; give newest")
    for path in paths:
        fault = find_fault(path)
        if fault is None:
            return path, faults
        faults.append(f"checkpoint {path} is skipped: {fault}")
    return None, faults
