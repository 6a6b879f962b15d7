"""The log of a run: metrics.jsonl, console lines, and a tracker."""

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from iris_fast.config import TrainConfig
from iris_fast.distributed import Ranks
from iris_fast.errors import UserError, atomic_write, writing
from iris_fast.rewards.alignment import alignment_lines, alignment_warnings, pooled_alignments
from iris_fast.run.evaluation import Evaluation
from iris_fast.run.folder import RunFolder
from iris_fast.run.health import find_warnings
from iris_fast.run.samples import read_samples
from iris_fast.run.trackers import Tracker


class Log:
    """Writes metrics and samples to the metrics file at `path`, the console and a tracker.

    It is opened at `step`: rows of later steps, left by a run that continued past its last
    checkpoint, are dropped. `num_iterations` steps share a rollout. On ranks other than the first
    every method does nothing.
    """

    def __init__(
        self, path: Path, step: int, max_steps: int, is_first: bool, num_iterations: int = 1
    ) -> None:
        self.tracker: Tracker | None = None
        self.history: list[dict[str, Any]] = []
        self._is_first = is_first
        if not is_first:
            return
        self.history = read_metrics(path, up_to=step)
        self._path, self._max_steps, self._num_iterations = path, max_steps, num_iterations
        self._first_step, self._opened_at = step, time.perf_counter()
        self._evaluation_s = 0.0  # of the last one
        with atomic_write("output_dir", path) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in self.history))
        with writing("output_dir", path):
            self._file = path.open("a", buffering=1)
        self._bar = tqdm(
            total=max_steps, initial=step, unit="step", disable=None, dynamic_ncols=True
        )

    def step(self, metrics: dict[str, Any]) -> None:
        """Log one step. Warnings are added to those in `metrics`, and printed when they first
        appear."""
        if not self._is_first:
            return
        alignments = pooled_alignments([*self.history, metrics], self._num_iterations)
        metrics["warnings"] = {
            **find_warnings(metrics, self.history),
            **alignment_warnings(alignments),
            **metrics.get("warnings", {}),
        }
        printed = {name for row in self.history for name in row["warnings"]}
        with writing("output_dir", self._path):
            self._file.write(json.dumps(metrics) + "\n")
        self.history.append(metrics)
        elapsed_s, step = time.perf_counter() - self._opened_at, metrics["step"]
        left_s = elapsed_s / (step - self._first_step) * (self._max_steps - step)
        left_s += self._evaluation_s  # there is one after the last step
        self.print(console_line(metrics, self._max_steps, left_s))
        if step == 1:
            self._print_alignment()
        for name, warning in metrics["warnings"].items():
            if name not in printed:
                self.print(f"  warning: {warning}")
        self._bar.update()
        if self.tracker:
            self.tracker.log_metrics(metrics)

    def samples(self, path: Path) -> None:
        """Log the sample grid at `path`, and print the alignment over the steps so far."""
        if not self._is_first:
            return
        samples = read_samples(path)
        means = "  ".join(f"{name} {value:.3f}" for name, value in samples.means().items())
        self.print(f"samples at step {samples.step}: {means}")
        if samples.step > 1:
            self._print_alignment()
        if self.tracker:
            self.tracker.log_samples(samples, path)

    def evaluation(self, evaluation: Evaluation, metrics: list[str], seconds: float) -> None:
        """Log an evaluation that took this long, and print its `metrics`."""
        if not self._is_first:
            return
        self._evaluation_s = seconds
        self._opened_at += seconds  # not a part of the steps, which the time left is computed from
        means = {name: evaluation.mean(name) for name in evaluation.metrics}
        line = "  ".join(f"{name} {means[name].text()}" for name in metrics)
        self.print(f"held-out at step {evaluation.step}, {evaluation.size}: {line}")
        if self.tracker:
            values = {f"eval/{name}": mean.value for name, mean in means.items()}
            self.tracker.log_metrics({"step": evaluation.step, **values})

    def _print_alignment(self) -> None:
        for line in alignment_lines(pooled_alignments(self.history, self._num_iterations)):
            self.print(line)

    def print(self, line: str) -> None:
        """Print a line above the progress bar. If standard output was closed, such as a pipe whose
        reader has ended, the run continues without it."""
        if not self._is_first:
            return
        try:
            self._bar.write(line)
            sys.stdout.flush()
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
            message = f"standard output was closed; the run continues, see {self._path}"
            print(message, file=sys.stderr)

    def sync(self) -> None:
        """Flush the metrics to the disk: a checkpoint is judged by those of the steps before it."""
        if self._is_first:
            with writing("output_dir", self._path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close everything."""
        if not self._is_first:
            return
        self._bar.close()
        with contextlib.suppress(OSError):  # a failed write was reported when it happened
            self._file.close()
        if self.tracker:
            self.tracker.finish()


def open_log(folder: RunFolder, config: TrainConfig, step: int, ranks: Ranks) -> Log:
    """Open the log of a run that is at `step`, with the tracker that `report_to` names."""
    log = Log(folder.metrics, step, config.max_steps, ranks.is_first, config.num_iterations)
    if ranks.is_first and config.report_to != "none":
        log.tracker = Tracker(config, folder.path)
    return log


def console_line(metrics: dict[str, Any], max_steps: int, seconds_left: float) -> str:
    """Format one step as one line."""
    parts = [
        f"step {metrics['step']:>{len(str(max_steps))}}/{max_steps}",
        f"reward {metrics['reward']:.3f} ± {metrics['reward_std_in_groups']:.3f} in groups",
        f"nsc image {metrics['image_nsc']:.3f}"
        + (f" text {metrics['text_nsc']:.3f}" if "text_nsc" in metrics else ""),
        f"kl {metrics['kl']:.4f}",
        f"grad {metrics['grad_norm']:.3g}",
        f"{metrics['images_per_s']:.1f} images/s",
        f"{metrics['peak_memory_bytes'] / 2**30:.1f} GiB",
        f"eta {tqdm.format_interval(seconds_left)}",
    ]
    return "  ".join(parts)


def read_metrics(path: Path, up_to: float = math.inf) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl up to step `up_to`, none if there is no file.

    A last line that a crash truncated is ignored. UserError for any other line that is not a step's
    metrics.
    """
    lines = path.read_bytes().splitlines() if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:  # neither JSON nor text
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        elif number < len(lines):
            raise UserError(
                f"output_dir: {path} line {number} is not a step's metrics; fix or delete the line"
            )
    return [row for row in rows if row["step"] <= up_to]
