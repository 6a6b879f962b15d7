"""What both stages of the recipe share: the learning rate's course, progress, resumable state."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import torch


class Course:
    """The clock of a stage: when to speak and when to save."""

    def __init__(self, save_every_s: float = 120.0, tell_every: int = 20) -> None:
        """State is saved every `save_every_s` seconds, a line printed every `tell_every` steps."""
        self.save_every_s, self.tell_every = save_every_s, tell_every
        self.saved = self.started = time.monotonic()
        self.means: dict[str, float] = {}

    def set_rate(
        self, optimizer: torch.optim.Optimizer, peak: float, step: int, total: int
    ) -> None:
        """Warm-up over 50 steps, then a cosine down to a twentieth of `peak`."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / total))
        rate = peak * min(1.0, (step + 1) / 50) * (0.05 + 0.95 * cosine)
        for group in optimizer.param_groups:
            group["lr"] = rate

    def tell(self, stage: str, step: int, total: int, **values: float) -> None:
        """Print running means now and then."""
        for name, value in values.items():
            self.means[name] = 0.95 * self.means.get(name, value) + 0.05 * value
        if step % self.tell_every == 0 or step == total:
            shown = "  ".join(f"{name} {value:.4f}" for name, value in self.means.items())
            spent = time.monotonic() - self.started
            print(f"{stage} {step}/{total}  {shown}  {spent:.0f} s", flush=True)

    def due(self) -> bool:
        """Whether it is time to save."""
        if time.monotonic() - self.saved < self.save_every_s:
            return False
        self.saved = time.monotonic()
        return True


def save_state(path: Path, **state: Any) -> None:
    """Write `state` aside and rename it into place, so that a kill leaves the older file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    torch.save(state, aside)
    os.replace(aside, path)


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote; tensors and plain values only."""
    return torch.load(path, weights_only=True)
