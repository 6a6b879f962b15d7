"""report.html: a run on one page that opens from disk and loads nothing from elsewhere."""

import base64
import io
import math
from pathlib import Path
from typing import Any

import jinja2
import yaml
from PIL import Image

from iris_fast import __version__
from iris_fast.errors import atomic_write
from iris_fast.models.images import cells
from iris_fast.rewards.alignment import by_metric, pooled_alignments
from iris_fast.rewards.table import title
from iris_fast.run.best import Judge
from iris_fast.run.checkpoint import describe_best
from iris_fast.run.curves import Curve, Point
from iris_fast.run.evaluation import Evaluation, comparable, compare, read_evaluations
from iris_fast.run.folder import RunFolder
from iris_fast.run.log import read_metrics
from iris_fast.run.provenance import command, commit, hardware
from iris_fast.run.samples import Samples, read_strips, samples_of_same_prompts

CURVES = {
    "reward": "Reward",
    "reward_std_in_groups": "Spread of the reward inside groups (dots: each group)",
    "image_nsc": "NSC per image token (nats)",
    "text_nsc": "NSC per text token (nats)",
    "image_entropy": "Entropy per image token (nats)",
    "kl": "KL to the reference per token (nats)",
    "grad_norm": "Gradient norm",
    "images_per_s": "Images per second",
}
WHEN = {0: (), 1: ("Before",), 2: ("Before", "After"), 3: ("Before", "During", "After")}
JPEG_MIN_HEIGHT = 200  # pixels; of photographs JPEG takes a tenth of PNG's bytes
# CSS pixels: small images are enlarged by the first whole factor that reaches SHOWN_MIN, larger
# ones are shown at up to SHOWN_MAX.
SHOWN_MIN, SHOWN_MAX = 112, 192

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_report(folder: RunFolder) -> None:
    """Render the run folder's files as `report.html`. UserError if it cannot be written."""
    rows = read_metrics(folder.metrics)
    config = folder.config.read_text(encoding="utf-8")
    settings = yaml.safe_load(config)
    evaluations = comparable(read_evaluations(folder.evaluations))
    page = TEMPLATES.get_template("report.html.jinja").render(
        name=folder.path.name,
        facts=_facts(settings, rows) | _best(folder, settings, rows),
        command=command(folder.path),
        evaluations=evaluations,
        comparisons=compare(evaluations),
        metric_funcs=settings.get("metric_funcs") or [],
        warnings=_first_warnings(rows),
        alignments=by_metric(pooled_alignments(rows, settings.get("num_iterations", 1))),
        grids=_grids(folder.samples),
        data_url=_data_url,
        shown_size=_shown_size,
        title=title,
        curves=_evaluation_curves(evaluations) + _curves(rows),
        config=config,
    )
    with atomic_write("output_dir", folder.report) as partial:
        partial.write_text(page, encoding="utf-8")


def _facts(settings: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    rewards = zip(settings["reward_funcs"], settings["reward_weights"], strict=True)
    seconds = sum(row["rollout_s"] + row["train_s"] for row in rows if "train_s" in row)
    shown = ("learning_rate", "beta", "num_generations", "cfg_weight", "temperature", "seed")
    attention = {row["attn_implementation"]: None for row in rows if "attn_implementation" in row}
    return {
        "Done": f"{len(rows)} steps of {settings.get('max_steps', '?')} in {seconds / 60:.1f} min",
        "Model": settings.get("model"),
        "Reward": " + ".join(f"{weight:g} × {name}" for name, weight in rewards),
        "Settings": ", ".join(f"{name} {settings[name]}" for name in shown if name in settings),
        "Code": f"iris-fast {__version__}, commit {commit()}",
        "Hardware": hardware(),
        "Attention": ", then ".join(attention) or "not known",
    }


def _best(
    folder: RunFolder, settings: dict[str, Any], rows: list[dict[str, Any]]
) -> dict[str, str]:
    found = describe_best(folder.checkpoints, Judge.of(settings, rows))
    return {"Best checkpoint": found} if found else {}


def _first_warnings(rows: list[dict[str, Any]]) -> list[str]:
    """Each warning once, as it was at the first step that had it."""
    first: dict[str, str] = {}
    for row in rows:
        for name, text in row["warnings"].items():
            first.setdefault(name, f"step {row['step']}: {text}")
    return list(first.values())


def _curves(rows: list[dict[str, Any]]) -> list[Curve]:
    metrics = sorted({name for row in rows for name in row if name.startswith("metrics/")})
    titles = CURVES | {name: title(name.partition("/")[2]).capitalize() for name in metrics}
    curves = []
    for name, heading in titles.items():
        points: list[Point] = [(row["step"], row[name]) for row in rows if name in row]
        dots: list[Point] = []
        if name == "reward_std_in_groups":
            stds = "reward_std_by_group"
            dots = [(row["step"], std) for row in rows for std in row.get(stds, [])]
        if points:
            curves.append(Curve(heading, points, dots))
    return curves


def _evaluation_curves(evaluations: list[Evaluation]) -> list[Curve]:
    """Of each metric of more than two evaluations; two are in the table."""
    curves = []
    for name in evaluations[-1].metrics if len(evaluations) > 2 else []:
        known = [found for found in evaluations if name in found.metrics]
        means = [(found.step, found.mean(name).value) for found in known]
        curves.append(Curve(f"Held-out prompts: {title(name)}", means, []))
    return curves


def _grids(folder: Path) -> list[tuple[str, Samples, list[list[Image.Image]]]]:
    """The first, a middle and the last grid: its label, its samples, and the images by prompt."""
    grids = samples_of_same_prompts(folder)
    if len(grids) > 2:
        first, last = grids[0], grids[-1]
        middle = (first[0].step + last[0].step) / 2
        grids = [first, min(grids[1:-1], key=lambda grid: abs(grid[0].step - middle)), last]
    return [
        (when, samples, [cells(s, samples.per_prompt) for s in read_strips(samples, path)])
        for when, (samples, path) in zip(WHEN[len(grids)], grids, strict=True)
    ]


def _shown_size(image: Image.Image) -> int:
    """Width and height in CSS pixels; a whole factor keeps the pixels of a small image square."""
    factor = math.ceil(SHOWN_MIN / image.height)
    return image.height * factor if factor > 1 else min(image.height, SHOWN_MAX)


def _data_url(image: Image.Image) -> str:
    file_format = "jpeg" if image.height >= JPEG_MIN_HEIGHT else "png"
    data = io.BytesIO()
    image.save(data, file_format, quality=90)
    return f"data:image/{file_format};base64,{base64.b64encode(data.getvalue()).decode()}"
