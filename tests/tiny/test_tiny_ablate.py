"""The ablation command: which runs it starts, and the page and figure of its results."""

import dataclasses
import json
from pathlib import Path
from xml.etree import ElementTree

import commands
import pytest
from small_runs import QUICK

from iris_fast.errors import UserError
from iris_fast.tiny import HELD_OUT_FILE
from iris_fast.tiny.recipe import ablate
from iris_fast.tiny.recipe.ablate import ARMS, Plan, Run
from iris_fast.tiny.recipe.ablation_page import (
    INITIAL,
    MEASURES,
    PAPER,
    comparison,
    figure,
    mean_and_std,
    page,
    verdict,
)
from iris_fast.tiny.world import KINDS


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Two arms, one seed, one step, one image of each kind."""
    lines = HELD_OUT_FILE.read_text().splitlines()
    one_each = {json.loads(line)["tag"]: line for line in lines}
    assert set(one_each) == set(KINDS)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(one_each.values()) + "\n")
    arms = {name: ARMS[name] for name in ("nsc", "constant")}
    settings = QUICK | {"max_steps": 1}
    return Plan(tmp_path / "runs", arms, [5], settings, samples=1, prompts=prompts, jobs=1)


@pytest.fixture
def called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands in the order they were run, each in a forked process. A command fails if its log
    is named by an entry `broken LOG`."""
    names: list[str] = []

    def run_command(command: list[str], log: Path) -> None:
        if f"broken {log.stem}" in names:
            raise UserError("broken")
        names.append(f"{command[0].rpartition('.')[2]} {log.stem}")
        done = commands.run(*command, cwd=tmp_path)
        assert done.code == 0, done.err

    monkeypatch.setattr(ablate, "run_command", run_command)
    return names


def test_finished_runs_are_not_repeated(plan, called):
    called.append("broken constant-5")
    results = ablate.ablate(plan)
    before = "measure before-cot_true-cfg_5-x1"
    assert called[1:] == [before, "train nsc-5", "measure held_out-x1"]
    assert results["failed"] == {"constant-5": "broken"}
    assert "- constant-5: broken" in (plan.folder / "ablation.md").read_text()

    called.clear()
    assert ablate.ablate(plan)["failed"] == {}
    assert called == ["train constant-5", "measure held_out-x1"]

    called.clear()
    results = ablate.ablate(plan)
    assert called == []
    assert json.loads((plan.folder / "results.json").read_text()) == results
    for arm in results["arms"].values():
        assert set(MEASURES) <= set(arm["after"]["5"])
        assert arm["before"]["images"] == 6
    lines = (plan.folder / "ablation.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ")] == [
        "| arm", "| initial model, sampled as nsc", "| nsc", "| constant",
        "| nsc minus", "| initial model", "| constant",
    ]  # fmt: skip
    ElementTree.parse(plan.folder / "ablation.svg")


def test_an_interrupted_training_run_is_resumed(plan, called):
    (run,) = [run for run in plan.runs() if run.arm == "nsc"]
    run.train()
    (run.folder / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="nsc-5 was interrupted; run the same command"):
        run.train()
    assert called == ["train nsc-5", "train nsc-5"]


def test_runs_with_other_settings_are_an_error(plan, called):
    Run(plan, "nsc", 5).train()
    other = dataclasses.replace(plan, settings=plan.settings | {"max_steps": 2})
    with pytest.raises(UserError, match="nsc-5 has max_steps 1, this command max_steps 2"):
        ablate.ablate(other)


def test_a_failed_command_is_reported_with_its_last_line(tmp_path):
    with pytest.raises(
        UserError, match=r"iris_fast\.train exited with 2: .*did you mean max_steps"
    ):
        ablate.run_command(["iris_fast.train", "--max_step=1"], tmp_path / "run.log")


def test_every_arm_is_a_valid_run_and_differs_from_the_others(tmp_path):
    plan = Plan(tmp_path)
    settings = [dataclasses.replace(run.config, output_dir=None, seed=0) for run in plan.runs()]
    assert len(settings) == 30
    assert len({str(config) for config in settings}) == len(ARMS)
    assert {arm for _, arm in PAPER} < {INITIAL, *ARMS}
    assert {measure for measure, _ in PAPER} < set(MEASURES)


def test_a_dry_run_lists_the_runs(tmp_path):
    words = ("--runs", "there", "--arms", "sc", "--seeds", "3", "--dry_run", "true")
    done = commands.run("iris_fast.tiny.recipe.ablate", *words, cwd=tmp_path)
    assert done.code == 0, done.err
    first, last = done.out.splitlines()
    assert first.split()[:3] == ["sc-3", "to", "do"]
    assert last.startswith("1 runs to do, about ")
    assert not (tmp_path / "there").exists()
    done = commands.run("iris_fast.tiny.recipe.ablate", "--jobs", "0", cwd=tmp_path)
    assert "jobs: 0 is not valid; give 1 or more" in done.error_line


def results(**accuracies: list[float]) -> dict:
    """Results of arms with these accuracies for seeds 0, 1, ...; all other measures are 0."""
    arms = {
        name: {
            "settings": {},
            "before": dict.fromkeys(MEASURES, 0.0) | {"mean": 0.4},
            "after": {
                str(seed): dict.fromkeys(MEASURES, 0.0) | {"mean": mean}
                for seed, mean in enumerate(means)
            },
        }
        for name, means in accuracies.items()
    }
    rest = {"commit": "c", "hardware": "h", "steps": 1, "pictures": 6, "failed": {}}
    return {"seeds": [0, 1, 2], "arms": arms, **rest}


def test_differences_are_per_seed_and_their_signs_decide():
    shown = comparison(results(nsc=[0.5, 0.6, 0.7], sc=[0.4, 0.5, 0.6], direct=[0.6, 0.7]))
    lines = [line for line in shown.splitlines() if " accuracy " in line]
    rows = {line.split(" | ")[0].strip("| "): line for line in lines}
    assert "| 0.100 ± 0.000 |" in rows["sc"]
    assert rows["sc"].endswith("| agrees |")
    assert "| -0.100 ± 0.000 |" in rows["direct"]
    assert rows["direct"].endswith("| disagrees |")
    assert "| 0.200 ± 0.100 |" in rows["initial model"]
    assert verdict([0.1, -0.1]) == verdict([]) == "undecided"
    assert [mean_and_std([]), mean_and_std([0.25])] == ["", "0.250"]


def test_arms_without_a_finished_run_have_empty_cells():
    without = results(nsc=[], sc=[0.5])
    assert "| nsc |  |" in page(without)
    svg = figure(without)
    ElementTree.fromstring(svg)
    assert svg.count("<circle") == len(MEASURES)


def test_the_committed_page_and_figure_show_the_committed_results():
    folder = HELD_OUT_FILE.parent / "recipe" / "ablation"
    committed = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert page(committed) == (folder / "ablation.md").read_text(encoding="utf-8")
    assert figure(committed) == (folder / "ablation.svg").read_text(encoding="utf-8")
    assert all(len(arm["after"]) == 3 for arm in committed["arms"].values())
