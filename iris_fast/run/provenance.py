"""The origin of a run: its commit, hardware and command."""

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

# Settings whose default depends on other settings.
DERIVED = ("reward_funcs", "reward_weights", "metric_funcs")
NOT_REPEATED = ("output_dir", "resume_from_checkpoint", "dry_run")


def commit() -> str:
    """Return the commit of this code, and whether tracked files have changed since; `unknown` for
    an installed package."""
    here = Path(__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *words], cwd=here, capture_output=True, text=True, check=False
            )
        except OSError:  # git is not installed
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A package installed below another project's checkout does not belong to that commit.
    if not git("ls-files", "--error-unmatch", Path(__file__).name):
        return "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no")
    return f"{git('rev-parse', 'HEAD')}{', with uncommitted changes' if changed else ''}"


def hardware() -> str:
    """Name the GPU, or the CPU, and the number of processes."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    count = f"{processes} process{'es' if processes > 1 else ''}"
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {count}, CUDA {torch.version.cuda}"
    return f"{cpu_name()}, {count}"


def cpu_name() -> str:
    """Name the processor and its number of cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def command(settings: dict[str, Any]) -> str:
    """The command that repeats a run: a flag for every setting that differs from its preset."""
    preset = PRESETS.get(settings.get("preset", TrainConfig.preset), {})
    defaults = asdict(TrainConfig()) | preset
    given = {
        name: value
        for name, value in settings.items()
        if name in defaults and name not in DERIVED + NOT_REPEATED and value != defaults[name]
    }
    derived = asdict(TrainConfig(**preset | given))
    given |= {n: settings[n] for n in DERIVED if settings.get(n, derived[n]) != derived[n]}
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    words = ["torchrun", *(["--nproc-per-node", str(processes)] if processes > 1 else [])]
    words += ["-m", "iris_fast.train"]
    for name, value in given.items():
        words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(words)
