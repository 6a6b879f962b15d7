"""`reward_alignment`: rank correlations of rewards and metrics within groups, and their report."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from commands import run
from small_runs import flags, metrics, quick, tree

from iris_fast.config import GenerateConfig
from iris_fast.errors import UserError
from iris_fast.generate import generate, main
from iris_fast.rewards.alignment import (
    MIN_GROUPS,
    Alignment,
    align,
    alignment_metrics,
    alignment_warnings,
    group_correlations,
    pooled_alignments,
)
from iris_fast.run.log import read_metrics
from iris_fast.train import train

GENERATOR = torch.Generator().manual_seed(3)


@pytest.mark.parametrize("group", [2, 3, 8])
def test_correlations_are_those_of_scipy_with_ties(group):
    left = torch.randn(40 * group, generator=GENERATOR)
    right = torch.randint(3, (40 * group,), generator=GENERATOR).float()
    found = group_correlations(left, right, group).tolist()
    pairs = zip(left.view(-1, group), right.view(-1, group), strict=True)
    varied = [(a, b) for a, b in pairs if len(set(a.tolist())) > 1 < len(set(b.tolist()))]
    assert 0 < len(varied) < 40 or group == 8
    expected = [scipy.stats.spearmanr(a, b).statistic for a, b in varied]
    assert found == pytest.approx(expected, abs=1e-12)


def test_correlations_by_hand():
    """Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4; and their mirror image."""
    left = torch.tensor([0.0, 5.0, 5.0, 9.0, 9.0, 5.0, 5.0, 0.0])
    right = torch.tensor([1.0, 2.0, 3.0, 4.0] * 2)
    assert group_correlations(left, right, 4).tolist() == pytest.approx([0.9**0.5, -(0.9**0.5)])


def test_groups_without_variation_in_either_are_left_out():
    left = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    right = torch.tensor([0.0, 1.0, 2.0, 2.0, 3.0, 4.0])
    assert group_correlations(left, right, 2).tolist() == [1.0]
    nothing = group_correlations(left, torch.ones(6), 2)
    assert nothing.shape == (0,)


def test_an_infinite_reward_has_the_last_rank():
    left = torch.tensor([-math.inf, -math.inf, 0.0, 1.0])
    expected = scipy.stats.spearmanr([0, 0, 1, 2], [3, 1, 2, 0]).statistic
    assert group_correlations(left, torch.tensor([3.0, 1.0, 2.0, 0.0]), 4).item() == pytest.approx(
        expected
    )


def test_an_alignment_is_a_mean_with_its_standard_error():
    values = torch.tensor([0.5, -0.25, 1.0, 0.0], dtype=torch.float64)
    found = Alignment.of(values)
    assert found.groups == 4
    assert found.value == pytest.approx(0.3125)
    assert found.standard_error == pytest.approx(np.std(values.numpy(), ddof=1) / 2)
    assert Alignment.of(values[:1]) == Alignment(0.5, None, 1)
    assert Alignment.of(values[:0]) == Alignment(None, None, 0)


def test_pooling_steps_equals_all_of_their_groups_at_once():
    """From what metrics.jsonl holds of each step alone, also steps with one group and with none."""
    values = torch.randn(30, generator=GENERATOR, dtype=torch.float64)
    rows, start = [], 0
    for step, count in enumerate((1, 0, 6, 1, 2, 20), start=1):
        part = {"r~m": Alignment.of(values[start : start + count])}
        rows.append(json.loads(json.dumps({"step": step, **alignment_metrics(part)})))
        start += count
    (pooled,) = pooled_alignments(rows).values()
    whole = Alignment.of(values)
    assert pooled.groups == 30
    assert pooled.value == pytest.approx(whole.value)
    assert pooled.standard_error == pytest.approx(whole.standard_error)


def test_steps_on_one_rollout_count_once():
    part = [{"r~m": Alignment.of(torch.tensor([0.1 * n, 0.5]))} for n in range(2)]
    rows = [
        {"step": step, **alignment_metrics(part[(step - 1) // 3])} for step in range(1, 7)
    ]  # three steps each
    pooled = pooled_alignments(rows, num_iterations=3)["r~m"]
    assert (pooled.groups, pooled.value) == (4, pytest.approx((0 + 0.5 + 0.1 + 0.5) / 4))


def test_rows_without_alignments_are_passed_over():
    assert pooled_alignments([{"step": 1}, {"step": 2, "reward": 1.0}]) == {}


def test_every_term_and_the_total_are_compared_with_every_metric():
    terms = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([3.0, 2.0, 1.0])}
    measured = {"m": torch.tensor([1.0, 2.0, 4.0]), "n": torch.tensor([1.0, 1.0, 1.0])}
    found = align(terms, -terms["a"], measured, group=3)
    assert {name: alignment.value for name, alignment in found.items()} == {
        "reward~m": pytest.approx(-1), "a~m": pytest.approx(1), "b~m": pytest.approx(-1),
        "reward~n": None, "a~n": None, "b~n": None,
    }  # fmt: skip


# --- Warnings -------------------------------------------------------------------------------------


def test_a_reward_that_is_clearly_against_a_metric_gives_a_warning():
    clear = Alignment(-0.2, 0.099, MIN_GROUPS)
    (warning,) = alignment_warnings({"reward~m": clear, "reward~n": clear._replace(value=0.2)})
    assert warning == "reward against m"
    text = alignment_warnings({"reward~m": clear})[warning]
    for part in ("-0.20 ± 0.10", f"{MIN_GROUPS} groups", "m"):
        assert part in text


@pytest.mark.parametrize(
    "alignment",
    [
        Alignment(-0.2, 0.1, 100),  # exactly two standard errors
        Alignment(-1.0, 0.0, MIN_GROUPS - 1),  # too few groups for a standard error
        Alignment(-1.0, None, 1),
        Alignment(None, None, 0),
        Alignment(0.5, 0.01, 100),
    ],
)
def test_an_alignment_that_is_not_clearly_negative_gives_none(alignment):
    assert alignment_warnings({"reward~m": alignment}) == {}


def test_a_term_that_is_minimised_gives_no_warning():
    """The total decides: its sign includes the weights."""
    against = Alignment(-0.5, 0.01, 100)
    good = {"reward~m": against._replace(value=0.5), "image_nsc~m": against}
    assert alignment_warnings(good) == {}


# --- Training -------------------------------------------------------------------------------------

REWARDS = """
def _redness(images):
    return [float(image.resize((1, 1)).getpixel((0, 0))[0]) for image in images]

def red(prompts, images):
    return [float(i) for i in range(len(images))]

def same(prompts, images):
    return red(prompts, images)

def opposite(prompts, images):
    return [-value for value in red(prompts, images)]

def flat(prompts, images):
    return [1.0 for _ in images]
"""


@pytest.fixture
def graded(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (here / "graded.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(here)
    return here


SETTINGS = {
    "reward_funcs": ["graded:red"],
    "metric_funcs": ["graded:same", "graded:opposite", "graded:flat"],
    "num_generations": 3,
    "per_device_train_batch_size": 4,
}


def test_every_step_logs_the_alignment_of_its_groups(graded):
    train(quick("run", **SETTINGS))
    for row in metrics("run"):
        for reward in ("reward", "graded:red"):
            assert row[f"reward_alignment/{reward}~graded:same"] == pytest.approx(1)
            assert row[f"reward_alignment_se/{reward}~graded:same"] == pytest.approx(0, abs=1e-9)
            assert row[f"reward_alignment_groups/{reward}~graded:same"] == 4
            assert row[f"reward_alignment/{reward}~graded:opposite"] == pytest.approx(-1)
            assert row[f"reward_alignment_groups/{reward}~graded:flat"] == 0
            assert f"reward_alignment/{reward}~graded:flat" not in row


def test_the_console_and_the_report_show_the_pooled_alignment_and_warn(graded):
    listed = {name: f"[{', '.join(v)}]" for name, v in SETTINGS.items() if isinstance(v, list)}
    samples = {"sample_steps": 3, "num_sample_prompts": 1}
    words = flags(**SETTINGS | listed | samples, max_steps=4, output_dir="run")
    finished = run("iris_fast.train", *words, cwd=graded)
    assert (finished.code, finished.err) == (0, "")
    lines = [line for line in finished.out.splitlines() if line.startswith("alignment with")]
    # After steps 1, 3 and 4; one term with weight 1 is the total, and is not repeated.
    assert [line for line in lines if "with graded:same" in line] == [
        f"alignment with graded:same: graded:red +1.00 ± 0.00 ({groups} groups)"
        for groups in (4, 12, 16)
    ]
    assert "alignment with graded:flat: no group varies in both" in lines
    assert finished.out.count("warning: the reward is against graded:opposite") == 1
    assert ["reward against graded:opposite" in row["warnings"] for row in metrics("run")] == [
        False, True, True, True,
    ]  # fmt: skip
    page = (graded / "run/report.html").read_text()
    for part in ("Does the reward select for the metrics?", "+1.00 ± 0.00", "-1.00 ± 0.00"):
        assert part in page
    assert page.index("Does the reward select") < page.index("<h2>Samples</h2>")
    assert "the reward is against graded:opposite" in page


def test_a_report_without_metrics_has_no_alignment(here):
    train(quick("run"))
    assert "Does the reward select" not in Path("run/report.html").read_text()


def test_ranks_log_the_same_alignment_as_one(graded):
    names = {"reward_funcs": ["image_nsc"], "metric_funcs": ["richness"]}
    train(quick("by1", **SETTINGS | names, max_steps=1))
    changes = {"per_device_train_batch_size": 2, "output_dir": "by2", "max_steps": 1}
    listed = {name: f"[{value}]" for name, (value,) in names.items()}
    words = flags(**SETTINGS | listed | changes)
    assert run("iris_fast.train", *words, cwd=graded, ranks=2).codes == [0, 0]
    for name in ("reward_alignment", "reward_alignment_se", "reward_alignment_groups"):
        key = f"{name}/image_nsc~richness"
        one, two = (metrics(graded / f"by{count}")[0][key] for count in (1, 2))
        assert one == pytest.approx(two), key


# --- Without training -----------------------------------------------------------------------------


@pytest.fixture
def two_prompts(here: Path) -> Path:
    (here / "p.txt").write_text("a red cube\ntwo yellow pyramids\na small blue ball\n")
    return here


def asked(folder: str, **changes) -> GenerateConfig:
    settings = {
        "prompts": "p.txt",
        "output_dir": folder,
        "image_token_num_per_image": 9,
        "num_images_per_prompt": 4,
        "cfg_weight": 1.5,
        "alignment": True,
        "reward_funcs": ["image_nsc", "image_entropy"],
        "metric_funcs": ["richness", "diversity"],
    }
    return GenerateConfig(**settings | changes)


def test_generate_writes_and_prints_the_table(two_prompts, capsys):
    assert main(asked("out")) == 0
    out = capsys.readouterr().out
    written = json.loads(Path("out/alignment.json").read_text())
    names = [
        f"{a}~{b}"
        for b, a in itertools.product(
            ("richness", "diversity"), ("reward", "image_nsc", "image_entropy")
        )
    ]
    assert list(written["alignment"]) == names
    values = {name: torch.tensor(table) for name, table in written["values"].items()}
    assert values["reward"].shape == (3, 4)
    assert torch.allclose(values["reward"], values["image_nsc"] + values["image_entropy"])
    for name, found in written["alignment"].items():
        left, right = (values[part].flatten() for part in name.split("~"))
        expected = Alignment.of(group_correlations(left, right, 4))
        assert found == expected._asdict()
        assert f"{expected.value:+.2f} ± {expected.standard_error:.2f}" in out
    assert (written["prompts"], written["images_per_prompt"]) == (3, 4)
    assert len(list(Path("out").glob("*.png"))) == 12


def test_the_table_does_not_depend_on_batches_or_ranks(two_prompts):
    generate(asked("whole", batch_size=16))
    generate(asked("small", batch_size=3))
    words = ["--prompts", "p.txt", "--image_token_num_per_image", "9", "--alignment", "true"]
    words += ["--num_images_per_prompt", "4", "--metric_funcs", "[richness, diversity]"]
    words += ["--reward_funcs", "[image_nsc, image_entropy]", "--cfg_weight", "1.5"]
    words += ["--output_dir", "ranks", "--batch_size", "5"]
    finished = run("iris_fast.generate", *words, cwd=two_prompts, ranks=2)
    assert (finished.codes, finished.err) == ([0, 0], "")
    whole = json.loads((two_prompts / "whole/alignment.json").read_text())
    for folder in ("small", "ranks"):
        other = json.loads((two_prompts / folder / "alignment.json").read_text())
        assert other["alignment"].keys() == whole["alignment"].keys()
        for name, table in whole["values"].items():
            assert np.allclose(other["values"][name], table, rtol=1e-5), name


def test_the_images_are_those_of_generate_without_alignment(two_prompts):
    generate(asked("with"))
    generate(asked("without", alignment=False))
    files = tree(Path("with"))
    del files["alignment.json"]
    assert files == tree(Path("without"))


def test_alignment_samples_eight_images_unless_told_otherwise():
    assert GenerateConfig().num_images_per_prompt == 1
    assert GenerateConfig(alignment=True).num_images_per_prompt == 8
    assert GenerateConfig(alignment=True, num_images_per_prompt=3).num_images_per_prompt == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images_per_prompt": 1}, "num_images_per_prompt: 1 is not valid; .*images of one pr"),
        ({"metric_funcs": []}, "metric_funcs: .*name at least one"),
        ({"metric_funcs": None}, "metric_funcs: .*name at least one"),  # of p.txt none is known
        ({"reward_funcs": ["text_nsc"]}, "text_nsc needs a chain of thought"),
        ({"temperature": 0.0}, "alignment: .*equal images"),
        ({"greedy": True}, "alignment: .*equal images"),
    ],
)
def test_settings_with_which_there_is_no_alignment_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        asked("out", **changes)


def test_an_unknown_reward_stops_generate_before_it_samples(two_prompts, capsys):
    assert main(asked("out", reward_funcs=["nope"])) == 2
    assert "there is no reward 'nope'" in capsys.readouterr().err
    assert not Path("out").exists()


def test_an_existing_table_is_not_overwritten(two_prompts, capsys):
    Path("out").mkdir()
    Path("out/alignment.json").write_text("mine")
    assert main(asked("out")) == 2
    assert "alignment.json exists already" in capsys.readouterr().err
    assert Path("out/alignment.json").read_text() == "mine"


def test_a_training_row_and_generate_agree_on_the_default_model(here):
    """The same prompts, seed and sample numbers give the same images and the same table."""
    (here / "p.txt").write_text("a red cube\n")
    shared = {"prompts": "p.txt", "image_token_num_per_image": 9, "seed": 5, "cfg_weight": 1.5}
    shared |= {"metric_funcs": ["richness"], "reward_funcs": ["image_nsc"], "cot": False}
    train(quick("run", **shared, num_generations=6, max_steps=1))
    generate(asked("out", **shared, num_images_per_prompt=6))
    (row,) = read_metrics(here / "run/metrics.jsonl")
    found = json.loads((here / "out/alignment.json").read_text())["alignment"]
    key = "image_nsc~richness"
    assert found[key]["value"] == pytest.approx(row[f"reward_alignment/{key}"])
