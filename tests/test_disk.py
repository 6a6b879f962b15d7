"""Disk space for checkpoints: estimated, and a run that does not fit is refused at the start."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from commands import run
from disks import small_disk
from small_runs import flags, metrics, quick

from bench.trainer.models import model_configs
from iris_fast.config import PRESETS, TrainConfig
from iris_fast.errors import UserError
from iris_fast.preflight.disk import check_disk, checkpoints_at_once
from iris_fast.preflight.estimate import GIB, H200, estimate
from iris_fast.tiny.build import build_tiny
from iris_fast.train import main


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_steps": 800, "save_steps": 100, "save_total_limit": 2}, 3),
        ({"max_steps": 800, "save_steps": 0}, 1),
        ({"max_steps": 250, "save_steps": 100, "save_total_limit": 9}, 3),
        ({"max_steps": 100, "save_steps": 100}, 1),
        ({"max_steps": 800, "save_steps": 100, "save_total_limit": 1}, 2),
    ],
)
def test_an_old_checkpoint_is_deleted_after_a_new_one_is_complete(changes, expected):
    assert checkpoints_at_once(TrainConfig(**changes)) == expected


@pytest.mark.parametrize("changes", [{}, {"use_peft": True, "lora_r": 4}, {"bf16": True}])
def test_a_checkpoint_is_as_large_as_estimated(tmp_path, changes):
    config = quick(tmp_path / "run", max_steps=1, **changes)
    assert main(config) == 0
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    found = sum(path.stat().st_size for path in folder.iterdir())
    needs = estimate(config, build_tiny().config, 1, H200, 20)
    others = 1 << 18  # manifest, headers, random states
    assert needs.checkpoint_bytes <= found <= 1.02 * needs.checkpoint_bytes + others


def test_checkpoints_of_1b_are_known():
    """4 bytes of weights per parameter, 8 of moments per trained one."""
    config = TrainConfig(**{"prompts": "p.txt"} | PRESETS["janus-pro-1b"])
    sizes = model_configs(torch.device("cuda"))["1B"]
    needs = estimate(config, sizes, 1, H200, 64)
    assert needs.checkpoint_bytes / GIB == pytest.approx(18.6, abs=0.1)
    assert "one checkpoint on disk" in needs.table()
    assert f"{needs.checkpoint_bytes / GIB:.2f} GiB" in needs.table()


def test_what_does_not_fit_is_refused_with_what_to_change(tmp_path, monkeypatch):
    free = 0.0
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, int(free)))
    config = TrainConfig(max_steps=800, save_steps=100, save_total_limit=2)
    target = tmp_path / "runs" / "new"
    free = 60 * GIB
    check_disk(config, 19 * GIB, target)
    free = 50 * GIB
    message = (
        r"^output_dir: the disk of .* has 50.0 GiB free, and this run adds 3 checkpoints of "
        r"19.0 GiB at a time; lower --save_total_limit, or free disk space or name another "
        r"--output_dir for 57.0 GiB$"
    )
    with pytest.raises(UserError, match=message):
        check_disk(config, 19 * GIB, target)
    free = 20 * GIB
    with pytest.raises(UserError, match=r"at a time; free disk space"):
        check_disk(config, 19 * GIB, target)
    for step in (100, 200):  # a resumed run replaces those that are there
        (target / "checkpoints" / f"step_{step:05d}").mkdir(parents=True)
    check_disk(config, 19 * GIB, target)
    free = 18 * GIB
    with pytest.raises(UserError, match=r"this run adds 1 checkpoint of 19.0 GiB"):
        check_disk(config, 19 * GIB, target)


def test_a_run_on_a_small_disk_does_not_start(here):
    with small_disk(here / "disk", megabytes=26) as disk:
        settings = flags(max_steps=3, save_steps=1, output_dir=disk / "run")
        finished = run("iris_fast.train", *settings, cwd=here)
        assert finished.code == 2
        assert "this run adds 3 checkpoints of" in finished.error_line
        assert not (disk / "run").exists()
        dry = run("iris_fast.train", *settings, "--dry_run", "true", cwd=here)
        assert dry.code == 2
        assert "one checkpoint on disk" in dry.out
        settings = flags(max_steps=1, save_steps=1, output_dir=disk / "run")
        assert run("iris_fast.train", *settings, cwd=here).code == 0
        assert len(metrics(Path("disk/run"))) == 1
