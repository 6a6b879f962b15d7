"""`python docs/draw_run.py`: sample images before and after training, and curves."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iris_fast.models.images import GAP_PIXELS
from iris_fast.run.evaluation import Evaluation, compare
from iris_fast.run.samples import Samples, read_strips, samples_of_same_prompts

SPEC = importlib.util.spec_from_file_location(
    "draw_run", Path(__file__).parent.parent / "docs" / "draw_run.py"
)
draw_run = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(draw_run)


@pytest.fixture
def command(here, monkeypatch, capsys):
    """Runs the command in an empty folder; its exit code, standard output and error."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["draw_run.py", *map(str, words)])
        return draw_run.main(), *capsys.readouterr()

    return call


@pytest.mark.parametrize("column", [0, 1])
def test_images_of_the_first_and_the_last_grid_are_enlarged(finished_run, column):
    figure = np.asarray(draw_run.draw_figure(finished_run))
    grids = samples_of_same_prompts(finished_run / "samples")
    assert [samples.step for samples, _ in grids] == [0, 2, 4, 5]
    strips = read_strips(*grids[-column])
    left = draw_run.MARGIN + draw_run.FRAME_WIDTH + column * (draw_run.COLUMN_WIDTH + draw_run.GAP)
    shown = figure[:, left : left + draw_run.IMAGE_SIZE]
    for strip in strips:
        size = strip.height
        image = strip.crop((GAP_PIXELS, 0, GAP_PIXELS + size, size))
        enlarged = np.asarray(
            image.resize((draw_run.IMAGE_SIZE, draw_run.IMAGE_SIZE), Image.Resampling.NEAREST)
        )
        tops = range(len(shown) - draw_run.IMAGE_SIZE)
        assert any(np.array_equal(shown[top : top + draw_run.IMAGE_SIZE], enlarged) for top in tops)


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
    title, nsc, accepted = draw_run.describe(settings, before, after)
    assert title == "Model tiny: 60 steps, rewarded by image_nsc + 0.5 x random alone"
    assert "from -3.00 to -1.00 nats" in nsc
    assert "Share of the 2 samples" in accepted
    assert "from 50% to 0%" in accepted
    evaluations = [
        Evaluation(step, ["a ring", "a ball"], 2, {"tiny_verifier": values})
        for step, values in ((0, [1.0, 0.0, 0.0, 0.0]), (60, [1.0, 1.0, 1.0, 0.0]))
    ]
    title, nsc, held_out = draw_run.describe(settings, before, after, *compare(evaluations))
    assert held_out.startswith(
        "Share of 4 held-out images that the verifier accepts: from 25% to 75%"
    )


def test_the_command_writes_a_png(finished_run, command):
    code, out, err = command(finished_run, "docs/figure.png")
    assert (code, out, err) == (0, "figure: docs/figure.png\n", "")
    with Image.open("docs/figure.png") as figure:
        assert figure.width == draw_run.WIDTH
        assert figure.format == "PNG"


def test_errors_are_one_line(finished_run, command):
    Path("empty").mkdir()
    for words, message in (
        (["empty", "figure.png"], "run_folder: empty does not hold a run with metrics and two"),
        ([finished_run, "figure.jpg"], "target: figure.jpg is not a PNG file"),
    ):
        code, _, err = command(*words)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1
        assert not Path(words[1]).exists()
