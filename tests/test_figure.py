"""`python -m iris_fast.run.figure`: sample images before and after training, and curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from commands import run
from PIL import Image

from iris_fast.models.images import GAP_PIXELS
from iris_fast.run.figure import (
    COLUMN_WIDTH,
    FRAME_WIDTH,
    GAP,
    IMAGE_SIZE,
    MARGIN,
    WIDTH,
    describe,
    draw_figure,
)
from iris_fast.run.samples import Samples, read_strips, samples_of_same_prompts


@pytest.mark.parametrize("column", [0, 1])
def test_images_of_the_first_and_the_last_grid_are_enlarged(finished_run, column):
    figure = np.asarray(draw_figure(finished_run))
    grids = samples_of_same_prompts(finished_run / "samples")
    assert [samples.step for samples, _ in grids] == [0, 2, 4, 5]
    strips = read_strips(*grids[-column])
    left = MARGIN + FRAME_WIDTH + column * (COLUMN_WIDTH + GAP)
    shown = figure[:, left : left + IMAGE_SIZE]
    for strip in strips:
        size = strip.height
        image = strip.crop((GAP_PIXELS, 0, GAP_PIXELS + size, size))
        enlarged = np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.NEAREST))
        tops = range(len(shown) - IMAGE_SIZE)
        assert any(np.array_equal(shown[top : top + IMAGE_SIZE], enlarged) for top in tops)


def test_the_header_reports_how_the_samples_changed():
    metrics = {"image_nsc": [-2.0, -4.0], "tiny_verifier": [1.0, 0.0]}
    before = Samples(0, ["a ring"], 2, ["", ""], metrics)
    after = Samples(
        60, ["a ring"], 2, ["", ""], {"image_nsc": [-1.0] * 2, "tiny_verifier": [0.0] * 2}
    )
    settings = {
        "model": "tiny",
        "reward_funcs": ["image_nsc", "random"],
        "reward_weights": [1, 0.5],
    }
    title, nsc, accepted = describe(settings, before, after)
    assert title == "Model tiny: 60 steps, rewarded by image_nsc + 0.5 x random alone"
    assert "from -3.00 to -1.00 nats" in nsc
    assert "Share of the 2 samples" in accepted
    assert "from 50% to 0%" in accepted


def test_the_command_writes_a_png(finished_run, here):
    finished = run("iris_fast.run.figure", finished_run, "docs/figure.png", cwd=here)
    assert (finished.code, finished.err) == (0, "")
    with Image.open(here / "docs" / "figure.png") as figure:
        assert figure.width == WIDTH
        assert figure.format == "PNG"


def test_errors_are_one_line(finished_run, here: Path):
    (here / "empty").mkdir()
    for words, message in (
        (["empty", "figure.png"], "run_folder: empty does not hold a run with metrics and two"),
        ([finished_run, "figure.jpg"], "target: figure.jpg is not a PNG file"),
    ):
        finished = run("iris_fast.run.figure", *words, cwd=here)
        assert finished.code == 2
        assert message in finished.error_line
        assert not (here / words[1]).exists()
