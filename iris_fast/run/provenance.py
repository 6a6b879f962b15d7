"""The origin of a run: its commit, hardware and command."""

import os
import platform
import shlex
import subprocess
from pathlib import Path

import torch


def commit() -> str:
    """Return the commit of this code, and whether it has changed since; `unknown` if installed."""
    here = Path(__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True)
        except OSError:  # git is not installed
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A package installed below another project's checkout does not belong to that commit.
    if not git("ls-files", "--error-unmatch", Path(__file__).name):
        return "unknown"
    code = (":/iris_fast", ":/kernels", ":/bench")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *code)
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


def command(folder: Path) -> str:
    """The command that repeats the run in `folder`, into a new folder next to it."""
    words = ["torchrun", "--nproc-per-node", os.environ.get("WORLD_SIZE", "1")]
    words += ["-m", "iris_fast.train", "--config", str(folder / "config.yaml")]
    return shlex.join([*words, "--output_dir", f"{folder}-again"])
