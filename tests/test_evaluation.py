"""Held-out prompts before and after training: standard errors, resuming, signals, ranks."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from small_runs import assert_same_run, checkpoints, flags, metrics, open_run, quick, tree

from iris_fast.cli import parse
from iris_fast.config import TrainConfig
from iris_fast.errors import UserError
from iris_fast.records import Rollout
from iris_fast.rollout.sampler import Sampler
from iris_fast.run.evaluation import (
    FIRST_NUMBER,
    Comparison,
    Evaluation,
    HeldOut,
    Mean,
    compare,
    read_evaluations,
)
from iris_fast.train import train

HELD_OUT = "a green ring\ntwo red balls\na blue cone\n"
FUNCTIONS = """
import os, random, signal
calls, stop_at, seen = [], [], []
def metric(prompts, images):
    calls.append(1)
    if len(calls) in stop_at:
        os.kill(os.getpid(), signal.SIGTERM)
    random.random()
    return [sum(image.resize((1, 1)).getpixel((0, 0))) / 765 for image in images]
def reward(prompts, images):
    return [random.random() for _ in prompts]
def needs_field(prompts, images, include):
    return [1.0] * len(prompts)
"""


@pytest.fixture
def settings(prompts, monkeypatch) -> dict[str, Any]:
    """A quick run with three held-out prompts, two images each."""
    Path("held_out.txt").write_text(HELD_OUT)
    Path("functions.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.delitem(sys.modules, "functions", raising=False)
    return {
        "prompts": prompts,
        "eval_prompts": "held_out.txt",
        "num_generations_eval": 2,
        "metric_funcs": ["functions:metric"],
    }


def steps(folder: str = "run") -> list[int]:
    return [found.step for found in read_evaluations(Path(folder) / "eval")]


def evaluation(step: int, values: list[float], per_prompt: int = 2) -> Evaluation:
    prompts = [f"prompt {n}" for n in range(len(values) // per_prompt)]
    return Evaluation(step, prompts, per_prompt, {"m": values})


# --- Standard errors ------------------------------------------------------------------------------


def test_a_mean_and_its_standard_error_by_hand():
    """Means of the prompts 1, 1/2, 0: deviations 1/2, 0, -1/2, variance 1/4."""
    found = evaluation(0, [1.0, 1.0, 0.0, 1.0, 0.0, 0.0]).mean("m")
    assert found.value == pytest.approx(0.5)
    assert found.standard_error == pytest.approx(0.5 / math.sqrt(3))
    assert found.text() == "0.500 ± 0.289"


def test_the_standard_error_of_a_difference_is_paired_by_hand():
    """Prompts' differences 1/2, 0, 1/2, 1/2: mean 3/8, variance (3 / 64 + 9 / 64) / 3 = 1/16."""
    before = evaluation(0, [0, 0, 1, 1, 0, 1, 0, 0])
    after = evaluation(9, [1, 0, 1, 1, 1, 1, 0, 1])
    found = after.difference(before, "m")
    assert found.value == pytest.approx(0.375)
    assert found.standard_error == pytest.approx(math.sqrt(1 / 16) / math.sqrt(4))
    (comparison,) = compare([before, after])
    assert str(comparison) == (
        "held-out m: 0.375 -> 0.750, difference +0.375 ± 0.125 (standard error over prompts)"
    )
    assert comparison.verdict == "higher"


def test_one_prompt_has_no_standard_error():
    found = Comparison("m", evaluation(0, [0, 1]), evaluation(1, [1, 1]))
    assert found.difference == (0.5, None)
    assert found.difference.text("+") == "+0.500 ± ?"
    assert found.verdict == "not known: one prompt"


@pytest.mark.parametrize(
    ("mean", "direction"),
    [((0.2, 0.1), 0), ((0.21, 0.1), 1), ((-0.21, 0.1), -1), ((0.0, 0.0), 0), ((0.1, 0.0), 1)],
)
def test_a_difference_counts_above_two_standard_errors(mean, direction):
    assert Mean(*mean).direction == direction


def test_only_evaluations_of_the_same_images_are_compared():
    other = Evaluation(0, ["x", "y"], 2, {"m": [0.0] * 4})
    fewer = evaluation(1, [0, 1], per_prompt=1)
    first, last = evaluation(2, [0, 0, 1, 1]), evaluation(3, [0, 1, 1, 1])
    (comparison,) = compare([other, fewer, first, last])
    assert (comparison.first.step, comparison.last.step) == (2, 3)
    assert compare([other, fewer, last]) == []
    assert compare([]) == []
    renamed = Evaluation(4, last.prompts, 2, {"n": [0.0] * 4})
    assert compare([first, renamed]) == []


# --- What is sampled ------------------------------------------------------------------------------


class Canvas:
    """Stands for the scorer: an image is its codes, and the metric their sum."""

    def __init__(self) -> None:
        self.metrics = {"m": lambda prompts, images: []}
        self.groups: list[list[str]] = []

    def decode(self, codes_NI: torch.Tensor) -> list[torch.Tensor]:
        return list(codes_NI)

    def measure(self, prompts, images) -> dict[str, torch.Tensor]:
        self.groups.append([prompt.text for prompt in prompts])
        return {"m": torch.stack(images).sum(dim=1).float()}


def held_out_of(config: TrainConfig, ranks) -> tuple[HeldOut, Canvas]:
    models, source = open_run(config, ranks)
    canvas = Canvas()
    found = HeldOut.of(source.prompts, config, models.sampler, canvas)
    assert found is not None
    return found, canvas


def test_batches_hold_no_more_samples_than_a_rollout_and_do_not_matter(prompts, ranks, monkeypatch):
    """Three prompts of three images in batches of 4, 4 and the last 4, and all at once."""
    sizes: list[int] = []
    numbers: list[int] = []
    rollout = Sampler.rollout

    def record(sampler: Sampler, samples, sample_numbers, callback) -> Rollout:
        sizes.append(len(samples))
        numbers.extend(sample_numbers)
        return rollout(sampler, samples, sample_numbers, callback)

    monkeypatch.setattr(Sampler, "rollout", record)
    found = []
    for batch in (4, 100):
        config = quick("x", prompts=prompts, num_generations_eval=3, num_generations=batch)
        held_out, canvas = held_out_of(config, ranks)
        found.append(held_out.evaluate(0, ranks, lambda: None))
    assert sizes == [4, 4, 4, 9]
    assert set(numbers) == {FIRST_NUMBER - n for n in range(9)}
    assert canvas.groups == [[prompt.text] * 3 for prompt in held_out.prompts]
    few, all_at_once = found
    assert few.metrics["m"] == all_at_once.metrics["m"]
    assert few.metrics.keys() == {"m", "image_nsc", "text_nsc"}
    for name in ("image_nsc", "text_nsc"):
        assert few.metrics[name] == pytest.approx(all_at_once.metrics[name], rel=1e-4)
    assert len(set(few.metrics["image_nsc"])) == 9  # nine different streams


# --- When -----------------------------------------------------------------------------------------


def test_a_run_is_evaluated_before_and_after_and_in_between(settings):
    words = flags(**settings | {"metric_funcs": "[functions:metric]"}, max_steps=5, eval_steps=2)
    finished = run("iris_fast.train", *words, "--output_dir", "run", cwd=Path.cwd())
    assert (finished.code, finished.err) == (0, "")
    assert steps() == [0, 2, 4, 5]
    first, *_, last = read_evaluations(Path("run/eval"))
    assert first.prompts == HELD_OUT.splitlines()
    assert {len(values) for values in first.metrics.values()} == {6}
    assert first.metrics.keys() == {"image_nsc", "text_nsc", "functions:metric"}
    assert first.metrics["image_nsc"] != last.metrics["image_nsc"]
    lines = finished.out.splitlines()
    mean = first.mean("functions:metric").text()
    assert f"held-out at step 0, 3 prompts x 2 images: functions:metric {mean}" in lines
    assert str(compare([first, last])[0]) in lines
    assert sum(line.startswith("held-out ") for line in lines) == 5
    assert "next: " not in finished.out  # of a run on prompts of the user


def test_an_evaluation_changes_nothing_in_the_run(settings):
    """Not even for a reward that takes numbers from Python's generator, as the metric does."""
    settings |= {"reward_funcs": ["functions:reward"], "cot": False, "max_steps": 3}
    import random

    for folder, changes in (("run", {"eval_steps": 1}), ("whole", {"eval_prompts": "none"})):
        random.seed(5)
        train(quick(folder, **settings | changes))
    assert steps() == [0, 1, 2, 3]
    assert_same_run("whole", "run", 3)


def test_a_resumed_run_repeats_no_evaluation_and_gives_the_same_ones(settings):
    settings |= {"eval_steps": 2}
    train(quick("whole", **settings, max_steps=5))
    train(quick("run", **settings, max_steps=2))
    before = tree(Path("run/eval"))
    # Left by a run that continued past its last checkpoint.
    stale = json.loads(Path("run/eval/step_00002.json").read_text()) | {"step": 4}
    Path("run/eval/step_00004.json").write_text(json.dumps(stale))
    functions = sys.modules["functions"]
    count = len(functions.calls)
    train(quick("run", **settings, max_steps=5, resume_from_checkpoint=True))
    assert len(functions.calls) - count == 3 + 2 * 3  # a call per step, and per prompt
    assert {name: tree(Path("run/eval"))[name] for name in before} == before
    assert tree(Path("run/eval")) == tree(Path("whole/eval"))
    count = len(functions.calls)
    train(quick("run", **settings, max_steps=5, resume_from_checkpoint=True))
    assert len(functions.calls) == count


def test_other_images_are_evaluated_where_the_run_is_resumed(settings):
    train(quick("run", **settings, max_steps=1))
    changes = {"num_generations_eval": 3, "resume_from_checkpoint": True}
    train(quick("run", **settings | changes, max_steps=2))
    assert [(found.step, found.per_prompt) for found in read_evaluations(Path("run/eval"))] == [
        (0, 2), (1, 3), (2, 3),
    ]  # fmt: skip


def test_a_run_that_stops_by_itself_is_evaluated(settings):
    train(quick("run", **settings, max_steps=9, learning_rate=1e-2, max_kl=1e-6))
    stopped = metrics("run")[-1]["step"]
    assert stopped < 9
    assert steps() == [0, stopped]


@pytest.mark.parametrize("stop_at", [2, 6], ids=["before the first step", "after the last"])
def test_a_signal_stops_an_evaluation(settings, stop_at, capfd):
    """Calls 1 to 3 measure the held-out prompts, 4 the step, 5 to 7 the held-out prompts again."""
    train(quick("whole", **settings, max_steps=1))
    functions = sys.modules["functions"]
    functions.stop_at.append(len(functions.calls) + stop_at)
    capfd.readouterr()
    train(quick("run", **settings, max_steps=1))
    printed = capfd.readouterr().out
    done = [0] if stop_at == 6 else []
    assert steps() == done
    assert checkpoints("run") == ["step_00001"] * len(done)
    said = "before the held-out prompts were evaluated" if done else "by a signal, before the first"
    assert said in printed
    assert "--resume_from_checkpoint true" in printed
    train(quick("run", **settings, max_steps=1, resume_from_checkpoint=True))
    assert_same_run("whole", "run", 1)
    assert tree(Path("run/eval")) == tree(Path("whole/eval"))


def test_a_signal_ends_the_sampling_of_an_evaluation(settings, monkeypatch):
    """Not only at its end: the sampler asks before every image."""
    rollouts: list[int] = []
    rollout = Sampler.rollout

    def stop(sampler: Sampler, samples, numbers, callback) -> Rollout:
        rollouts.append(len(samples))
        os.kill(os.getpid(), signal.SIGTERM)
        return rollout(sampler, samples, numbers, callback)

    monkeypatch.setattr(Sampler, "rollout", stop)
    train(quick("run", **settings))
    assert rollouts == [2]
    assert steps() == []


# --- Settings -------------------------------------------------------------------------------------


def test_the_default_is_the_held_out_file_of_the_tiny_model():
    def evaluates(*words: str) -> bool:
        return parse(TrainConfig, "t", list(words)).evaluates

    assert evaluates()
    assert evaluates("--reward_funcs", "[tiny_verifier]")
    assert not evaluates("--eval_prompts", "none")
    assert not evaluates("--prompts", "p.txt")
    assert not evaluates("--metric_funcs", "[]")
    assert evaluates(
        "--prompts", "p.txt", "--eval_prompts", "q.txt", "--metric_funcs", "[richness]"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metric_funcs", "[]", "--eval_prompts", "q.txt"], "eval_prompts: there is no metric"),
        (["--eval_prompts", "none", "--eval_steps", "5"], "eval_steps: 5 .*add --eval_prompts"),
        (["--num_generations_eval", "0"], "num_generations_eval: 0 .*>= 1"),
        (["--eval_prompts", ""], "eval_prompts: ''"),
    ],
)
def test_settings_that_do_not_fit_are_refused(words, message):
    with pytest.raises(UserError, match=f"^{message}"):
        parse(TrainConfig, "t", words)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_prompts": "absent.txt"}, "eval_prompts: absent.txt: no such file"),
        ({"eval_prompts": "bad.txt"}, "eval_prompts: bad.txt line 2: empty prompt"),
        ({"eval_prompts": "long.txt"}, r"eval_prompts: long.txt prompt 1 .*more than"),
        ({"metric_funcs": ["functions:needs_field"]}, "metric_funcs: functions:needs_field cannot"),
    ],
)
def test_held_out_prompts_are_checked_before_the_run(settings, changes, message):
    Path("bad.txt").write_text("a cube\n\na ball\n")
    Path("long.txt").write_text("a red cube " * 200)
    Path("fields.jsonl").write_text('{"prompt": "a cube", "include": []}\n')
    settings |= {"prompts": "fields.jsonl"}
    with pytest.raises(UserError, match=f"^{message}"):
        train(quick("run", **settings | changes))
    assert not Path("run").exists()


def test_the_file_of_an_evaluation_reads_back(settings):
    train(quick("run", **settings, max_steps=1))
    (path, _) = sorted(Path("run/eval").iterdir())
    assert json.loads(path.read_text()) == asdict(read_evaluations(path.parent)[0])
