"""Whole runs: the run folder and what is in it."""

from __future__ import annotations

import json
from pathlib import Path

import attention_fakes
import pytest
import torch
from commands import run
from PIL import Image
from small_runs import assert_same_run, checkpoints, flags, metrics, quick, tensors

from iris_fast.cli import parse
from iris_fast.config import TrainConfig
from iris_fast.preflight import inputs
from iris_fast.rollout.sampler import Sampler
from iris_fast.run.samples import read_samples
from iris_fast.tiny import build_random_tiny
from iris_fast.train import train


def test_a_run_folder_is_complete(finished_run):
    visible = {path.name for path in finished_run.iterdir() if not path.name.startswith(".")}
    assert visible == {"config.yaml", "metrics.jsonl", "samples", "checkpoints", "report.html"}
    assert not list(finished_run.rglob("*partial*"))


def test_metrics_hold_one_object_per_step(finished_run):
    lines = (finished_run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]  # no NaN, no Infinity
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    names = {
        "reward", "reward_std_in_groups", "frac_reward_zero_std", "rewards/image_nsc",
        "rewards/text_nsc", "image_nsc", "text_nsc", "image_entropy", "cot_tokens", "loss", "kl",
        "grad_norm", "clip_ratio", "learning_rate", "images_per_s", "peak_memory_bytes",
        "rollout_s", "train_s", "warnings",
    }  # fmt: skip
    for row in rows:
        assert names <= row.keys()
        assert row["image_nsc"] <= 0
        assert 0 < row["image_entropy"] <= 7.61  # log 2000
        assert row["cot_tokens"] <= 4
        assert row["attn_implementation"] == "sdpa"
        assert row["peak_memory_bytes"] > 2**20
        assert row["images_per_s"] > 0


def test_config_yaml_starts_the_same_run_again(finished_run, here):
    arguments = ["--config", str(finished_run / "config.yaml"), "--output_dir", "again"]
    again = parse(TrainConfig, "t", [*arguments, "--max_steps", "2"])
    train(again)
    assert metrics("again") == metrics(finished_run)[:2]


def test_sample_grids_show_the_same_prompts_and_seeds(finished_run, here):
    names = sorted(path.name for path in (finished_run / "samples").glob("*.png"))
    assert names == ["step_00000.png", "step_00002.png", "step_00004.png", "step_00005.png"]
    grids = {name: Image.open(finished_run / "samples" / name) for name in names}
    sizes = {grid.size for grid in grids.values()}
    ((width, height),) = sizes
    side = 8  # of one image: 4 tokens of 4 x 4 pixels
    assert width > 4 * side
    assert height > 3 * side
    # Sampled before any training: the same in every run of these weights.
    train(quick("other", max_steps=1, sample_steps=1, num_sample_prompts=3, learning_rate=1e-9))
    before = Image.open("other/samples/step_00000.png")
    assert before.tobytes() == grids["step_00000.png"].tobytes()
    assert before.tobytes() == Image.open("other/samples/step_00001.png").tobytes()
    assert before.tobytes() != grids["step_00005.png"].tobytes()


def test_both_rollout_engines_train_alike(here):
    for engine in ("plain", "static"):
        train(quick(engine, rollout_engine=engine, num_generations=4, max_steps=3))
    for ours, theirs in zip(metrics("static"), metrics("plain"), strict=True):
        assert ours["cot_tokens"] == theirs["cot_tokens"]
        assert ours["reward"] == pytest.approx(theirs["reward"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)


def test_policy_reference_and_sampler_use_the_attention_that_was_chosen(here, monkeypatch):
    train(quick("sdpa"))
    calls = attention_fakes.install("flash_attention_2", monkeypatch)
    monkeypatch.setattr(inputs, "resolve_implementation", lambda *_: "flash_attention_2")
    train(quick("flash"))
    layers = build_random_tiny().config.decoder.num_layers
    # A step: prompts of text and of images; the reference; the policy.
    assert len(calls) == 2 * layers * (2 + 1 + 1)
    for ours, theirs in zip(metrics("flash"), metrics("sdpa"), strict=True):
        assert ours.pop("attn_implementation") == "flash_attention_2"
        assert theirs.pop("attn_implementation") == "sdpa"
        assert ours.keys() == theirs.keys()
        for name in ("image_nsc", "text_nsc", "loss", "grad_norm", "kl"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


def test_each_grid_has_a_file_with_its_cots_and_metrics(finished_run, here):
    for step in (0, 2, 4, 5):
        samples = read_samples(finished_run / "samples" / f"step_{step:05d}.png")
        assert samples.step == step
        assert len(set(samples.prompts)) == 3
        assert samples.metrics.keys() == {"image_nsc", "text_nsc"}
        for values in (samples.cot, *samples.metrics.values()):
            assert len(values) == 3 * samples.per_prompt
        assert -60 < samples.means()["image_nsc"] < 0


def test_metrics_of_images_are_logged_and_change_nothing_else(here):
    hot = {"sample_steps": 1, "temperature": 3.0}  # the images of a group differ
    train(quick("plain", **hot))
    names = ["tiny_verifier", "diversity", "richness"]
    train(quick("measured", **hot, metric_funcs=names))
    left, right = tensors("plain", 2), tensors("measured", 2)
    assert all(torch.equal(left[name], right[name]) for name in left)
    for row in metrics("measured"):
        assert 0 <= row["metrics/tiny_verifier"] <= 1
        assert 0 < row["metrics/diversity"] < 1
        assert row["metrics/richness"] > 0
    assert not any(name.startswith("metrics/") for row in metrics("plain") for name in row)
    samples = read_samples(Path("measured/samples/step_00002.png"))
    assert samples.metrics.keys() == {"image_nsc", "text_nsc", *names}


def test_sample_grids_share_no_random_numbers_with_training(here, monkeypatch):
    sampled: dict[str, set[int]] = {"grid": set(), "training": set()}
    rollout = Sampler.rollout

    def spy(sampler, prompts, sample_numbers, *pause):
        sampled["training" if pause else "grid"].update(sample_numbers)
        return rollout(sampler, prompts, sample_numbers, *pause)

    monkeypatch.setattr(Sampler, "rollout", spy)
    train(quick("run", max_steps=3, sample_steps=1))
    assert len(sampled["grid"]) >= 4
    assert len(sampled["training"]) == 3 * 2  # a prompt's 2 images, fresh ones in every step
    assert not sampled["grid"] & sampled["training"]


def test_sample_steps_0_gives_no_grid(here):
    train(quick("run", sample_steps=0))
    assert list(Path("run/samples").iterdir()) == []


def test_the_newest_checkpoints_are_kept(finished_run):
    assert checkpoints(finished_run) == ["step_00004", "step_00005"]
    files = {path.name for path in (finished_run / "checkpoints" / "step_00005").iterdir()}
    assert {"manifest.json", "state.json", "rank_0.pt"} < files


def test_the_report_shows_the_run(finished_run):
    page = (finished_run / "report.html").read_text()
    assert "5 steps" in page
    assert "max_steps: 5" in page
    assert page.count("data:image/png;base64,") == 3 * 3 * 4  # prompts, grids, images


def test_a_second_run_starts_like_the_first_and_takes_the_next_folder(here):
    for number in (1, 2):
        finished = run("iris_fast.train", *flags(), cwd=here)
        assert (finished.code, finished.err) == (0, "")
        assert f"run folder: runs/tiny-00{number}" in finished.out
        assert "attention: sdpa\n" in finished.out
        assert f"finished at step 2; report: runs/tiny-00{number}/report.html" in finished.out
    assert_same_run("runs/tiny-001", "runs/tiny-002", 2)


def test_what_is_not_trained_on_changes_no_number(here):
    train(quick("plain"))
    train(quick("more", sample_steps=1, save_steps=1, num_sample_prompts=2))
    assert_same_run("plain", "more", 2)


def test_another_seed_gives_another_run(here):
    train(quick("a", max_steps=1))
    train(quick("b", max_steps=1, seed=7))
    assert metrics("a")[0]["image_entropy"] != metrics("b")[0]["image_entropy"]
