"""report.html: a run on one page that opens from disk, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from iris_fast import __version__
from iris_fast.errors import replacing
from iris_fast.models.images import strips
from iris_fast.run.curves import Point, curve
from iris_fast.run.folder import RunFolder
from iris_fast.run.log import read_metrics
from iris_fast.run.provenance import command, commit, hardware
from iris_fast.run.samples import Samples, read_samples

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
NAMES = {
    "image_nsc": "NSC, image",
    "text_nsc": "NSC, text",
    "tiny_verifier": "right (verifier)",
}
WHEN = {1: ("Before",), 2: ("Before", "After"), 3: ("Before", "During", "After")}
# Above this height a picture is a photograph's size, and JPEG a tenth of PNG's.
JPEG_FROM_PIXELS = 200

STYLE = """
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 75rem; margin: 0 auto; padding: 1rem; overflow-wrap: break-word; }
h1, h2, h3 { line-height: 1.25; margin: 1.5rem 0 .5rem; }
h3 { font-size: 1.05rem; margin-top: 1rem; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); }
figure { margin: 0; min-width: 0; }
figcaption, .note { font-size: .875rem; color: #444; }
img, svg { display: block; width: 100%; height: auto; }
img { image-rendering: pixelated; max-width: 36rem; }
svg { background: #f6f6f6; font-size: 11px; fill: #444; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .75rem .2rem 0; text-align: left; vertical-align: top;
         font-weight: normal; }
th { color: #444; }
.facts td { overflow-wrap: anywhere; }
.numbers td, .numbers thead th + th { text-align: right; }
pre { overflow-x: auto; background: #f6f6f6; padding: .75rem; font-size: .8125rem; }
code { white-space: pre-wrap; }
input { font: inherit; padding: .4rem .6rem; width: min(100%, 24rem); border: 1px solid #666;
        border-radius: .25rem; }
.warning { border-left: 4px solid #b45309; padding-left: .75rem; }
[hidden] { display: none; }
"""
FILTER = """
const box = document.getElementById("filter"), rows = [...document.querySelectorAll(".prompt")];
box.addEventListener("input", () => {
  const words = box.value.toLowerCase().split(" ");
  for (const row of rows) row.hidden = !words.every(word => row.dataset.prompt.includes(word));
  const shown = rows.filter(row => !row.hidden).length;
  document.getElementById("shown").textContent = `${shown} of ${rows.length} prompts`;
});
"""


def write_report(folder: RunFolder) -> None:
    """Render the run folder's files as `report.html`, replacing the one before. UserError if the
    disk does not take it."""
    rows = read_metrics(folder.metrics)
    config = (folder.path / "config.yaml").read_text(encoding="utf-8")
    settings = yaml.safe_load(config)
    grids = _before_during_after(folder.samples)
    title = escape(folder.path.name)
    page = "\n".join(
        [
            "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
            "<meta name='viewport' content='width=device-width, initial-scale=1'>",
            f"<title>{title}: iris-fast</title><style>{STYLE}</style></head><body>",
            f"<main><h1>{title}</h1>",
            _what_was_run(settings, rows),
            _warnings(rows),
            _samples(grids),
            "<h2>Curves</h2><p class='note'>Thin: every step. Bold: a moving mean.</p>",
            f"<div class='cards'>{''.join(_curves(rows))}</div>",
            f"<h2>All settings</h2><details><summary>config.yaml</summary><pre>{escape(config)}"
            "</pre></details>",
            f"</main><script>{FILTER if grids else ''}</script></body></html>",
        ]
    )
    with replacing("output_dir", folder.report) as partial:
        partial.write_text(page, encoding="utf-8")


def _what_was_run(settings: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    weights = settings.get("reward_weights") or []
    rewards = zip(settings.get("reward_funcs") or [], weights, strict=False)
    seconds = sum(row["rollout_s"] + row["train_s"] for row in rows if "train_s" in row)
    shape = ("learning_rate", "beta", "num_generations", "cfg_weight", "temperature", "seed")
    attention = {row["attn_implementation"]: None for row in rows if "attn_implementation" in row}
    facts = {
        "Done": f"{len(rows)} steps of {settings.get('max_steps', '?')} in {seconds / 60:.1f} min",
        "Model": settings.get("model"),
        "Reward": " + ".join(f"{weight:g} × {name}" for name, weight in rewards),
        "Settings": ", ".join(f"{name} {settings[name]}" for name in shape if name in settings),
        "Code": f"iris-fast {__version__}, commit {commit()}",
        "Hardware": hardware(),
        "Attention": ", then ".join(attention) or "not known",
    }
    lines = [
        f"<tr><th scope='row'>{k}</th><td>{escape(str(v))}</td></tr>" for k, v in facts.items()
    ]
    return (
        f"<table class='facts'>{''.join(lines)}</table><h2>Run it again</h2>"
        f"<pre><code>{escape(command(settings))}</code></pre>"
    )


def _warnings(rows: list[dict[str, Any]]) -> str:
    seen: dict[str, str] = {}
    for row in rows:
        for name, text in row["warnings"].items():
            seen.setdefault(name, f"step {row['step']}: {text}")
    if not seen:
        return ""
    told = "".join(f"<p class='warning'>{escape(text)}</p>" for text in seen.values())
    return f"<h2>Warnings</h2>{told}"


def _curves(rows: list[dict[str, Any]]) -> list[str]:
    measured = sorted({name for row in rows for name in row if name.startswith("metrics/")})
    titles = CURVES | {name: NAMES.get(name[8:], name[8:]).capitalize() for name in measured}
    figures = []
    for name, title in titles.items():
        points: list[Point] = [(row["step"], row[name]) for row in rows if name in row]
        dots: list[Point] = []
        if name == "reward_std_in_groups":
            groups = [(row["step"], row.get("reward_std_by_group", [])) for row in rows]
            dots = [(step, value) for step, values in groups for value in values]
        if points:
            figures.append(curve(title, points, dots))
    return figures


def _before_during_after(samples: Path) -> list[tuple[Samples, list[Image.Image]]]:
    """The first, a middle and the last grid of the same prompts, each with its rows."""
    paths = sorted(samples.glob("step_*.png"))
    grids = [(read_samples(path), path) for path in paths if path.with_suffix(".json").is_file()]
    # A resumed run may have been told to show more prompts, or fewer.
    grids = [(sample, path) for sample, path in grids if sample.prompts == grids[-1][0].prompts]
    if len(grids) > 2:
        first, last = grids[0], grids[-1]
        middle = (first[0].step + last[0].step) / 2
        grids = [first, min(grids[1:-1], key=lambda g: abs(g[0].step - middle)), last]
    opened = []
    for sample, path in grids:
        with Image.open(path) as sheet:
            opened.append((sample, strips(sheet, len(sample.prompts), sample.per_prompt)))
    return opened


def _samples(grids: list[tuple[Samples, list[Image.Image]]]) -> str:
    if not grids:
        return ""
    prompts = grids[-1][0].prompts
    options = "".join(f"<option value='{escape(prompt)}'>" for prompt in dict.fromkeys(prompts))
    sections = []
    for row, prompt in enumerate(prompts):
        cells = "".join(_cell(when, grid, row) for when, grid in _named(grids))
        sections.append(
            f"<section class='prompt' data-prompt='{escape(prompt.lower())}'>"
            f"<h3>{escape(prompt)}</h3><div class='cards'>{cells}</div></section>"
        )
    return (
        "<h2>Pictures</h2><p class='note'>The same prompts and the same random numbers every time."
        f"</p>{_means(grids)}<p><label for='filter'>Show prompts with </label>"
        "<input id='filter' type='search' list='prompts' autocomplete='off'> "
        f"<span id='shown' role='status' class='note'>{len(prompts)} of {len(prompts)} prompts"
        f"</span></p><datalist id='prompts'>{options}</datalist>{''.join(sections)}"
    )


def _named(grids: list[tuple[Samples, list[Image.Image]]]) -> list[tuple[str, Any]]:
    return list(zip(WHEN[len(grids)], grids, strict=True))


def _means(grids: list[tuple[Samples, list[Image.Image]]]) -> str:
    """What was measured of the pictures, averaged: a line a metric, a column a grid."""
    head = "".join(
        f"<th scope='col'>{when}<br>step {grid[0].step}</th>" for when, grid in _named(grids)
    )
    means = [sample.means() for sample, _ in grids]
    lines = [
        f"<tr><th scope='row'>{escape(NAMES.get(name, name))}</th>"
        + "".join(f"<td>{mean[name]:.3f}</td>" if name in mean else "<td></td>" for mean in means)
        + "</tr>"
        for name in means[-1]
    ]
    return (
        f"<table class='numbers'><thead><tr><th scope='col'>mean</th>{head}</tr>"
        f"</thead><tbody>{''.join(lines)}</tbody></table>"
    )


def _cell(when: str, grid: tuple[Samples, list[Image.Image]], row: int) -> str:
    """One prompt's pictures at one step."""
    samples, strip = grid[0], grid[1][row]
    mine = slice(row * samples.per_prompt, (row + 1) * samples.per_prompt)
    numbers = ", ".join(
        f"{NAMES.get(name, name)} {sum(values[mine]) / samples.per_prompt:.2f}"
        for name, values in samples.metrics.items()
    )
    alt = f"{when} (step {samples.step}): {samples.per_prompt} pictures of {samples.prompts[row]}"
    thoughts = "".join(f"<li>{escape(text)}</li>" for text in samples.cot[mine] if text)
    told = thoughts and (
        f"<details><summary>chains of thought</summary><ol>{thoughts}</ol></details>"
    )
    return (
        f"<figure><img src='{_data_url(strip)}' alt='{escape(alt)}' width='{strip.width}' "
        f"height='{strip.height}'><figcaption><strong>{when}, step {samples.step}</strong>: "
        f"{escape(numbers)}{told}</figcaption></figure>"
    )


def _data_url(picture: Image.Image) -> str:
    form = "jpeg" if picture.height >= JPEG_FROM_PIXELS else "png"
    data = io.BytesIO()
    picture.save(data, form, quality=90)
    return f"data:image/{form};base64,{base64.b64encode(data.getvalue()).decode()}"
