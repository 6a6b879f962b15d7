"""Metrics, warnings, console, tracker."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from small_runs import flags, metrics, quick, score

from iris_fast.config import TrainConfig
from iris_fast.errors import UserError
from iris_fast.run.folder import RunFolder
from iris_fast.run.health import find_warnings
from iris_fast.run.log import Log
from iris_fast.run.metrics import read_metrics, rollout_metrics
from iris_fast.run.trackers import require_tracker
from iris_fast.train import train

HEALTHY: dict[str, Any] = {
    "step": 5,
    "reward": -1.0,
    "reward_std_in_groups": 0.2,
    "frac_reward_zero_std": 0.5,
    "frac_cot_truncated": 0.5,
    "kl": 0.01,
    "grad_norm": 1.0,
    "image_nsc": -0.5,
    "image_entropy": 4.0,
    "text_entropy": 3.0,
    "images_per_s": 1.0,
    "peak_memory_bytes": 2**30,
    "warnings": {},
}
HISTORY = [HEALTHY | {"step": step} for step in range(1, 5)]


# --- Warnings -------------------------------------------------------------------------------------


def test_a_healthy_step_gives_no_warning():
    assert find_warnings(HEALTHY, HISTORY) == {}
    assert find_warnings(HEALTHY, []) == {}


@pytest.mark.parametrize(
    ("change", "name", "told"),
    [
        ({"frac_reward_zero_std": 1.0}, "no spread", "every advantage is 0"),
        ({"frac_cot_truncated": 1.0}, "cot cut", "max_completion_length"),
        ({"kl": 0.11}, "kl spike", "0.11 (median of the last 4 steps: 0.01)"),
        ({"image_entropy": 0.3}, "image_entropy collapse", "0.3 nats (step 1: 4)"),
        ({"text_entropy": 0.2}, "text_entropy collapse", "0.2 nats (step 1: 3)"),
    ],
)
def test_a_run_that_only_looks_healthy_is_warned_of(change, name, told):
    found = find_warnings(HEALTHY | change, HISTORY)
    assert list(found) == [name]
    assert told in found[name]


@pytest.mark.parametrize(
    "change",
    [
        {"frac_reward_zero_std": 0.99},
        {"frac_cot_truncated": 0.99},
        {"kl": 0.09},  # under ten times the usual
        {"image_entropy": 0.5},
    ],
)
def test_what_is_just_short_of_it_is_not(change):
    assert find_warnings(HEALTHY | change, HISTORY) == {}


def test_a_small_kl_is_no_spike_however_it_grows():
    quiet = [row | {"kl": 1e-6} for row in HISTORY]
    assert find_warnings(HEALTHY | {"kl": 0.04}, quiet) == {}
    assert "kl spike" in find_warnings(HEALTHY | {"kl": 0.06}, quiet)


def test_without_text_nothing_is_said_of_it():
    image_only = {k: v for k, v in HEALTHY.items() if "cot" not in k and "text" not in k}
    assert find_warnings(image_only, [image_only]) == {}


def test_a_constant_reward_is_warned_of_once_on_the_console(here):
    words = flags(reward_funcs="[constant]", max_steps=3, output_dir="run")
    finished = run("iris_fast.train", *words, cwd=here)
    assert finished.out.count("every group's rewards are equal") == 1
    assert all("no spread" in row["warnings"] for row in metrics("run"))
    assert all(row["frac_reward_zero_std"] == 1 for row in metrics("run"))
    assert "every group&#x27;s rewards are equal" in Path("run/report.html").read_text()


# --- Metrics --------------------------------------------------------------------------------------


def test_metrics_by_hand(rollout, ranks):
    """Token means weigh every token alike, sample means every sample."""
    config = quick("unused", reward_funcs=["image_nsc", "text_nsc"], reward_weights=[1.0, 2.0])
    scored = score(rollout, config, ranks)
    scored = dataclasses.replace(
        scored,
        reward_N=torch.tensor([0.0, 1.0, 10.0, 12.0]),
        metrics={"brightness": torch.tensor([0.0, 1.0, 0.0, 1.0])},
    )
    found = rollout_metrics(scored, config, ranks)
    rewards = scored.reward_N.double()
    text = rollout.text
    expected = {
        "reward": rewards.mean(),
        "reward_std": rewards.std(),
        "reward_std_in_groups": (1 + 2) / 2 / 2**0.5,
        "frac_reward_zero_std": 0.0,
        "metrics/brightness": 0.5,
        "rewards/image_nsc": scored.reward_terms["image_nsc"].mean(),
        "rewards/text_nsc": scored.reward_terms["text_nsc"].mean(),
        "image_nsc": rollout.image.conditional.nsc.mean(),
        "image_nsc_guided": rollout.image.guided.nsc.mean(),
        "image_entropy": rollout.image.conditional.entropy.mean(),
        "text_nsc": text.conditional.nsc[text.mask].mean(),
        "text_nsc_guided": text.guided.nsc[text.mask].mean(),
        "text_entropy": text.conditional.entropy[text.mask].mean(),
        "cot_tokens": (3 + 1 + 2 + 3) / 4,
        "frac_cot_truncated": 0.25,
    }
    groups = found.pop("reward_std_by_group")
    assert groups == pytest.approx([1 / 2**0.5, 2 / 2**0.5])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-5), name


def test_without_cot_there_are_no_text_metrics(here):
    train(quick("run", cot=False, max_steps=1))
    (row,) = metrics("run")
    assert not any("text" in name or "cot" in name for name in row)


# --- metrics.jsonl --------------------------------------------------------------------------------


@pytest.fixture
def folder(here: Path) -> RunFolder:
    folder = RunFolder(here / "run", resumed=False)
    folder.samples.mkdir(parents=True)
    (folder.path / "config.yaml").write_text("seed: 42\n")
    return folder


def open_log(folder: RunFolder, ranks, step: int = 0, **settings) -> Log:
    return Log(folder, quick(folder.path, **settings), step, ranks)


def write_steps(folder: RunFolder, ranks, count: int) -> None:
    log = open_log(folder, ranks)
    for step in range(1, count + 1):
        log.step(HEALTHY | {"step": step})
    log.close()


def test_every_step_is_on_disk_at_once(folder, ranks):
    log = open_log(folder, ranks)
    log.step(HEALTHY | {"step": 1})
    assert [row["step"] for row in read_metrics(folder.metrics)] == [1]
    log.close()


def test_a_resumed_log_drops_what_lies_beyond_its_checkpoint(folder, ranks):
    write_steps(folder, ranks, 5)
    log = open_log(folder, ranks, step=3)
    assert [row["step"] for row in log.history] == [1, 2, 3]
    log.step(HEALTHY | {"step": 4, "reward": 7.0})
    log.close()
    rows = read_metrics(folder.metrics)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["reward"] == 7.0


@pytest.mark.parametrize("end", ['{"step": 3, "rew', "{", '{"step": 3}{', "\x00\x00\x00"])
def test_a_line_cut_by_a_crash_is_dropped(folder, ranks, end):
    write_steps(folder, ranks, 2)
    with folder.metrics.open("a") as file:
        file.write(end)
    assert [row["step"] for row in read_metrics(folder.metrics)] == [1, 2]


@pytest.mark.parametrize("line", ["5", '{"a": 1}', '{"step": "1"}', "half", b"\xff\xfe"])
def test_a_damaged_line_among_others_is_told_and_nothing_written(folder, ranks, line):
    write_steps(folder, ranks, 2)
    first, second = folder.metrics.read_bytes().splitlines()
    wrong = line if isinstance(line, bytes) else line.encode()
    folder.metrics.write_bytes(b"\n".join([first, wrong, second, b""]))
    before = folder.metrics.read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is no step's metrics; mend"):
        open_log(folder, ranks, step=2)
    assert folder.metrics.read_bytes() == before


def test_a_fresh_run_has_no_rows(folder):
    assert read_metrics(folder.metrics) == []


# --- Console and tracker --------------------------------------------------------------------------


def test_the_console_has_one_line_a_step(here):
    finished = run("iris_fast.train", *flags(max_steps=3, output_dir="run"), cwd=here)
    lines = [line for line in finished.out.splitlines() if line.startswith("step ")]
    assert len(lines) == 3
    for part in ("reward", "in groups", "nsc", "kl", "grad", "images/s", "GiB"):
        assert all(part in line for line in lines)


def test_tensorboard_holds_every_number_of_every_step(here):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(quick("run", max_steps=2, report_to="tensorboard"))
    accumulator = EventAccumulator("run/iris-fast")
    accumulator.Reload()
    for name in ("reward", "kl", "image_nsc", "rewards/image_nsc"):
        logged = [(event.step, event.value) for event in accumulator.Scalars(name)]
        expected = [(row["step"], row[name]) for row in metrics("run")]
        assert logged == [(step, pytest.approx(value, rel=1e-5)) for step, value in expected]


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_written(here):
    for package in ("wandb", "trackio"):
        try:
            __import__(package)
        except ImportError:
            break
    else:
        pytest.skip("needs a tracker that is not installed")
    finished = run("iris_fast.train", *flags(report_to=package, output_dir="run"), cwd=here)
    assert finished.code == 2
    assert f"report_to: {package} is not installed; pip install {package}" in finished.error_line
    assert not (here / "run").exists()


# --- What is measured -----------------------------------------------------------------------------


def test_rows_that_json_does_not_know_are_never_written(here):
    train(quick("run", max_steps=1))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for line in Path("run/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_the_seconds_and_bytes_of_a_step_are_measured(here):
    train(quick("run", max_steps=1))
    row = json.loads(Path("run/metrics.jsonl").read_text())
    assert row["rollout_s"] > 0
    assert row["train_s"] > 0
    images = quick("x").num_generations
    assert row["images_per_s"] == pytest.approx(
        images / (row["rollout_s"] + row["train_s"]), rel=1e-6
    )
    assert math.isfinite(row["peak_memory_bytes"])
    assert torch.is_grad_enabled()


def test_only_the_first_rank_writes(folder):
    class Second:
        is_first = False

    log = Log(folder, TrainConfig(), 0, Second())
    log.step(HEALTHY)
    log.say("nothing")
    log.close()
    assert not folder.metrics.exists()


@pytest.mark.parametrize(
    ("environment", "netrc", "starts"),
    [
        ({}, None, False),
        ({}, "machine elsewhere.org login u password p", False),
        ({}, "machine api.wandb.ai login u password p", True),
        ({"WANDB_BASE_URL": "https://ours.org/"}, "machine ours.org login u password p", True),
        ({"WANDB_API_KEY": "0" * 40}, None, True),
        ({"WANDB_MODE": "offline"}, None, True),
        ({"WANDB_MODE": "online"}, None, False),
    ],
)
def test_wandb_without_a_login_is_refused_instead_of_asking_for_one(
    here, monkeypatch, environment, netrc, starts
):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NETRC", str(here / "netrc"))
    if netrc:
        (here / "netrc").write_text(netrc)
    (here / "wandb.py").touch()  # installed, as far as anyone looks
    monkeypatch.syspath_prepend(here)
    if starts:
        require_tracker("wandb")
    else:
        with pytest.raises(UserError, match=r"wandb login.*WANDB_MODE=offline"):
            require_tracker("wandb")
