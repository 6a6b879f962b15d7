"""Checkpoints that are incomplete, damaged or forged, full disks; and the valid one before."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from commands import run
from disks import small_disk
from iris_kernels import TokenStats
from small_runs import checkpoints, flags, metrics, quick, tensors, tree

from iris_fast.errors import UserError
from iris_fast.models.pretrained.save import save_janus
from iris_fast.records import Scored, Trace
from iris_fast.run import checkpoint
from iris_fast.run.checkpoint import Progress, newest
from iris_fast.run.manifest import find_fault
from iris_fast.tiny import build_tiny
from iris_fast.train import train

KEEP_ALL = {"save_steps": 1, "save_total_limit": 10}


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory) -> Path:
    """A run with checkpoints after steps 1, 2 and 3. Read-only."""
    folder = tmp_path_factory.mktemp("three") / "run"
    train(quick(folder, max_steps=3, **KEEP_ALL))
    return folder


@pytest.fixture
def damaged(three_steps, here) -> Path:
    """A copy to damage, at `run`."""
    shutil.copytree(three_steps, here / "run")
    return here / "run" / "checkpoints"


def reseal(folder: Path) -> None:
    """Write a manifest that fits the folder's current content, as a forger would."""
    files = {
        path.name: {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in folder.iterdir()
        if path.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps({"step": 3, "files": files}))


def flip_a_byte(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)


def truncate(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    os.truncate(file, file.stat().st_size // 2)


DAMAGES = {
    "flipped byte": (flip_a_byte, "safetensors has changed since it was written"),
    "truncated file": (truncate, r"safetensors has \d+ bytes instead of \d+"),
    "missing file": (lambda folder: (folder / "rank_0.pt").unlink(), "rank_0.pt is missing"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "no JSON": (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is dam"),
    "a list": (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json is dam"),
    "no sizes": (
        lambda folder: (folder / "manifest.json").write_text('{"files": {"a": {}}}'),
        "manifest.json is damaged",
    ),
    "nothing in it": (
        lambda folder: [p.unlink() for p in folder.iterdir()],
        "manifest.json is mis",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_skipped(damaged, damage, message):
    damage(damaged / "step_00003")
    path, faults = newest(damaged)
    assert path == damaged / "step_00002"
    (fault,) = faults
    assert "step_00003 is skipped" in fault
    assert re.search(message, fault)


def test_resuming_past_damaged_checkpoints_warns_and_gives_the_same_run(damaged, three_steps, here):
    flip_a_byte(damaged / "step_00003")
    truncate(damaged / "step_00002")
    finished = run(
        "iris_fast.train", *flags(**KEEP_ALL, max_steps=3, output_dir="run"),
        "--resume_from_checkpoint", "true", cwd=here,
    )  # fmt: skip
    assert finished.code == 0
    warnings = finished.err.splitlines()
    assert len(warnings) == 2
    assert all(line.startswith("iris_fast.train: warning: checkpoint run/") for line in warnings)
    assert metrics("run") == metrics(three_steps)
    again, before = tensors("run", 3), tensors(three_steps, 3)
    assert all(torch.equal(again[name], before[name]) for name in before)
    assert [find_fault(damaged / name) for name in checkpoints("run")] == [None] * 3


def test_if_all_checkpoints_are_damaged_nothing_is_changed(damaged, here):
    for path in damaged.iterdir():
        flip_a_byte(path)
    before = tree(here)
    with pytest.raises(UserError, match="run/checkpoints holds no valid checkpoint"):
        train(quick("run", **KEEP_ALL, max_steps=4, resume_from_checkpoint=True))
    assert tree(here) == before


def test_folders_that_are_not_checkpoints_are_ignored(damaged, here):
    shutil.copytree(damaged / "step_00001", damaged / "step_00009_copy")
    (damaged / "step_").mkdir()
    (damaged / "notes.txt").write_text("mine")
    assert newest(damaged) == (damaged / "step_00003", [])
    train(quick("run", max_steps=4, save_total_limit=1, resume_from_checkpoint=True))
    kept = ["notes.txt", "step_", "step_00004", "step_00009_copy"]
    assert checkpoints("run") == kept  # and not deleted


def test_steps_of_more_than_five_digits_are_sorted_as_numbers(tmp_path):
    for name in ("step_99999", "step_100000", "step_00007"):
        (tmp_path / name).mkdir()
    names = [path.name for path in checkpoint.step_folders(tmp_path)]
    assert names == ["step_100000", "step_99999", "step_00007"]


def test_damaged_checkpoints_do_not_count_when_old_ones_are_deleted(damaged, here):
    """Resumed before step 3; with a limit of 1 the checkpoint that stays is the valid one."""
    truncate(damaged / "step_00003")
    (damaged / "step_00002" / "manifest.json").unlink()
    train(quick("run", max_steps=2, save_total_limit=1, resume_from_checkpoint=True))
    assert checkpoints("run") == ["step_00002"]
    assert find_fault(damaged / "step_00002") is None


# --- Interrupted ----------------------------------------------------------------------------------

KILLED = """
import os
from iris_fast.run import checkpoint
from iris_fast.cli import parse_command_line
from iris_fast.config import TrainConfig
write = checkpoint.write_manifest
checkpoint.write_manifest = lambda partial, step: os._exit(9) if step == 3 else write(partial, step)
from iris_fast.train import main
main(parse_command_line(TrainConfig, "killed"))
"""


def test_a_crash_during_a_save_leaves_the_earlier_checkpoints(here, three_steps):
    (here / "killed.py").write_text(KILLED)
    settings = flags(**KEEP_ALL, max_steps=3, output_dir="run")
    assert run("killed", *settings, cwd=here).code == 9
    left = checkpoints("run")
    assert left == [".partial-step_00003", "step_00001", "step_00002"]
    assert newest(Path("run/checkpoints")) == (Path("run/checkpoints/step_00002"), [])
    train(quick("run", **KEEP_ALL, max_steps=3, resume_from_checkpoint=True))
    assert checkpoints("run") == ["step_00001", "step_00002", "step_00003"]  # and no leftover
    assert metrics("run") == metrics(three_steps)


def test_a_full_disk_is_a_user_error_and_leaves_the_earlier_checkpoints(here):
    """Space for three checkpoints of 24 MB, which something else takes; then it is freed."""
    with small_disk(here / "disk", megabytes=120) as disk:
        (here / "fills.py").write_text(
            "import shutil\n"
            "calls = []\n"
            "def reward(prompts, images):\n"
            "    calls.append(1)\n"
            "    if len(calls) == 2:\n"
            "        free = shutil.disk_usage('disk').free\n"
            "        with open('disk/filler', 'wb') as file:\n"
            "            file.write(bytes(free - (10 << 20)))\n"
            "    return [0.0] * len(prompts)\n"
        )
        filling = {"reward_funcs": "[fills:reward]"}
        settings = flags(**KEEP_ALL | filling, max_steps=3, output_dir=disk / "run")
        finished = run("iris_fast.train", *settings, cwd=here)
        assert finished.code == 2
        assert "output_dir: " in finished.error_line
        assert "step_00002 could not be written" in finished.error_line
        assert "free disk space and resume" in finished.error_line
        assert "Traceback" not in finished.error_line
        assert checkpoints(disk / "run") == ["step_00001"]
        assert find_fault(disk / "run" / "checkpoints" / "step_00001") is None
        (disk / "filler").unlink()
        again = flags(
            **KEEP_ALL | filling, max_steps=3, output_dir=disk / "run", resume_from_checkpoint=True
        )
        (here / "fills.py").write_text("def reward(prompts, images): return [0.0] * len(prompts)")
        assert run("iris_fast.train", *again, cwd=here).code == 0
        assert checkpoints(disk / "run") == ["step_00001", "step_00002", "step_00003"]


def test_a_disk_that_fills_up_between_two_steps_is_a_user_error(here):
    with small_disk(here / "disk", megabytes=100) as disk:
        (here / "fills.py").write_text(
            "calls = []\n"
            "def reward(prompts, images):\n"
            "    calls.append(1)\n"
            "    if len(calls) == 2:\n"
            "        with open('disk/filler', 'wb', buffering=0) as file:\n"
            "            try:\n"
            "                while file.write(bytes(4096)): pass\n"
            "            except OSError: pass\n"
            "    return [0.0] * len(prompts)\n"
        )
        settings = flags(
            reward_funcs="[fills:reward]", max_steps=9, save_steps=1, output_dir=disk / "run"
        )
        finished = run("iris_fast.train", *settings, cwd=here)
        assert finished.code == 2
        lines = finished.err.splitlines()
        assert "iris_fast.train: error: output_dir: " in lines[-1]
        assert all(line.startswith("iris_fast.train: warning: output_dir") for line in lines[:-1])
        assert "Traceback" not in finished.err
        assert newest(disk / "run" / "checkpoints")[0].name == "step_00001"


# --- Forged ---------------------------------------------------------------------------------------


class Evil:
    """Creates a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("evil_ran",)


def test_a_pickle_with_code_is_an_error_and_does_not_run(damaged, here):
    torch.save({"random": Evil(), "scored": None}, damaged / "step_00003" / "rank_0.pt")
    reseal(damaged / "step_00003")
    before = tree(here)
    finished = run(
        "iris_fast.train", *flags(max_steps=4, output_dir="run"),
        "--resume_from_checkpoint", "true", cwd=here,
    )  # fmt: skip
    assert finished.code == 2
    assert "rank_0.pt is damaged, or holds more than tensors" in finished.error_line
    assert not (here / "evil_ran").exists()
    assert tree(here) == before


def test_unknown_files_in_a_checkpoint_are_not_opened(damaged, here):
    """torch's own reader unpickles .metadata; this one does not look at it."""
    (damaged / "step_00003" / ".metadata").write_bytes(pickle.dumps(Evil()))
    (damaged / "step_00003" / "data.pkl").write_bytes(pickle.dumps(Evil()))
    reseal(damaged / "step_00003")
    train(quick("run", max_steps=4, resume_from_checkpoint=True))
    assert not (here / "evil_ran").exists()


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"step": 3}'])
def test_a_damaged_state_is_an_error(damaged, content):
    (damaged / "step_00003" / "state.json").write_text(content)
    reseal(damaged / "step_00003")
    with pytest.raises(UserError, match=r"state.json is damaged.*delete .*step_00003"):
        train(quick("run", max_steps=4, resume_from_checkpoint=True))


def test_a_checkpoint_holds_only_tensors_and_containers(three_steps):
    folder = three_steps / "checkpoints" / "step_00003"
    kinds = {path.suffix for path in folder.iterdir()}
    assert kinds == {".safetensors", ".json", ".pt"}
    torch.load(folder / "rank_0.pt", weights_only=True)


@pytest.mark.shared
def test_a_checkpoint_of_another_model_is_an_error(shared, here):
    """The model folder has the same name and other content."""
    shutil.copytree(shared / "fixtures" / "janus_hf_tiny", "model")
    (here / "p.txt").write_text("a cube\n")
    settings = {"model": "model", "prompts": "p.txt"}
    train(quick("run", **settings, max_steps=1))
    shutil.rmtree("model")
    save_janus(build_tiny(), "model")
    before = tree(here)
    with pytest.raises(UserError, match=r"step_00001 does not fit the model .*--model"):
        train(quick("run", **settings, resume_from_checkpoint=True))
    assert tree(here) == before


def test_statistics_that_share_memory_are_stored_once(rollout, ranks, tmp_path):
    """A trace's fields are views of one tensor; stored apart, each would bring all of it along."""
    stats = torch.rand(2, 4, 4, 1000)
    trace = Trace(TokenStats(*stats[0]), TokenStats(*stats[1]), torch.ones(4, 1000).bool())
    rollout = dataclasses.replace(rollout, image=trace)
    scored = Scored(rollout, {}, torch.zeros(4), torch.zeros(4))
    progress = Progress(step=1, scored=scored)
    policy = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(policy.parameters())
    path = checkpoint.save(tmp_path, policy, optimizer, progress, ranks, keep=1)
    assert (path / "rank_0.pt").stat().st_size < 1.5 * stats.nbytes
    loaded = checkpoint.load(path, policy, optimizer, ranks).scored
    assert torch.equal(loaded.rollout.image.guided.entropy, trace.guided.entropy)
