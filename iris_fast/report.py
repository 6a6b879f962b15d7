"""report.html: a run on one page that opens from disk, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

from iris_fast import __version__
from iris_fast.errors import writing
from iris_fast.log import read_metrics
from iris_fast.run_folder import RunFolder

CURVES = {
    "reward": "Reward",
    "reward_std_in_groups": "Spread of the reward inside groups",
    "image_nsc": "NSC per image token (nats)",
    "text_nsc": "NSC per text token (nats)",
    "image_entropy": "Entropy per image token (nats)",
    "kl": "KL to the reference per token (nats)",
    "grad_norm": "Gradient norm",
    "images_per_s": "Images per second",
}
WIDTH, HEIGHT, MARGIN = 320, 120, 8

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1, h2 { line-height: 1.2; }
.curves, .grids { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; max-width: 100%; }
.curves figure { width: 20rem; }
figcaption { font-size: .875rem; color: #444; }
img, svg { max-width: 100%; height: auto; }
svg { background: #f6f6f6; }
pre { overflow-x: auto; background: #f6f6f6; padding: .75rem; font-size: .8125rem; }
.warning { border-left: 4px solid #b45309; padding-left: .75rem; }
"""


def write_report(folder: RunFolder) -> None:
    """Render the run folder's files as `report.html`, replacing the one before. UserError if the
    disk does not take it."""
    rows = read_metrics(folder.metrics)
    page = "\n".join(
        [
            "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
            "<meta name='viewport' content='width=device-width, initial-scale=1'>",
            f"<title>{html.escape(folder.path.name)}: iris-fast</title><style>{STYLE}</style>",
            f"</head><body><h1>{html.escape(folder.path.name)}</h1>",
            f"<p>iris-fast {__version__}, {len(rows)} steps.</p>",
            _warnings(rows),
            "<h2>Curves</h2><div class='curves'>",
            *[_curve(rows, name, title) for name, title in CURVES.items()],
            "</div><h2>Samples</h2><p>The same prompts and the same random numbers every time.</p>",
            "<div class='grids'>",
            *[_picture(path) for path in _first_and_last(folder.samples)],
            "</div><h2>Settings</h2>",
            f"<pre>{html.escape((folder.path / 'config.yaml').read_text(encoding='utf-8'))}</pre>",
            "<p>To run it again: <code>torchrun -m iris_fast.train --config "
            f"{html.escape(str(folder.path / 'config.yaml'))} --output_dir NEW_FOLDER</code></p>",
            "</body></html>",
        ]
    )
    with writing("output_dir", folder.report):
        partial = folder.path / ".report.html.partial"
        partial.write_text(page, encoding="utf-8")
        partial.replace(folder.report)


def _warnings(rows: list[dict[str, Any]]) -> str:
    seen: dict[str, str] = {}
    for row in rows:
        for name, text in row["warnings"].items():
            seen.setdefault(name, f"step {row['step']}: {text}")
    return "".join(f"<p class='warning'>{html.escape(text)}</p>" for text in seen.values())


def _curve(rows: list[dict[str, Any]], name: str, title: str) -> str:
    points = [(row["step"], row[name]) for row in rows if name in row]
    if not points:
        return ""
    values = [value for _, value in points]
    low, high = min(values), max(values)
    first, last = points[0][0], points[-1][0]

    def place(step: float, value: float) -> str:
        x = MARGIN + (WIDTH - 2 * MARGIN) * (step - first) / max(last - first, 1)
        y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (value - low) / ((high - low) or 1)
        return f"{x:.1f},{y:.1f}"

    line = " ".join(place(*point) for point in points)
    label = (
        f"{title}: {values[0]:.4g} at step {first}, {values[-1]:.4g} at step {last}, "
        f"between {low:.4g} and {high:.4g}"
    )
    return (
        f"<figure><svg viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' role='img' "
        f"aria-label='{html.escape(label)}'><polyline points='{line}' fill='none' "
        f"stroke='#1d4ed8' stroke-width='2'/></svg><figcaption>{html.escape(label)}</figcaption>"
        "</figure>"
    )


def _first_and_last(samples: Path) -> list[Path]:
    grids = sorted(samples.glob("step_*.png"))
    return grids if len(grids) < 2 else [grids[0], grids[-1]]


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    step = int(path.stem.removeprefix("step_"))
    return (
        f"<figure><img src='data:image/png;base64,{data}' alt='Images at step {step}, one row a "
        f"prompt'><figcaption>Step {step}</figcaption></figure>"
    )
