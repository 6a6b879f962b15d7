"""Disk space that a run's checkpoints need, compared with what is free."""

import shutil
from pathlib import Path

from iris_fast.config import TrainConfig
from iris_fast.errors import UserError


def checkpoints_at_once(config: TrainConfig) -> int:
    """How many checkpoints exist together: an old one is deleted after a new one is complete."""
    saved = 1  # at the end
    if config.save_steps:
        saved = -(-config.max_steps // config.save_steps)
    best = int(config.best_metric is not None)
    return min(saved, config.save_total_limit + best + 1)


def check_disk(config: TrainConfig, checkpoint_bytes: float, run_folder: Path) -> None:
    """UserError if the checkpoints that this run will add do not fit the disk of `run_folder`."""
    parents = (run_folder, *run_folder.absolute().parents)
    existing = next(path for path in parents if path.exists())
    free = shutil.disk_usage(existing).free
    wanted = checkpoints_at_once(config)
    there = len(list((run_folder / "checkpoints").glob("step_*")))
    more = max(wanted - there, 1)
    if more * checkpoint_bytes <= free:
        return
    remedy = f"free disk space or name another --output_dir for {readable(more * checkpoint_bytes)}"
    if wanted > 2 and max(2 - there, 1) * checkpoint_bytes <= free:
        remedy = f"lower --save_total_limit, or {remedy}"
    checkpoints = f"{more} checkpoint{'s' if more > 1 else ''}"
    raise UserError(
        f"output_dir: the disk of {existing} has {readable(free)} free, and this run adds "
        f"{checkpoints} of {readable(checkpoint_bytes)} at a time; {remedy}"
    )


def readable(size: float) -> str:
    """A number of bytes in GiB or MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
