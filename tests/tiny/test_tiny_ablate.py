"""The ablation command: which runs it starts, and what it collects."""

import dataclasses
import json
from pathlib import Path
from xml.etree import ElementTree

import commands
import pytest

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


def test_finished_runs_are_not_repeated(plan, called):
    called.append("broken kept/model")
    results = ablate.ablate(plan)
    before = "before-cot_true-cfg_5-x1"
    assert called[1:] == [
        f"measure shipped/{before}", "generate shipped/alignment-5", "train shipped/nsc-5",
        "measure shipped/nsc-5/held_out-x1",
    ]  # fmt: skip
    assert results["failed"] == {"kept/model": "broken"}
    text = (plan.folder / "ablation.md").read_text()
    assert "- kept/model: broken" in text
    assert "\n- kept: nsc-5, sc-5, " in text

    called.clear()
    constant = dataclasses.replace(plan, worlds=["kept"], arms=["constant"])
    results = ablate.ablate(constant)
    assert results["failed"] == {}
    assert called == [
        "pretrain kept/model", f"measure kept/{before}", "generate kept/alignment-5",
        "train kept/constant-5",
    ]  # fmt: skip

    called.clear()
    assert ablate.ablate(dataclasses.replace(plan, worlds=["shipped"])) == results
    assert called == []
    assert json.loads((plan.folder / "results.json").read_text()) == results
    trained = results["worlds"]["shipped"]["arms"]["nsc"]["after"]["5"]
    assert {*MEASURES, "kl"} <= set(trained)
    assert not trained["unchanged"]
    arm = results["worlds"]["kept"]["arms"]["constant"]
    assert arm["after"]["5"] == arm["before"] | {"kl": 0.0, "unchanged": True}
    assert arm["before"]["images"] == 6
    assert {"kept/nsc-5", "kept/sc-5", "busy/nsc-5"} <= set(results["not_run"])
    assert {"shipped/nsc-5", "kept/constant-5"}.isdisjoint(results["not_run"])
    ElementTree.parse(plan.folder / "ablation.svg")


def test_an_interrupted_training_run_is_resumed(plan, called):
    run = Run(plan, "shipped", "nsc", 5)
    run.train()
    (run.folder / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="nsc-5 was interrupted; run the same command"):
        run.train()
    assert called == ["train shipped/nsc-5"] * 2


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
    assert {arm for _, arm in PAPER} < {INITIAL, *ARMS}
    assert {measure for measure, _ in PAPER} == set(MEASURES)


def test_the_most_important_runs_come_first(tmp_path):
    runs = Plan(tmp_path).runs()
    early = [run for run in runs if run.arm in FIRST]
    assert runs[: len(early)] == early
    assert [run.seed for run in early] == sorted(run.seed for run in early)
    assert [run.seed for run in runs if run.arm == ONE_SEED] == [11] * len(WORLDS)


def test_the_alignment_of_an_arm_is_that_of_its_weighted_sum(tmp_path):
    """Two groups of three; NSC of the image orders the first as the verifier, the second against
    it but for a tie, and twice as strongly in the text."""
    values = {name: [[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]] for name in TERMS}
    values |= {"text_nsc": [[0.0, -2.0, -4.0], [4.0, 4.0, 4.0]], "random": [[0.0] * 3] * 2}
    values |= {METRIC: [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]}
    path = tmp_path / "alignment.json"
    path.write_text(json.dumps({"values": values, "images_per_prompt": 3, "seed": 11, "cot": True}))
    found = read_alignments(Plan(tmp_path), "shipped", path)
    strong = 3**0.5 / 2  # Spearman's correlation of 0 1 2 with 0 0 1
    assert found["terms"]["image_nsc"]["value"] == pytest.approx(0)
    assert found["terms"]["random"] == {"value": None, "standard_error": None, "groups": 0}
    arms = found["arms"]
    assert arms["nsc"]["value"] == pytest.approx(-strong)
    assert arms["sc"]["value"] == pytest.approx(strong)
    assert arms["image_nsc_text_sc"]["value"] == pytest.approx(0)
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
    assert last.startswith("84 runs to do")
    assert int(last.partition("about ")[2].split()[0]) < 120
