"""Draw a figure of a run for a document: sample images before and after training, and curves.

    python docs/draw_run.py RUN_FOLDER OUT.png

The prompts are evenly spaced over those of the sample grids and the images are the first ones of
each prompt, so that none are selected by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw, ImageFont

from iris_fast.cli import CommandParser
from iris_fast.errors import UserError, report_error
from iris_fast.models.images import GAP_PIXELS, save_png
from iris_fast.run.curves import Point, moving_mean
from iris_fast.run.evaluation import Comparison, compare, read_evaluations
from iris_fast.run.log import read_metrics
from iris_fast.run.samples import Samples, read_strips, samples_of_same_prompts

PROGRAM = "docs/draw_run.py"
VERIFIER = "tiny_verifier"
CURVES = {
    "image_nsc": "NSC per image token (nats)",
    "text_nsc": "NSC per text token (nats)",
    f"metrics/{VERIFIER}": "Share of training images that the verifier accepts",
}
ROWS, IMAGES_PER_ROW = 4, 2
# Sizes in pixels.
WIDTH, MARGIN, GAP = 960, 16, 8
IMAGE_SIZE, FRAME_WIDTH = 128, 3
CELL = IMAGE_SIZE + 2 * FRAME_WIDTH
COLUMN_WIDTH = IMAGES_PER_ROW * (CELL + GAP)
TITLE_SIZE, TEXT_SIZE = 20, 14
TITLE_HEIGHT, LINE_HEIGHT = 32, 22
# Space around the plot of a curve, for its labels.
PLOT_LEFT, PLOT_TOP, PLOT_BOTTOM = 56, 28, 26
SUPERSAMPLING = 3  # lines are drawn larger and scaled down, which smooths them
TEXT_COLOUR, LABEL_COLOUR, PANEL_COLOUR = "#1a1a1a", "#555555", "#f6f6f6"
VALUES_COLOUR, MEAN_COLOUR = "#a9b9ea", "#1d4ed8"
ACCEPTED_COLOUR, NEUTRAL_COLOUR = "#16a34a", "#e0e0e0"


def draw_figure(run_folder: Path) -> Image.Image:
    """Draw the figure; UserError unless the folder has metrics and two sample grids to compare."""
    settings_file = run_folder / "config.yaml"
    rows = read_metrics(run_folder / "metrics.jsonl")
    grids = samples_of_same_prompts(run_folder / "samples")
    if not settings_file.is_file() or not rows or len(grids) < 2:
        raise UserError(
            f"run_folder: {run_folder} does not hold a run with metrics and two sample grids; give "
            "the folder of a run that was trained with --sample_steps"
        )
    settings = yaml.safe_load(settings_file.read_text(encoding="utf-8"))
    (before, before_path), (after, after_path) = grids[0], grids[-1]
    held_out = {found.metric: found for found in compare(read_evaluations(run_folder / "eval"))}
    header = describe(settings, before, after, held_out.get(VERIFIER))
    num_prompts = len(after.prompts)
    num_rows = min(ROWS, num_prompts)
    prompt_rows = [place * num_prompts // num_rows for place in range(num_rows)]
    top = MARGIN + TITLE_HEIGHT + LINE_HEIGHT * (len(header) - 1) + MARGIN
    height = top + LINE_HEIGHT + len(prompt_rows) * (LINE_HEIGHT + CELL + GAP) + MARGIN
    figure = Image.new("RGB", (WIDTH, height), "white")
    _write(figure, (MARGIN, MARGIN), header[0], size=TITLE_SIZE)
    for number, line in enumerate(header[1:]):
        _write(figure, (MARGIN, MARGIN + TITLE_HEIGHT + LINE_HEIGHT * number), line)
    for left, samples, path in (
        (MARGIN, before, before_path),
        (MARGIN + COLUMN_WIDTH + GAP, after, after_path),
    ):
        strips = read_strips(samples, path)
        _write(
            figure,
            (left, top),
            f"After {samples.step} steps" if samples.step else "Before training",
        )
        for place, row in enumerate(prompt_rows):
            row_top = top + LINE_HEIGHT + place * (LINE_HEIGHT + CELL + GAP)
            _write(figure, (left, row_top), samples.prompts[row], LABEL_COLOUR)
            _paste_images(figure, (left, row_top + LINE_HEIGHT), samples, strips[row], row)
    curves = {name: [(row["step"], row[name]) for row in rows if name in row] for name in CURVES}
    curves = {name: points for name, points in curves.items() if points}
    left = MARGIN + 2 * (COLUMN_WIDTH + GAP) + MARGIN
    curve_height = (height - MARGIN - top) // max(len(curves), 1)
    for place, (name, points) in enumerate(curves.items()):
        box = (left, top + place * curve_height, WIDTH - MARGIN, top + (place + 1) * curve_height)
        _draw_curve(figure, box, CURVES[name], points)
    return figure


def describe(
    settings: dict[str, Any], before: Samples, after: Samples, held_out: Comparison | None = None
) -> list[str]:
    """The header: what the model was trained on, and how the metrics of the samples changed, or
    accuracy on `held_out` images, of which there are more."""
    weighted = zip(settings["reward_funcs"], settings["reward_weights"], strict=True)
    rewards = [name if weight == 1 else f"{weight:g} x {name}" for name, weight in weighted]
    steps = f"{after.step} steps, rewarded by {' + '.join(rewards)} alone"
    lines = [f"Model {settings['model']}: {steps}"]
    first, last = before.means(), after.means()
    if "image_nsc" in last:
        change = f"from {first['image_nsc']:.2f} to {last['image_nsc']:.2f} nats"
        lines.append(f"NSC per image token of the samples: {change}.")
    if held_out:
        count = len(held_out.last.prompts) * held_out.last.per_prompt
        change = f"from {held_out.before.value:.0%} to {held_out.after.value:.0%}"
        lines.append(
            f"Share of {count} held-out images that the verifier accepts: {change} (green frames: "
            "the samples that it accepts)."
        )
    elif VERIFIER in last:
        count = len(after.prompts) * after.per_prompt
        change = f"from {first[VERIFIER]:.0%} to {last[VERIFIER]:.0%}"
        lines.append(
            f"Share of the {count} samples that the verifier accepts (green frame): {change}."
        )
    return lines


def _write(
    figure: Image.Image,
    position: tuple[float, float],
    text: str,
    colour: str = TEXT_COLOUR,
    anchor: str = "la",
    size: int = TEXT_SIZE,
) -> None:
    font = ImageFont.load_default(size=size)
    ImageDraw.Draw(figure).text(position, text, colour, font, anchor)


def _paste_images(
    figure: Image.Image, corner: tuple[int, int], samples: Samples, strip: Image.Image, row: int
) -> None:
    """Paste the first images of a prompt, each in a frame that shows the verifier's decision."""
    size = strip.height
    resample = Image.Resampling.NEAREST if size <= IMAGE_SIZE else Image.Resampling.LANCZOS
    accepted = samples.metrics.get(VERIFIER)
    for column in range(min(IMAGES_PER_ROW, samples.per_prompt)):
        left = GAP_PIXELS + column * (size + GAP_PIXELS)
        image = strip.crop((left, 0, left + size, size)).resize((IMAGE_SIZE, IMAGE_SIZE), resample)
        is_accepted = accepted is not None and accepted[row * samples.per_prompt + column] > 0
        frame = Image.new("RGB", (CELL, CELL), ACCEPTED_COLOUR if is_accepted else NEUTRAL_COLOUR)
        frame.paste(image, (FRAME_WIDTH, FRAME_WIDTH))
        figure.paste(frame, (corner[0] + column * (CELL + GAP), corner[1]))


def _draw_curve(
    figure: Image.Image, box: tuple[int, int, int, int], title: str, points: list[Point]
) -> None:
    """Draw values by step (thin) and their moving mean (bold) between the labels of the axes."""
    left, top, right, bottom = box
    steps, values = [step for step, _ in points], [value for _, value in points]
    low, high = min(values), max(values)
    plot_left, plot_top, plot_bottom = left + PLOT_LEFT, top + PLOT_TOP, bottom - PLOT_BOTTOM
    width, height = right - plot_left, plot_bottom - plot_top
    plot = Image.new("RGB", (width * SUPERSAMPLING, height * SUPERSAMPLING), PANEL_COLOUR)
    pen = ImageDraw.Draw(plot)
    for shown, colour, line_width in (
        (values, VALUES_COLOUR, 1),
        (moving_mean(values), MEAN_COLOUR, 3),
    ):
        line = [
            (
                plot.width * (0.02 + 0.96 * (step - steps[0]) / max(steps[-1] - steps[0], 1)),
                plot.height * (0.95 - 0.9 * (value - low) / ((high - low) or 1)),
            )
            for step, value in zip(steps, shown, strict=True)
        ]
        pen.line(line, colour, line_width * SUPERSAMPLING, "curve")
    figure.paste(plot.resize((width, height), Image.Resampling.LANCZOS), (plot_left, plot_top))
    _write(figure, (left, top), title)
    _write(figure, (plot_left - GAP, plot_top), f"{high:.3g}", LABEL_COLOUR, "ra")
    _write(figure, (plot_left - GAP, plot_bottom), f"{low:.3g}", LABEL_COLOUR, "rd")
    _write(figure, (plot_left, plot_bottom + 4), f"step {steps[0]}", LABEL_COLOUR)
    _write(figure, (right, plot_bottom + 4), f"step {steps[-1]}", LABEL_COLOUR, "ra")


def reduce_colours(figure: Image.Image) -> Image.Image:
    """The figure with a palette of 256 colours, a quarter of the size as PNG."""
    method, no_dither = Image.Quantize.MAXCOVERAGE, Image.Dither.NONE
    return figure.quantize(256, method=method, kmeans=3, dither=no_dither)


def main() -> int:
    """Run the command and return its exit code."""
    parser = CommandParser(prog=PROGRAM, description=__doc__.splitlines()[0])
    parser.add_argument("run_folder", type=Path, help="the --output_dir of a training run")
    parser.add_argument("target", type=Path, help="PNG file to write")
    try:
        options = parser.parse_args()
        if options.target.suffix.lower() != ".png":
            raise UserError(
                f"target: {options.target} is not a PNG file; give a name ending in .png"
            )
        save_png(reduce_colours(draw_figure(options.run_folder)), options.target)
    except UserError as error:
        return report_error(PROGRAM, error)
    print(f"figure: {options.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
