"""The run folder: chosen without overwriting another run, and found again on resume.

config.yaml  metrics.jsonl  samples/step_NNNNN.png  eval/step_NNNNN.json
checkpoints/step_NNNNN/  report.html
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from iris_fast.config import TrainConfig, to_yaml
from iris_fast.distributed import Ranks
from iris_fast.errors import UserError, atomic_write, read_yaml, writing

LAUNCH = ".launch"
# Settings that may change when a run is resumed; with others it would be a different run.
MAY_CHANGE = {
    "output_dir", "resume_from_checkpoint", "max_steps", "save_steps", "save_total_limit",
    "sample_steps", "num_sample_prompts", "report_to", "ddp_timeout", "device", "dry_run",
    "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "beta", "epsilon", "epsilon_high", "preset",
    "rollout_correction", "rollout_correction_cap", "rollout_engine",
    "attn_implementation", "torch_compile", "offload_reference", "metric_funcs", "max_kl",
    "max_kl_action", "best_metric", "eval_prompts", "num_generations_eval", "eval_steps",
}  # fmt: skip


class RunFolder:
    """Paths of one run; `resumed` tells whether the run existed before."""

    def __init__(self, path: Path, resumed: bool) -> None:
        self.path, self.resumed = path, resumed
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples"
        self.evaluations = path / "eval"
        self.checkpoints = path / "checkpoints"
        self.report = path / "report.html"


def choose(config: TrainConfig, ranks: Ranks) -> RunFolder:
    """Choose the folder of the run, on rank 0 for all; nothing is written yet.

    UserError if the folder is not empty and resuming was not requested, if there is no run to
    resume, or if its settings differ.
    """
    with ranks.on_first_rank() as mine:
        folder = _choose(config) if mine else None
    return ranks.broadcast(folder)


def _choose(config: TrainConfig) -> RunFolder:
    path = Path(config.output_dir) if config.output_dir else _next_numbered(config.preset)
    if _claimed_before_restart(path):
        return RunFolder(path, resumed=True)
    if config.resume_from_checkpoint:
        _check_settings(path, config)
        return RunFolder(path, resumed=True)
    if path.exists() and not path.is_dir():
        raise UserError(f"output_dir: {path} is a file; name a folder")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(
            f"output_dir: {path} is not empty and is not overwritten; name another folder, or "
            "resume the run in it with --resume_from_checkpoint true"
        )
    return RunFolder(path, resumed=False)


@contextlib.contextmanager
def claimed(folder: RunFolder, config: TrainConfig, ranks: Ranks) -> Iterator[None]:
    """Create the folder and its config.yaml, and lock it while the `with` block runs.

    UserError if it cannot be written, or if another run uses it or has used it since it was chosen.
    """
    with contextlib.ExitStack() as stack:
        with ranks.on_first_rank() as mine:
            if mine:
                with writing("output_dir", folder.path):
                    stack.enter_context(_lock(folder))
                    folder.samples.mkdir(exist_ok=True)
                    folder.checkpoints.mkdir(exist_ok=True)
                    # Without the flag, so that --config config.yaml starts a new run.
                    settings = to_yaml(replace(config, resume_from_checkpoint=False))
                    with atomic_write("output_dir", folder.config) as partial:
                        partial.write_text(settings, encoding="utf-8")
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
        if not folder.resumed and folder.config.exists():
            raise UserError(
                f"output_dir: another run has just started in {folder.path}; name another folder"
            )
        file.truncate(0)
        file.write(_launcher_id())
        file.flush()
        yield


def _next_numbered(preset: str) -> Path:
    """runs/PRESET-NNN: the next free number, or after a restart the folder this launch claimed."""
    existing = sorted(Path("runs").glob(f"{preset}-[0-9][0-9][0-9]"))
    for path in filter(_claimed_before_restart, existing):
        return path
    number = int(existing[-1].name[-3:]) + 1 if existing else 1
    return Path("runs") / f"{preset}-{number:03d}"


def _claimed_before_restart(path: Path) -> bool:
    """Whether this torchrun claimed the folder, and did not only find it, before a restart."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    launch = path / LAUNCH
    return restarted and launch.is_file() and launch.read_text() == _launcher_id()


def _launcher_id() -> str:
    """Identify the process that started this one: equal for all workers and restarts of a run."""
    parent = os.getppid()
    start_time = ""  # process ids are reused
    with contextlib.suppress(OSError, IndexError):
        start_time = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', '')} {parent} {start_time}"


def _check_settings(path: Path, config: TrainConfig) -> None:
    """UserError if a setting outside MAY_CHANGE differs from the run's config.yaml."""
    remedy = "give the folder of a run as --output_dir, or restore the file"
    before = read_yaml("resume_from_checkpoint", path / "config.yaml", remedy)
    before = asdict(TrainConfig()) | before  # settings that were added after the run
    for name, value in asdict(config).items():
        if name not in MAY_CHANGE and _resolved(before[name]) != _resolved(value):
            raise UserError(
                f"resume_from_checkpoint: {path} was run with {name} {before[name]}, and now "
                f"{name} is {value}; use the same value, or start a new run in another --output_dir"
            )


def _resolved(value: Any) -> Any:
    """The absolute form of an existing path; other values unchanged."""
    if isinstance(value, str) and Path(value).exists():
        return str(Path(value).resolve())
    return value
