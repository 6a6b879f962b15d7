"""Accuracy over KL: which checkpoints are measured, and the limit that follows."""

import dataclasses
import json
from xml.etree import ElementTree

import commands
import pytest

from iris_fast.tiny.recipe import goodhart
from iris_fast.tiny.recipe.ablation_plan import Run
from iris_fast.tiny.recipe.goodhart_page import conclusion, describe, figure, page, peak


@pytest.fixture
def long_plan(plan):
    """One reward, two checkpoints."""
    settings = plan.settings | {"max_steps": 2, "save_steps": 1, "save_total_limit": 99}
    return dataclasses.replace(plan, worlds=["shipped"], settings=settings)


def test_every_checkpoint_is_measured_once(long_plan, called):
    called.append("broken shipped/nsc-5/held_out-x1-step_00001")
    assert goodhart.goodhart(long_plan)["failed"] == {"shipped/nsc-5": "broken"}
    measured = "measure shipped/nsc-5/held_out-x1-step_0000"
    assert called[1:] == [
        "measure shipped/before-cot_true-cfg_5-x1", "train shipped/nsc-5", f"{measured}2",
    ]  # fmt: skip

    called.clear()
    results = goodhart.goodhart(long_plan)
    assert results["failed"] == {}
    assert called == [f"{measured}1"]
    points = results["rewards"]["nsc"]["5"]
    assert [point["step"] for point in points] == [0, 1, 2]
    rows = Run(long_plan, "shipped", "nsc", 5).rows
    assert points[0]["kl"] == 0
    assert points[2]["kl"] == pytest.approx((rows[0]["kl"] + rows[1]["kl"]) / 2)
    assert len({point["image_nsc"] for point in points}) == 3

    called.clear()
    assert goodhart.goodhart(long_plan) == results
    assert called == []
    assert json.loads((long_plan.folder / "goodhart.json").read_text()) == results
    ElementTree.parse(long_plan.folder / "goodhart.svg")


def curve(*means: float) -> list[dict]:
    """Accuracies of 880 images at KL 0, 0.01, 0.02, 0.04, ..."""
    return [
        {"step": 20 * i, "kl": 0.01 * 2 ** (i - 1) if i else 0.0, "images": 880, "mean": mean}
        for i, mean in enumerate(means)
    ]


def test_the_limit_is_the_kl_of_the_highest_accuracy():
    falls, later = curve(0.35, 0.45, 0.5, 0.2, 0.04), curve(0.35, 0.4, 0.45, 0.5, 0.3)
    assert peak(falls)["step"] == 40
    found = conclusion("nsc", {"1": falls})
    assert found == (
        "nsc: accuracy is highest at KL 0.02 and clearly lower at the end of 1 of 1 runs: "
        "`--max_kl 0.02`."
    )
    assert "of 2 of 2 runs: `--max_kl 0.02`" in conclusion("nsc", {"1": later, "2": falls})
    assert describe(falls) == (
        "Accuracy 0.350 before training, highest after step 40 with 0.500 ± 0.017 at KL 0.02, "
        "after step 80 0.040 at KL 0.08"
    )


def test_without_a_clear_rise_and_fall_there_is_no_limit():
    rises = conclusion("verifier", {"1": curve(0.35, 0.45, 0.55, 0.54)})
    assert rises == (
        "verifier: accuracy does not fall clearly up to KL 0.04, the end of the runs: no limit "
        "follows."
    )
    worse = conclusion("sc", {"1": curve(0.35, 0.36, 0.2)})
    assert worse == "sc: no checkpoint of 1 runs is clearly better than the initial model."
    assert conclusion("nsc", {"1": curve(0.35)}).startswith("nsc: no checkpoint of 0 runs")


def test_page_and_figure_show_all_runs():
    rewards = {
        "nsc": {"1": curve(0.3, 0.5, 0.2), "2": curve(0.3)},
        "verifier": {"1": curve(0.3, 0.6)},
    }
    found = {"commit": "c", "hardware": "h", "steps": 40, "rewards": rewards, "failed": {"x": "y"}}
    text = page(found)
    assert "`--max_kl 0.01`" in text
    assert "## nsc, seed 2\n\nAccuracy 0.300 before training.\n" in text
    assert "| 40 | 0.02 | 0.200 ± 0.013 |  |  |" in text
    assert "- x: y\n" in text
    svg = figure(found)
    ElementTree.fromstring(svg)
    assert svg.count("<circle") == 3
    ElementTree.fromstring(figure(found | {"rewards": {}}))


def test_the_command_lists_its_runs_and_refuses_a_checkpoint_without_a_run(tmp_path):
    words = ("--runs", "there", "--max_steps", "50", "--dry_run", "true")
    done = commands.run("iris_fast.tiny.recipe.goodhart", *words, cwd=tmp_path)
    assert done.code == 0, done.err
    first, *_, last = done.out.splitlines()
    assert first.split() == ["shipped/nsc-21", "50", "steps,", "3", "checkpoints"]
    assert last.startswith("2 runs, from nothing about ")
    assert not (tmp_path / "there").exists()
    words = ("--checkpoint", "step_00001")
    done = commands.run("iris_fast.tiny.recipe.measure", *words, cwd=tmp_path)
    assert done.error_line.endswith("step_00001 is not valid; it is one of a run: add --run FOLDER")
