"""What a run can be traced back to: the commit, the hardware, the command."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from iris_fast.config import PRESETS, TrainConfig

# Filled in from the other settings where they are left out.
DERIVED = ("reward_funcs", "reward_weights", "metric_funcs")
OF_ONE_RUN = ("output_dir", "resume_from_checkpoint", "dry_run")


def commit() -> str:
    """The commit of this code, and whether tracked files were changed since; `unknown` for an
    installed package."""
    here = Path(__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *words], cwd=here, capture_output=True, text=True, check=False
            )
        except OSError:  # no git here
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A package that merely lies inside somebody's checkout is not of that commit.
    if not git("ls-files", "--error-unmatch", Path(__file__).name):
        return "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no")
    return f"{git('rev-parse', 'HEAD')}{', with uncommitted changes' if changed else ''}"


def hardware() -> str:
    """GPUs, or the CPU, and the number of processes."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    counted = f"{processes} process{'es' if processes > 1 else ''}"
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {counted}, CUDA {torch.version.cuda}"
    return f"{cpu_name()}, {counted}"


def cpu_name() -> str:
    """The processor and its number of cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def command(settings: dict[str, Any]) -> str:
    """The command that starts a run with these settings anew: flags for what its preset has not."""
    preset = PRESETS.get(settings.get("preset", TrainConfig.preset), {})
    usual = asdict(TrainConfig()) | preset
    given = {
        name: value
        for name, value in settings.items()
        if name in usual and name not in DERIVED + OF_ONE_RUN and value != usual[name]
    }
    filled_in = asdict(TrainConfig(**preset | given))
    given |= {n: settings[n] for n in DERIVED if settings.get(n, filled_in[n]) != filled_in[n]}
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    words = ["torchrun", *(["--nproc-per-node", str(processes)] if processes > 1 else [])]
    words += ["-m", "iris_fast.train"]
    for name, value in given.items():
        words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(words)
