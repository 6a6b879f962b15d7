"""The trained model of a run folder."""

import sys
from pathlib import Path

import torch

from iris_fast.config import TrainConfig
from iris_fast.errors import UserError, read_yaml
from iris_fast.models.pretrained.load import LoadedJanus
from iris_fast.preflight.inputs import open_model
from iris_fast.run.checkpoint import load_policy_weights, newest


def open_trained(run_folder: Path) -> tuple[LoadedJanus, Path]:
    """Open a run's model with the weights of its newest valid checkpoint, adapters merged.

    Also returns the checkpoint's path. Newer checkpoints that are damaged are reported on standard
    error. Raises UserError if the folder has no config.yaml or no valid checkpoint.
    """
    remedy = "give the folder of a run, or restore the file"
    settings = read_yaml("run_folder", run_folder / "config.yaml", remedy)
    path, faults = newest(run_folder / "checkpoints")
    for fault in faults:
        print(f"warning: {fault}", file=sys.stderr)
    if path is None:
        raise UserError(f"run_folder: {run_folder} has no valid checkpoint; train first")
    opened = open_model(settings.get("model", TrainConfig.model), torch.float32)
    load_policy_weights(path, opened.model)
    return opened, path
