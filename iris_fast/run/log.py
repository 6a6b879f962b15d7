"""Metrics: computed over all ranks, written to metrics.jsonl, the console and a tracker; warnings.

Units stand in the names (`_s`, `_bytes`, `_tokens`); what has none is a mean per token, a share in
[0, 1], or a reward.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any

from tqdm import tqdm

from iris_fast.config import TrainConfig
from iris_fast.distributed import Ranks
from iris_fast.errors import replacing, writing
from iris_fast.run.folder import RunFolder
from iris_fast.run.health import find_warnings
from iris_fast.run.metrics import read_metrics
from iris_fast.run.trackers import open_tracker


class Log:
    """Where a run's metrics go. Only rank 0 writes; on the others every call does nothing."""

    def __init__(self, folder: RunFolder, config: TrainConfig, step: int, ranks: Ranks) -> None:
        """Open the log at `step`: lines of later steps, left by a run that went on past its last
        checkpoint, are dropped."""
        self.history: list[dict[str, Any]] = []
        self.tracker = None
        self._active = ranks.is_first
        if not self._active:
            return
        self.history = read_metrics(folder.metrics, up_to=step)
        self._path = folder.metrics
        lines = [json.dumps(row) + "\n" for row in self.history]
        with replacing("output_dir", self._path) as partial:
            partial.write_text("".join(lines))
        with writing("output_dir", self._path):
            self._file = self._path.open("a", buffering=1)
        self._bar = tqdm(
            total=config.max_steps, initial=step, unit="step", disable=None, dynamic_ncols=True
        )
        if config.report_to != "none":
            self.tracker = open_tracker(config, folder.path)

    def step(self, metrics: dict[str, Any]) -> None:
        """Record one step; warnings are added to it and shown when they first appear."""
        if not self._active:
            return
        metrics["warnings"] = find_warnings(metrics, self.history)
        shown = {name for row in self.history for name in row["warnings"]}
        with writing("output_dir", self._path):
            self._file.write(json.dumps(metrics) + "\n")
        self.history.append(metrics)
        self.say(console_line(metrics))
        for name, warning in metrics["warnings"].items():
            if name not in shown:
                self.say(f"  warning: {warning}")
        self._bar.update()
        if self.tracker:
            numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
            self.tracker.log(numbers, step=metrics["step"])

    def say(self, line: str) -> None:
        """A line on the console, above the progress bar. A run does not end with its console, such
        as a pipe whose reader has gone: it says so once, and goes on."""
        if not self._active:
            return
        try:
            self._bar.write(line)
            sys.stdout.flush()
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
            print(f"standard output was closed; the run goes on, see {self._path}", file=sys.stderr)

    def close(self) -> None:
        """Flush everything."""
        if not self._active:
            return
        self._bar.close()
        with contextlib.suppress(OSError):  # a line that did not reach the disk was told of
            self._file.close()
        if self.tracker:
            self.tracker.finish()


def console_line(metrics: dict[str, Any]) -> str:
    """One step in one line."""
    parts = [
        f"step {metrics['step']:>4}",
        f"reward {metrics['reward']:.3f} ± {metrics['reward_std_in_groups']:.3f} in groups",
        f"nsc image {metrics['image_nsc']:.3f}"
        + (f" text {metrics['text_nsc']:.3f}" if "text_nsc" in metrics else ""),
        f"kl {metrics['kl']:.4f}",
        f"grad {metrics['grad_norm']:.3g}",
        f"{metrics['images_per_s']:.1f} images/s",
        f"{metrics['peak_memory_bytes'] / 2**30:.1f} GiB",
    ]
    return "  ".join(parts)
