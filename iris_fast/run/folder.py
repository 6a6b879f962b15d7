"""The run folder: claimed without ever writing over another run, and found again on resume.

config.yaml  metrics.jsonl  samples/step_NNNNN.png  checkpoints/step_NNNNN/  report.html
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from iris_fast.config import TrainConfig, to_yaml
from iris_fast.distributed import Ranks
from iris_fast.errors import UserError, atomic_write, writing

LAUNCH = ".launch"
# Settings that a resumed run may change; the others would make it a different run.
MAY_CHANGE = {
    "output_dir", "resume_from_checkpoint", "max_steps", "save_steps", "save_total_limit",
    "sample_steps", "num_sample_prompts", "report_to", "ddp_timeout", "device", "dry_run",
    "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "beta", "epsilon", "epsilon_high", "preset",
    "rollout_correction", "rollout_correction_cap", "rollout_engine",
    "attn_implementation", "torch_compile", "offload_reference", "metric_funcs",
}  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run; `resumed` says whether it was there before."""

    path: Path
    resumed: bool

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Picture grids."""
        return self.path / "samples"

    @property
    def checkpoints(self) -> Path:
        """Training state."""
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        """The run on one page."""
        return self.path / "report.html"


def _launch() -> str:
    """Names what started this process: equal for the workers of one torchrun, before and after it
    starts them again."""
    parent = os.getppid()
    started = ""  # since process numbers are used again
    with contextlib.suppress(OSError, IndexError):
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', '')} {parent} {started}"


def _is_own(path: Path) -> bool:
    """Whether this torchrun claimed the folder before it started its workers again. A folder that
    it only found, and refused, is still somebody else's."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    marker = path / LAUNCH
    return restarted and marker.is_file() and marker.read_text() == _launch()


def choose(config: TrainConfig, ranks: Ranks) -> RunFolder:
    """Which folder the run will use; nothing is written yet. Rank 0 looks, for all.

    UserError if the folder holds anything and resuming was not asked for, or if there is no such
    run to resume, or if the settings are another run's.
    """
    with ranks.on_first_rank() as mine:
        folder = _choose(config) if mine else None
    return ranks.broadcast(folder)


def _choose(config: TrainConfig) -> RunFolder:
    path = Path(config.output_dir) if config.output_dir else _numbered(config.preset)
    if _is_own(path):
        return RunFolder(path, resumed=True)
    if config.resume_from_checkpoint:
        if not (path / "config.yaml").is_file():
            raise UserError(
                f"resume_from_checkpoint: {path} holds no run (no config.yaml); check --output_dir"
            )
        _compare(path, config)
        return RunFolder(path, resumed=True)
    if path.exists() and not path.is_dir():
        raise UserError(f"output_dir: {path} is a file; name a folder")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(
            f"output_dir: {path} is not empty and nothing in it is written over; name another, or "
            "go on with the run in it: --resume_from_checkpoint true"
        )
    return RunFolder(path, resumed=False)


@contextlib.contextmanager
def claimed(folder: RunFolder, config: TrainConfig, ranks: Ranks) -> Iterator[None]:
    """Make the folder and its config.yaml, and keep other processes out while the block runs.

    UserError if that cannot be written, or if another run has the folder, or has used it since it
    was chosen.
    """
    with contextlib.ExitStack() as held:
        with ranks.on_first_rank() as mine:
            if mine:
                with writing("output_dir", folder.path):
                    held.enter_context(_lock(folder))
                    _fill(folder, config)
        yield


@contextlib.contextmanager
def _lock(folder: RunFolder) -> Iterator[None]:
    folder.path.mkdir(parents=True, exist_ok=True)
    with (folder.path / LAUNCH).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"output_dir: another process is running in {folder.path}; wait for it, or name "
                "another folder"
            ) from None
        if not folder.resumed and (folder.path / "config.yaml").exists():
            raise UserError(
                f"output_dir: another run has taken {folder.path} in the meantime; start again, or "
                "name another folder"
            )
        file.truncate(0)
        file.write(_launch())
        file.flush()
        yield


def _fill(folder: RunFolder, config: TrainConfig) -> None:
    folder.samples.mkdir(exist_ok=True)
    folder.checkpoints.mkdir(exist_ok=True)
    # Without the flag, so that --config config.yaml starts the same run anew.
    settings = to_yaml(replace(config, resume_from_checkpoint=False))
    with atomic_write("output_dir", folder.path / "config.yaml") as partial:
        partial.write_text(settings, encoding="utf-8")


def _numbered(preset: str) -> Path:
    """runs/PRESET-NNN: the next free number, or after a restart the one this launch had taken."""
    taken = sorted(Path("runs").glob(f"{preset}-[0-9][0-9][0-9]"))
    for path in filter(_is_own, taken):
        return path
    number = int(taken[-1].name[-3:]) + 1 if taken else 1
    return Path("runs") / f"{preset}-{number:03d}"


def _compare(path: Path, config: TrainConfig) -> None:
    try:
        before = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        before = None
    if not isinstance(before, dict):
        raise UserError(f"resume_from_checkpoint: {path / 'config.yaml'} is damaged; restore it")
    before = asdict(TrainConfig()) | before  # settings that are newer than the run
    for name, value in asdict(config).items():
        if name not in MAY_CHANGE and _resolved(before[name]) != _resolved(value):
            raise UserError(
                f"resume_from_checkpoint: {path} was run with {name} {before[name]}, and now "
                f"{name} is {value}; give the same, or start a new run in another --output_dir"
            )


def _resolved(value: Any) -> Any:
    """A path's absolute form, where there is such a file; other values as they are."""
    if isinstance(value, str) and Path(value).exists():
        return str(Path(value).resolve())
    return value
