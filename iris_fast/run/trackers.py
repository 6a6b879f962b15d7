"""Experiment trackers (tensorboard, wandb, trackio), through accelerate."""

import importlib.util
import netrc
import os
import urllib.parse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from iris_fast.config import TrainConfig
from iris_fast.errors import UserError
from iris_fast.run.samples import Samples

IMAGES, TEXTS = "samples/images", "samples/chains_of_thought"


def require_tracker(name: str) -> None:
    """Check that the tracker `name` can start, before a run creates its folder.

    UserError if it is not installed, or would wait for somebody to log in.
    """
    if name != "none" and importlib.util.find_spec(name) is None:
        raise UserError(f"report_to: {name} is not installed; pip install {name}")
    if name == "wandb" and not _wandb_can_start():
        raise UserError(
            "report_to: wandb has no login on this machine; run `wandb login`, set WANDB_API_KEY, "
            "or set WANDB_MODE=offline"
        )


def _wandb_can_start() -> bool:
    """Look for credentials where wandb does, in the same order."""
    if os.environ.get("WANDB_MODE", "online") != "online" or os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return urllib.parse.urlsplit(server).hostname in hosts


class Tracker:
    """The tracker that `report_to` names; tensorboard writes its files into `folder`."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        from accelerate import PartialState, tracking  # slow to import

        PartialState()  # accelerate's trackers log through it, and fail where nothing created it
        self._name = config.report_to
        tracker = tracking.LOGGER_TYPE_TO_CLASS[self._name]
        place = {"logging_dir": str(folder)} if tracker.requires_logging_directory else {}
        self._tracker = tracker("iris-fast", **place)
        if hasattr(self._tracker, "start"):  # accelerate >= 1.15 opens trackers on demand
            self._tracker.start()
        settings = {k: v for k, v in asdict(config).items() if isinstance(v, int | float | str)}
        self._tracker.store_init_configuration(settings)

    def log_metrics(self, metrics: dict[str, Any]) -> None:
        """Log the numbers of one step."""
        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
        self._tracker.log(numbers, step=metrics["step"])

    def log_samples(self, samples: Samples, path: Path) -> None:
        """Log the image grid at `path` and the chains of thought of its samples."""
        step, columns = samples.step, ["prompt", "chain of thought"]
        prompts = [prompt for prompt in samples.prompts for _ in range(samples.per_prompt)]
        has_cot = any(samples.cot)
        rows = [[*row] for row in zip(prompts, samples.cot, strict=True)] if has_cot else []
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        if self._name == "tensorboard":
            pixels_NHWC = np.asarray(image)[None]
            self._tracker.log_images({IMAGES: pixels_NHWC}, step=step, dataformats="NHWC")
            if rows:
                self._tracker.log({TEXTS: _markdown_table(columns, rows)}, step=step)
        elif self._name == "wandb":
            self._tracker.log_images({IMAGES: [image]}, step=step)
            if rows:
                self._tracker.log_table(TEXTS, columns=columns, data=rows, step=step)
        else:  # accelerate's TrackioTracker has neither method
            import trackio

            self._tracker.log({IMAGES: trackio.Image(image)}, step=step)
            if rows:
                self._tracker.log({TEXTS: trackio.Table(columns=columns, data=rows)}, step=step)

    def finish(self) -> None:
        """Flush and close the tracker."""
        self._tracker.finish()


def _markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
