"""Experiment trackers, through accelerate."""

from __future__ import annotations

import importlib.util
import netrc
import os
import urllib.parse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from iris_fast.config import TrainConfig
from iris_fast.errors import UserError


def require_tracker(name: str) -> None:
    """Raise UserError if the tracker `name` is not installed, or would stop to ask for a login:
    before a run makes its folder."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise UserError(f"report_to: {name} is not installed; pip install {name}")
    if name == "wandb" and not _wandb_can_start():
        raise UserError(
            "report_to: wandb has no login on this machine; run `wandb login`, set WANDB_API_KEY, "
            "or set WANDB_MODE=offline"
        )


def _wandb_can_start() -> bool:
    """Whether wandb finds what it else prompts for: it looks in these places, in this order."""
    if os.environ.get("WANDB_MODE", "online") != "online" or os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return urllib.parse.urlsplit(server).hostname in hosts


def open_tracker(config: TrainConfig, folder: Path) -> Any:
    """The tracker that `report_to` names, logging into `folder` where it writes files."""
    from accelerate import tracking  # imports half of the ecosystem: only where asked for

    kinds = {
        "tensorboard": (tracking.TensorBoardTracker, {"logging_dir": str(folder)}),
        "wandb": (tracking.WandBTracker, {}),
        "trackio": (tracking.TrackioTracker, {}),
    }
    kind, arguments = kinds[config.report_to]
    tracker = kind("iris-fast", **arguments)
    if hasattr(tracker, "start"):  # accelerate >= 1.15 opens trackers on demand
        tracker.start()
    settings = {k: v for k, v in asdict(config).items() if isinstance(v, int | float | str)}
    tracker.store_init_configuration(settings)
    return tracker
