"""Metrics: computed over all ranks, written to metrics.jsonl, the console and a tracker; warnings.

Units stand in the names (`_s`, `_bytes`, `_tokens`); what has none is a mean per token, a share in
[0, 1], or a reward.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import netrc
import os
import statistics
import sys
import urllib.parse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from iris_fast.batch import Scored, Trace
from iris_fast.config import TrainConfig
from iris_fast.distributed import Ranks
from iris_fast.errors import UserError, replacing, writing
from iris_fast.run_folder import RunFolder

KL_SPIKE_FACTOR = 10.0
KL_SPIKE_LEAST = 0.05
ENTROPY_COLLAPSE_SHARE = 0.1
HISTORY_STEPS = 20


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


def find_warnings(metrics: dict[str, Any], history: list[dict[str, Any]]) -> dict[str, str]:
    """Signs that a run which looks healthy is not, from this step and the ones before."""
    found = {}
    if metrics["frac_reward_zero_std"] == 1:
        found["no spread"] = (
            "every group's rewards are equal, so every advantage is 0 and only the KL term acts; "
            "look at reward_funcs, temperature and num_generations"
        )
    if metrics.get("frac_cot_truncated") == 1:
        found["cot cut"] = (
            "every chain of thought was cut at max_completion_length; raise it, or check that the "
            "template is the model's"
        )
    # On the first step the policy is the reference, and its KL of 0 says nothing.
    recent = [row["kl"] for row in history[-HISTORY_STEPS:] if row["kl"] > 0]
    usual = statistics.median(recent) if recent else math.inf
    if metrics["kl"] > max(KL_SPIKE_LEAST, KL_SPIKE_FACTOR * usual):
        found["kl spike"] = (
            f"KL to the reference jumped to {metrics['kl']:.3g} (median of the last {len(recent)} "
            f"steps: {usual:.3g}); lower learning_rate or raise beta"
        )
    for name in ("image_entropy", "text_entropy"):
        first = history[0].get(name, 0.0) if history else 0.0
        if metrics.get(name, math.inf) < ENTROPY_COLLAPSE_SHARE * first:
            found[f"{name} collapse"] = (
                f"{name} has collapsed to {metrics[name]:.3g} nats (step {history[0]['step']}: "
                f"{first:.3g}); the samples of a group will soon be alike"
            )
    return found


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
            self.tracker = _tracker(config, folder.path)

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


def _tracker(config: TrainConfig, folder: Path) -> Any:
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
