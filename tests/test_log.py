"""Metrics, warnings, console lines, trackers."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from PIL import Image
from small_runs import flags, metrics, quick, score

from iris_fast.errors import UserError
from iris_fast.run.folder import RunFolder
from iris_fast.run.health import find_warnings
from iris_fast.run.log import Log, open_log, read_metrics
from iris_fast.run.metrics import rollout_metrics
from iris_fast.run.samples import Samples, read_samples
from iris_fast.run.trackers import Tracker, require_tracker
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
    ("change", "name", "text"),
    [
        ({"frac_reward_zero_std": 1.0}, "no spread", "every advantage is 0"),
        ({"frac_cot_truncated": 1.0}, "cot cut", "max_completion_length"),
        ({"kl": 0.11}, "kl spike", "0.11 (median of the last 4 steps: 0.01)"),
        ({"image_entropy": 0.3}, "image_entropy collapse", "0.3 nats (step 1: 4)"),
        ({"text_entropy": 0.2}, "text_entropy collapse", "0.2 nats (step 1: 3)"),
    ],
)
def test_a_step_that_is_not_healthy_gives_one_warning(change, name, text):
    found = find_warnings(HEALTHY | change, HISTORY)
    assert list(found) == [name]
    assert text in found[name]


@pytest.mark.parametrize(
    "change",
    [
        {"frac_reward_zero_std": 0.99},
        {"frac_cot_truncated": 0.99},
        {"kl": 0.09},  # less than ten times the median
        {"image_entropy": 0.5},
    ],
)
def test_values_just_below_a_threshold_give_no_warning(change):
    assert find_warnings(HEALTHY | change, HISTORY) == {}


def test_a_small_kl_is_no_spike_however_fast_it_grows():
    quiet = [row | {"kl": 1e-6} for row in HISTORY]
    assert find_warnings(HEALTHY | {"kl": 0.04}, quiet) == {}
    assert "kl spike" in find_warnings(HEALTHY | {"kl": 0.06}, quiet)


def test_image_only_metrics_give_no_warning():
    image_only = {k: v for k, v in HEALTHY.items() if "cot" not in k and "text" not in k}
    assert find_warnings(image_only, [image_only]) == {}


def test_a_constant_reward_prints_one_warning(here):
    words = flags(reward_funcs="[constant]", max_steps=3, output_dir="run")
    finished = run("iris_fast.train", *words, cwd=here)
    assert finished.out.count("every group's rewards are equal") == 1
    assert all("no spread" in row["warnings"] for row in metrics("run"))
    assert all(row["frac_reward_zero_std"] == 1 for row in metrics("run"))
    assert "every group&#39;s rewards are equal" in Path("run/report.html").read_text()


# --- Metrics --------------------------------------------------------------------------------------


def test_metrics_by_hand(rollout, ranks):
    """Token means weight every token equally, sample means every sample."""
    config = quick("unused", reward_funcs=["image_nsc", "text_nsc"], reward_weights=[1.0, 2.0])
    scored = score(rollout, config, ranks)
    scored = dataclasses.replace(
        scored,
        reward_N=torch.tensor([0.0, 1.0, 10.0, 12.0]),
        metrics={"brightness": torch.tensor([0.0, 1.0, 0.0, 1.0])},
    )
    found = rollout_metrics(scored, config.num_generations, ranks)
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
    brighter = scored.reward_terms["text_nsc"].view(2, 2).diff(dim=1).sign()[:, 0]
    assert 0 not in brighter  # so that one of two images is above the other
    for name, sign in (("reward", torch.ones(2)), ("text_nsc", brighter)):
        key = f"/{name}~brightness"
        assert found[f"reward_alignment{key}"] == pytest.approx(sign.mean().item())
        assert found[f"reward_alignment_se{key}"] == pytest.approx(sign.std().item() / 2**0.5)
        assert found[f"reward_alignment_groups{key}"] == 2
    found = {name: value for name, value in found.items() if "reward_alignment" not in name}
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


def log_at(folder: RunFolder, step: int = 0) -> Log:
    return Log(folder.metrics, step, max_steps=5, is_first=True)


def write_steps(folder: RunFolder, count: int) -> None:
    log = log_at(folder)
    for step in range(1, count + 1):
        log.step(HEALTHY | {"step": step})
    log.close()


def test_every_step_is_on_disk_at_once(folder):
    log = log_at(folder)
    log.step(HEALTHY | {"step": 1})
    assert [row["step"] for row in read_metrics(folder.metrics)] == [1]
    log.close()


def test_a_resumed_log_drops_the_rows_after_its_checkpoint(folder):
    write_steps(folder, 5)
    log = log_at(folder, step=3)
    assert [row["step"] for row in log.history] == [1, 2, 3]
    log.step(HEALTHY | {"step": 4, "reward": 7.0})
    log.close()
    rows = read_metrics(folder.metrics)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["reward"] == 7.0


@pytest.mark.parametrize("end", ['{"step": 3, "rew', "{", '{"step": 3}{', "\x00\x00\x00"])
def test_a_last_line_truncated_by_a_crash_is_dropped(folder, end):
    write_steps(folder, 2)
    with folder.metrics.open("a") as file:
        file.write(end)
    assert [row["step"] for row in read_metrics(folder.metrics)] == [1, 2]


@pytest.mark.parametrize("line", ["5", '{"a": 1}', '{"step": "1"}', "half", b"\xff\xfe"])
def test_a_damaged_line_is_an_error_and_nothing_is_written(folder, line):
    write_steps(folder, 2)
    first, second = folder.metrics.read_bytes().splitlines()
    wrong = line if isinstance(line, bytes) else line.encode()
    folder.metrics.write_bytes(b"\n".join([first, wrong, second, b""]))
    before = folder.metrics.read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is not a step's metrics; fix"):
        log_at(folder, step=2)
    assert folder.metrics.read_bytes() == before


def test_a_fresh_run_has_no_rows(folder):
    assert read_metrics(folder.metrics) == []


# --- Console and tracker --------------------------------------------------------------------------


def test_the_console_has_one_line_per_step(here):
    finished = run("iris_fast.train", *flags(max_steps=3, output_dir="run"), cwd=here)
    lines = [line for line in finished.out.splitlines() if line.startswith("step ")]
    assert [line.split("  ")[0] for line in lines] == ["step 1/3", "step 2/3", "step 3/3"]
    for part in ("reward", "in groups", "nsc", "kl", "grad", "images/s", "GiB", "eta 0"):
        assert all(part in line for line in lines)
    assert lines[-1].endswith("  eta 00:00")


def test_the_time_left_counts_the_steps_since_the_log_was_opened(folder, monkeypatch, capsys):
    clock = iter([100.0, 110.0, 120.0])
    monkeypatch.setattr("iris_fast.run.log.time.perf_counter", lambda: next(clock))
    write_steps(folder, 2)
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("eta 00:40")
    assert second.endswith("eta 00:30")
    clock = iter([0.0, 3600.0])
    log = log_at(folder, step=2)
    log.step(HEALTHY | {"step": 3})
    log.close()
    assert capsys.readouterr().out.endswith("eta 2:00:00\n")


SAMPLES = Samples(
    step=4,
    prompts=["a cube", "a | b"],
    per_prompt=2,
    cot=["one", "two", "three\nlines", ""],
    metrics={},
)
ROWS = [["a cube", "one"], ["a cube", "two"], ["a | b", "three\nlines"], ["a | b", ""]]


@pytest.fixture
def fresh_accelerate() -> None:
    """accelerate as in a new process: other tests may have initialized its state."""
    from accelerate import PartialState

    PartialState._reset_state()


@pytest.fixture
def grid(here) -> Path:
    """A grid of 8 x 6 pixels, red and blue."""
    path = here / "step_00004.png"
    image = Image.new("RGB", (8, 6), "red")
    image.putpixel((7, 5), (0, 0, 255))
    image.save(path)
    return path


def test_tensorboard_receives_the_images_and_chains_of_thought_of_every_sample_step(here):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"sample_steps": 1, "num_sample_prompts": 2, "report_to": "tensorboard"}
    train(quick("run", max_steps=2, **settings))
    accumulator = EventAccumulator("run/iris-fast", size_guidance={"images": 0, "tensors": 0})
    accumulator.Reload()
    images = accumulator.Images("samples/images")
    tag = "samples/chains_of_thought/text_summary"
    texts = {event.step: event.tensor_proto for event in accumulator.Tensors(tag)}
    assert [event.step for event in images] == [0, 1, 2]
    for event in images:
        path = Path(f"run/samples/step_{event.step:05d}.png")
        with Image.open(path) as grid, Image.open(io.BytesIO(event.encoded_image_string)) as logged:
            assert logged.convert("RGB").tobytes() == grid.convert("RGB").tobytes()
        (text,) = texts[event.step].string_val
        samples = read_samples(path)
        assert len(samples.cot) == 8
        lines = text.decode().splitlines()[2:]
        for line, cot in zip(lines, samples.cot, strict=True):
            assert " ".join(cot.split()).replace("|", "\\|") in line


def test_a_table_in_tensorboard_escapes_its_separators(here, grid, monkeypatch):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    tracker = Tracker(quick("run", report_to="tensorboard"), here)
    logged = {}
    monkeypatch.setattr(tracker._tracker, "log", lambda values, step: logged.update(values))
    tracker.log_samples(SAMPLES, grid)
    tracker.finish()
    assert logged["samples/chains_of_thought"].splitlines() == [
        "| prompt | chain of thought |",
        "| --- | --- |",
        "| a cube | one |",
        "| a cube | two |",
        "| a \\| b | three lines |",
        "| a \\| b |  |",
    ]


class FakeRun:
    """Records what wandb's or trackio's run would receive."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = False

    def finish(self) -> None:
        self.finished = True


class FakeWandbRun(FakeRun):
    def log(self, data, step=None, commit=None):
        self.logged.append((step, data))


class FakeTrackioRun(FakeRun):
    def log(self, metrics, step=None):
        self.logged.append((step, metrics))


class FakeTable:
    def __init__(
        self, columns=None, data=None, dataframe=None, rows=None, optional=True,
        allow_mixed_types=False, log_mode="IMMUTABLE",
    ):  # fmt: skip
        assert dataframe is None
        self.columns, self.data = columns, data


class FakeWandbImage:
    def __init__(
        self, data_or_path, mode=None, caption=None, grouping=None, classes=None, boxes=None,
        masks=None, file_type=None,
    ):  # fmt: skip
        self.image = data_or_path


class FakeTrackioImage:
    def __init__(self, value, caption=None):
        self.image = value


@pytest.mark.parametrize(
    ("name", "run_class", "image_class"),
    [("wandb", FakeWandbRun, FakeWandbImage), ("trackio", FakeTrackioRun, FakeTrackioImage)],
)
def test_wandb_and_trackio_receive_numbers_images_and_chains_of_thought(
    folder, ranks, grid, monkeypatch, fresh_accelerate, name, run_class, image_class
):
    module, fake_run, settings = types.ModuleType(name), run_class(), {}
    module.init = lambda project=None: fake_run
    module.config = types.SimpleNamespace(
        update=lambda values, allow_val_change=None: settings.update(values)
    )
    module.Image, module.Table = image_class, FakeTable
    monkeypatch.setitem(sys.modules, name, module)
    config = quick(folder.path, report_to=name)
    log = open_log(folder, config, 3, ranks)
    assert settings["num_generations"] == config.num_generations
    log.step(HEALTHY | {"step": 4})
    grid.with_suffix(".json").write_text(json.dumps(dataclasses.asdict(SAMPLES)))
    log.samples(grid)
    log.close()
    assert {step for step, _ in fake_run.logged} == {4}
    logged = {name: value for _, values in fake_run.logged for name, value in values.items()}
    assert logged["reward"] == -1.0
    image, table = logged["samples/images"], logged["samples/chains_of_thought"]
    if isinstance(image, list):
        (image,) = image
    assert image.image.size == (8, 6)
    assert image.image.getpixel((7, 5)) == (0, 0, 255)
    assert (table.columns, table.data) == (["prompt", "chain of thought"], ROWS)
    assert fake_run.finished


def test_samples_without_chains_of_thought_log_images_alone(here, grid, monkeypatch):
    module, fake_run = types.ModuleType("wandb"), FakeWandbRun()
    module.init = lambda project=None: fake_run
    module.config = types.SimpleNamespace(update=lambda values, allow_val_change=None: None)
    module.Image = FakeWandbImage
    monkeypatch.setitem(sys.modules, "wandb", module)
    tracker = Tracker(quick("run", report_to="wandb"), here)
    tracker.log_samples(dataclasses.replace(SAMPLES, cot=[""] * 4), grid)
    ((step, values),) = fake_run.logged
    assert (step, list(values)) == (4, ["samples/images"])


def test_a_tracker_that_is_not_installed_is_an_error_before_anything_is_written(here):
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


# --- Measured values ------------------------------------------------------------------------------


def test_metrics_are_written_as_strict_json(here):
    train(quick("run", max_steps=1))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for line in Path("run/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_the_time_and_memory_of_a_step_are_measured(here):
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
    log = Log(folder.metrics, 0, 5, is_first=False)
    log.step(HEALTHY)
    log.samples(folder.samples / "step_00000.png")
    log.print("nothing")
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
    (here / "wandb.py").touch()  # makes it importable
    monkeypatch.syspath_prepend(here)
    if starts:
        require_tracker("wandb")
    else:
        with pytest.raises(UserError, match=r"wandb login.*WANDB_MODE=offline"):
            require_tracker("wandb")
