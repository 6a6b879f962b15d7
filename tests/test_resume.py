"""A resumed run equals one that was never stopped, bitwise."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from small_runs import assert_same_run, checkpoints, metrics, quick, tree

from iris_fast.cli import parse
from iris_fast.config import TrainConfig
from iris_fast.errors import UserError
from iris_fast.run.log import Log
from iris_fast.train import train

RESUMED = {
    "cot, end of the prompt file inside a step": {"per_device_train_batch_size": 2},
    "accumulation": {"gradient_accumulation_steps": 2},
    "between two passes over a rollout": {"num_iterations": 2},
    "between passes, accumulating": {"num_iterations": 2, "gradient_accumulation_steps": 2},
    "image head, checkpointed blocks": {"train_image_head": True, "gradient_checkpointing": True},
    "bf16": {"bf16": True},
    "without cot": {"cot": False},
    "guided, two passes": {
        "policy_distribution": "guided",
        "num_iterations": 2,
        "learning_rate": 1e-5,
    },
    "8-bit moments": {"optim": "adamw_torch_8bit"},
    "bfloat16 moments": {"optim": "adamw_torch_bf16"},
}


@pytest.mark.parametrize("settings", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_equals_one_that_was_never_stopped(prompts, settings):
    settings = {"prompts": prompts, "max_steps": 5, "save_steps": 3, **settings}
    train(quick("whole", **settings))
    train(quick("parts", **settings | {"max_steps": 3}))
    assert [row["step"] for row in metrics("parts")] == [1, 2, 3]
    torch.manual_seed(123)  # must not matter
    train(quick("parts", **settings, resume_from_checkpoint=True))
    assert_same_run("whole", "parts", 5)


@pytest.fixture
def stops(prompts, monkeypatch) -> ModuleType:
    """A reward that takes numbers from Python's generator and stops the run at the calls
    `stop_at`."""
    Path("stops.py").write_text(
        "import os, random, signal\n"
        "calls, stop_at = [], []\n"
        "def reward(prompts, images):\n"
        "    calls.append(1)\n"
        "    if len(calls) in stop_at:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return [random.random() for _ in prompts]\n"
    )
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.delitem(sys.modules, "stops", raising=False)
    return importlib.import_module("stops")


def test_a_schedule_continues_where_a_signal_stopped_it(prompts, stops):
    """Stopped by SIGTERM twice, inside a step, with a schedule that depends on max_steps."""
    settings = {
        "prompts": prompts,
        "max_steps": 6,
        "save_steps": 0,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "reward_funcs": ["stops:reward"],
        "cot": False,
    }
    random.seed(5)
    train(quick("whole", **settings))
    random.seed(5)
    # In the second step and, as that one is repeated, in the fifth.
    stops.stop_at += [len(stops.calls) + 2, len(stops.calls) + 6]
    train(quick("parts", **settings))
    assert checkpoints("parts") == ["step_00001"]
    for step in (4, 6):
        random.seed(77)
        train(quick("parts", **settings, resume_from_checkpoint=True))
        assert len(metrics("parts")) == step
    assert_same_run("whole", "parts", 6)


def test_a_signal_between_two_steps_keeps_the_random_state_after_the_first(
    prompts, stops, monkeypatch
):
    """The finished step is not rolled back."""
    settings = {"prompts": prompts, "max_steps": 3, "reward_funcs": ["stops:reward"], "cot": False}
    random.seed(5)
    train(quick("whole", **settings))
    random.seed(5)
    log_step = Log.step

    def stop_after_step_2(log: Log, metrics: dict[str, Any]) -> None:
        log_step(log, metrics)
        if metrics["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Log, "step", stop_after_step_2)
        train(quick("parts", **settings))
    assert checkpoints("parts") == ["step_00002"]
    random.seed(77)
    train(quick("parts", **settings, resume_from_checkpoint=True))
    assert_same_run("whole", "parts", 3)


def test_steps_after_the_last_checkpoint_are_repeated(here):
    train(quick("whole", max_steps=4))
    train(quick("run", max_steps=3, save_steps=2, save_total_limit=5))
    (Path("run") / "checkpoints" / "step_00003" / "manifest.json").unlink()
    with (Path("run") / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rewa')  # truncated by a crash
    train(quick("run", max_steps=4, save_total_limit=5, resume_from_checkpoint=True))
    assert_same_run("whole", "run", 4)


def test_resuming_a_finished_run_changes_nothing(finished_run, here):
    before = tree(finished_run)
    config = parse(TrainConfig, "t", ["--config", str(finished_run / "config.yaml")])
    resumed = TrainConfig(**{**vars(config), "resume_from_checkpoint": True})
    train(resumed)
    changed = {name for name, digest in tree(finished_run).items() if before[name] != digest}
    assert changed <= {".launch"}


def test_a_run_from_before_a_setting_existed_can_be_resumed(here):
    train(quick("run", max_steps=1))
    config = here / "run" / "config.yaml"
    lines = config.read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines if not line.startswith("kv_cache_dtype")))
    (state,) = (here / "run").glob("checkpoints/*/state.json")
    fields = json.loads(state.read_text())
    del fields["lora"]
    state.write_text(json.dumps(fields))
    manifest = json.loads((state.parent / "manifest.json").read_text())
    data = state.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    manifest["files"]["state.json"] = {"bytes": len(data), "sha256": digest}
    (state.parent / "manifest.json").write_text(json.dumps(manifest))
    train(quick("run", max_steps=2, resume_from_checkpoint=True))
    assert [row["step"] for row in metrics("run")] == [1, 2]


def test_a_finished_run_can_be_resumed_with_more_steps(here):
    train(quick("whole", max_steps=3))
    train(quick("run", max_steps=1))
    train(quick("run", max_steps=3, resume_from_checkpoint=True))
    assert_same_run("whole", "run", 3)


def test_a_run_without_a_checkpoint_yet_is_resumed_from_its_start(here):
    train(quick("whole"))
    train(quick("run", max_steps=1))
    for path in Path("run/checkpoints").iterdir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    train(quick("run", resume_from_checkpoint=True))
    assert_same_run("whole", "run", 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 7}, "was run with seed 42, and now seed is 7"),
        ({"num_generations": 4}, "num_generations 2, and now num_generations is 4"),
        ({"reward_funcs": ["random"]}, r"reward_funcs \['image_nsc', 'text_nsc'\]"),
        (
            {"output_dir": "absent"},
            r"absent/config.yaml cannot be read \(No such file.*\); give the folder of a run",
        ),
        ({"output_dir": "odd"}, "odd/config.yaml has no settings in it; .* restore the file"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(here, change, message):
    train(quick("run", max_steps=1))
    Path("odd").mkdir()
    Path("odd/config.yaml").write_text("- not\n- a mapping")
    before = tree(here)
    with pytest.raises(UserError, match=f"^resume_from_checkpoint: .*{message}"):
        train(quick(**{"output_dir": "run", "resume_from_checkpoint": True} | change))
    assert tree(here) == before


def test_another_accumulation_inside_a_rollout_is_an_error(here):
    settings = {"num_iterations": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    train(quick("run", **settings))
    before = tree(here)
    with pytest.raises(
        UserError, match=r"between two optimizer steps.*--gradient_accumulation_steps 2"
    ):
        train(
            quick(
                "run",
                **settings
                | {
                    "gradient_accumulation_steps": 1,
                    "per_device_train_batch_size": 2,
                    "max_steps": 2,
                },
                resume_from_checkpoint=True,
            )
        )
    assert tree(here) == before
