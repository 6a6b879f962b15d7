"""Shared parts of both pretraining stages: learning rate schedule, progress, resumable state."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch

from iris_fast.errors import atomic_write

WARMUP_STEPS = 50
LOG_EVERY_STEPS = 20


def set_learning_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, total: int) -> None:
    """Warm up over WARMUP_STEPS, then decay with a cosine to a twentieth of `peak`."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / total))
    rate = peak * min(1.0, (step + 1) / WARMUP_STEPS) * (0.05 + 0.95 * cosine)
    for group in optimizer.param_groups:
        group["lr"] = rate


class StageProgress:
    """Logs a stage's progress and decides when to save: every `save_every_s` seconds."""

    def __init__(self, save_every_s: float = 120.0) -> None:
        self.save_every_s = save_every_s
        self.saved_at = self.started_at = time.monotonic()
        self.means: dict[str, float] = {}

    def log(self, stage: str, step: int, total: int, **values: float) -> None:
        """Update the moving means of `values`; print them every LOG_EVERY_STEPS steps."""
        for name, value in values.items():
            self.means[name] = 0.95 * self.means.get(name, value) + 0.05 * value
        if step % LOG_EVERY_STEPS == 0 or step == total:
            means = "  ".join(f"{name} {value:.4f}" for name, value in self.means.items())
            elapsed_s = time.monotonic() - self.started_at
            print(f"{stage} {step}/{total}  {means}  {elapsed_s:.0f} s", flush=True)

    def save_is_due(self) -> bool:
        """Whether to save the state now; starts the next interval if so."""
        if time.monotonic() - self.saved_at < self.save_every_s:
            return False
        self.saved_at = time.monotonic()
        return True


def save_state(path: Path, **state: Any) -> None:
    """Write `state` and rename it into place, so that an interrupted write keeps the older file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write("work_dir", path) as partial:
        torch.save(state, partial)


def load_state(path: Path) -> dict[str, Any]:
    """Read a file of `save_state`, which holds tensors and plain values only."""
    return torch.load(path, weights_only=True)
