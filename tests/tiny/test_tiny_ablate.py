"""The ablation command: which runs it starts, and what it collects."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import commands
import pytest
from tiny_plans import quick_plan, record_commands

from iris_fast.config import to_yaml
from iris_fast.errors import UserError
from iris_fast.tiny.recipe import ablate
from iris_fast.tiny.recipe.ablation_page import INITIAL, MEASURES, PAPER
from iris_fast.tiny.recipe.ablation_plan import (
    ARMS,
    FIRST,
    METRIC,
    ONE_SEED,
    TERMS,
    Plan,
    Run,
    run_command,
)
from iris_fast.tiny.recipe.ablation_results import read_alignments
from iris_fast.tiny.world import WORLDS

BEFORE = "before-cot_true-cfg_5-x1"


class Call(NamedTuple):
    """What one call of `ablate` started and returned, and its page."""

    called: list[str]
    results: dict[str, Any]
    page: str


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, list[Call]]:
    """Two arms in two worlds by three calls: in the first a model fails, in the second the runs
    that need it, the third asks for the world that is complete. Tests only read it."""
    plan = dataclasses.replace(
        quick_plan(tmp_path_factory.mktemp("ablation")), arms=["nsc", "constant"]
    )
    calls = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        called = record_commands(plan, monkeypatch)
        for broken, worlds in (
            (["kept/model"], plan.worlds),
            (["kept/alignment-5", "kept/nsc-5", "kept/constant-5"], plan.worlds),
            ([], ["shipped"]),
        ):
            called[:] = [f"broken {name}" for name in broken]
            results = ablate.ablate(dataclasses.replace(plan, worlds=worlds))
            text = (plan.folder / "ablation.md").read_text(encoding="utf-8")
            calls.append(Call(called[len(broken) :], results, text))
    return plan, calls


def test_finished_runs_are_not_repeated(ablation):
    plan, (first, second, third) = ablation
    assert first.called == [
        f"measure shipped/{BEFORE}", "generate shipped/alignment-5", "train shipped/nsc-5",
        "measure shipped/nsc-5/held_out-x1", "train shipped/constant-5",
    ]  # fmt: skip
    assert second.called == ["pretrain kept/model", f"measure kept/{BEFORE}"]
    assert third.called == []
    assert json.loads((plan.folder / "results.json").read_text()) == third.results
    assert third.results == second.results | {"failed": {}}


def test_a_failed_command_does_not_stop_the_others(ablation):
    _, (first, second, _) = ablation
    assert first.results["failed"] == {"kept/model": "broken"}
    assert "- kept/model: broken" in first.page
    assert "\n- kept: nsc-5, sc-5, " in first.page
    assert {name.partition("/")[2] for name in second.results["failed"]} >= {"nsc-5", "constant-5"}
    assert "- kept/nsc-5: broken" in second.page
    missing = second.results["not_run"]
    assert {"kept/nsc-5", "kept/constant-5", "busy/nsc-5", "shipped/sc-5"} <= set(missing)
    assert {"shipped/nsc-5", "shipped/constant-5"}.isdisjoint(missing)


def test_results_hold_every_measurement(ablation):
    plan, (*_, last) = ablation
    arms = last.results["worlds"]["shipped"]["arms"]
    trained = arms["nsc"]["after"]["5"]
    assert {*MEASURES, "kl"} <= set(trained)
    assert not trained["unchanged"]
    before = arms["constant"]["before"]
    assert before["images"] == 6
    assert arms["constant"]["after"]["5"] == before | {"kl": 0.0, "unchanged": True}
    # Its model is a copy here, and the random numbers are the same.
    assert last.results["worlds"]["kept"]["arms"]["nsc"]["before"] == before
    ElementTree.parse(plan.folder / "ablation.svg")


def test_an_interrupted_training_run_is_resumed(ablation, tmp_path, monkeypatch):
    shared, _ = ablation
    plan = dataclasses.replace(shared, folder=tmp_path / "runs")
    run = Run(plan, "shipped", "nsc", 5)
    shutil.copytree(Run(shared, "shipped", "nsc", 5).folder, run.folder)
    (run.folder / "metrics.jsonl").write_text("")
    called = record_commands(plan, monkeypatch)
    # A run that is started anew refuses a folder that is not empty.
    with pytest.raises(UserError, match="nsc-5 was interrupted; run the same command"):
        run.train()
    assert called == ["train shipped/nsc-5"]


def test_runs_with_other_settings_are_an_error(plan):
    run = Run(plan, "shipped", "nsc", 5)
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(to_yaml(run.config))
    plan.check()
    other = dataclasses.replace(plan, settings=plan.settings | {"max_steps": 2}, worlds=["kept"])
    with pytest.raises(UserError, match="nsc-5 has max_steps 1, this command max_steps 2"):
        other.check()


def test_runs_of_another_model_are_an_error(plan):
    plan.check()
    plan.check()
    (plan.folder / "model.sha256").write_text("0\n")
    with pytest.raises(UserError, match="has runs of another tiny model; give another --runs"):
        plan.check()


def test_a_failed_command_is_reported_with_its_last_line(tmp_path):
    with pytest.raises(
        UserError, match=r"iris_fast\.train exited with 2: .*did you mean max_steps"
    ):
        run_command(["iris_fast.train", "--max_step=1"], tmp_path / "run.log")


def test_every_arm_is_a_valid_run_and_differs_from_the_others(tmp_path):
    runs = Plan(tmp_path).runs()
    settings = [dataclasses.replace(run.config, output_dir=None, seed=0) for run in runs]
    assert len(settings) == len(WORLDS) * (3 * (len(ARMS) - 1) + 1)
    assert len({str(config) for config in settings}) == len(WORLDS) * len(ARMS)
    assert {arm for _, *pair in PAPER for arm in pair} < {INITIAL, *ARMS}
    assert {measure for measure, *_ in PAPER} == set(MEASURES)


def test_the_most_important_runs_come_first(tmp_path):
    runs = Plan(tmp_path).runs()
    early = [run for run in runs if run.arm in FIRST]
    assert runs[: len(early)] == early
    assert [run.seed for run in early] == sorted(run.seed for run in early)
    assert [run.seed for run in runs if run.arm == ONE_SEED] == [11] * len(WORLDS)


def test_the_alignment_of_an_arm_is_that_of_its_weighted_sum(tmp_path):
    """Two groups of three. NSC of the image orders both as the verifier does but for a tie; NSC of
    the text the first against it, twice as strongly, and the second not at all."""
    values = {name: [[0.0, 1.0, 2.0]] * 2 for name in TERMS}
    values |= {"text_nsc": [[0.0, -2.0, -4.0], [4.0, 4.0, 4.0]], "random": [[0.0] * 3] * 2}
    values |= {METRIC: [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]}
    path = tmp_path / "alignment.json"
    path.write_text(json.dumps({"values": values, "images_per_prompt": 3, "seed": 11, "cot": True}))
    found = read_alignments(Plan(tmp_path), "shipped", path)
    strong = 3**0.5 / 2  # Spearman's correlation of 0 1 2 with 0 0 1
    assert found["terms"]["image_nsc"]["value"] == pytest.approx(strong)
    assert found["terms"]["random"] == {"value": None, "standard_error": None, "groups": 0}
    arms = found["arms"]
    assert arms["nsc"]["value"] == pytest.approx(strong)
    assert arms["sc"]["value"] == pytest.approx(-strong)
    assert arms["image_nsc_text_nsc"]["value"] == pytest.approx(0)
    assert arms["image_nsc_text_sc"]["value"] == pytest.approx(strong)
    assert arms["image_sc_text_nsc"]["value"] == pytest.approx(-strong)
    # Other images, no intrinsic reward, or no selection.
    assert {"no_cot", "verifier", "constant", "direct"}.isdisjoint(arms)


def test_a_dry_run_lists_the_runs(tmp_path):
    words = ("--runs", "there", "--worlds", "kept", "--arms", "sc", "--seeds", "3")
    done = commands.run("iris_fast.tiny.recipe.ablate", *words, "--dry_run", "true", cwd=tmp_path)
    assert done.code == 0, done.err
    first, last = done.out.splitlines()
    assert first.split()[:3] == ["kept/sc-3", "to", "do"]
    assert last.startswith("1 runs to do, about ")
    assert not (tmp_path / "there").exists()
    done = commands.run("iris_fast.tiny.recipe.ablate", "--jobs", "0", cwd=tmp_path)
    assert "jobs: 0 is not valid; give 1 or more" in done.error_line


def test_a_full_ablation_is_estimated_below_two_hours(tmp_path, capsys):
    ablate.print_plan(Plan(Path(tmp_path)))
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("93 runs to do")
    assert int(last.partition("about ")[2].split()[0]) < 120
