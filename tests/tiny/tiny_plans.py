"""A quick plan of the tiny world's commands, and what it starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import commands
import pytest
from small_runs import QUICK

from iris_fast.errors import UserError
from iris_fast.tiny import HELD_OUT_FILE, MODEL_FOLDER
from iris_fast.tiny.recipe import ablation_plan
from iris_fast.tiny.recipe.ablation_plan import Plan
from iris_fast.tiny.world import KINDS


def quick_plan(folder: Path) -> Plan:
    """One arm in two worlds, one seed, one step on two prompts, one image of each kind; everything
    is in `folder`."""
    lines = HELD_OUT_FILE.read_text().splitlines()
    one_each = {json.loads(line)["tag"]: line for line in lines}
    assert set(one_each) == set(KINDS)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(one_each.values()) + "\n")
    training_prompts = folder / "training.jsonl"
    training_prompts.write_text("\n".join(lines[:2]) + "\n")
    return Plan(
        folder=folder / "runs",
        worlds=["shipped", "kept"],
        arms=["nsc"],
        seeds=[5],
        settings=QUICK | {"max_steps": 1},
        samples=1,
        prompts=prompts,
        training_prompts=training_prompts,
        jobs=1,
    )


def record_commands(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands in the order they were run, each in a forked process; a control's model is a
    copy of the package's. A command fails if its log is named by an entry `broken LOG`."""
    names: list[str] = []

    def run_command(command: list[str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        place = str(log.relative_to(plan.folder).with_suffix(""))
        if f"broken {place}" in names:
            raise UserError("broken")
        name = command[0].rpartition(".")[2]
        names.append(f"{name} {place}")
        if name == "pretrain":
            shutil.copytree(MODEL_FOLDER, command[command.index("--target") + 1])
            return
        done = commands.run(*command, cwd=plan.folder)
        assert done.code == 0, done.err

    monkeypatch.setattr(ablation_plan, "run_command", run_command)
    return names
