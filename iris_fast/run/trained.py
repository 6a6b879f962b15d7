"""The trained model of a run folder."""

import sys
from pathlib import Path

import torch
import yaml

from iris_fast.errors import UserError
from iris_fast.models.pretrained.load import LoadedJanus
from iris_fast.preflight.inputs import open_model
from iris_fast.run.checkpoint import load_policy_weights, newest


def open_trained(run_folder: Path) -> tuple[LoadedJanus, Path]:
    """Open a run's model with the weights of its newest valid checkpoint, adapters merged.

    Also returns the checkpoint's path. Newer checkpoints that are damaged are reported on standard
    error. Raises UserError if the folder has no config.yaml or no valid checkpoint.
    """
    config_file = run_folder / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"run_folder: {run_folder} has no config.yaml; give the folder of a run")
    try:
        model = yaml.safe_load(config_file.read_text(encoding="utf-8"))["model"]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        raise UserError(f"run_folder: {config_file} is damaged; restore it") from None
    path, faults = newest(run_folder / "checkpoints")
    for fault in faults:
        print(f"warning: {fault}", file=sys.stderr)
    if path is None:
        raise UserError(f"run_folder: {run_folder} has no valid checkpoint; train first")
    opened = open_model(model, torch.float32)
    load_policy_weights(path, opened.model)
    return opened, path
