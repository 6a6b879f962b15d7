"""The ablation's results as a page of Markdown and a figure, for `iris_fast.tiny.ablate`.

Nothing is left out and nothing is judged by hand: what the paper finds is written down in `PAPER`,
and a rule says whether the small world shows the same.
"""

from __future__ import annotations

from html import escape
from statistics import fmean, stdev
from typing import Any

from iris_fast.tiny.world import KINDS

Results = dict[str, Any]

MEASURES = {
    "mean": "accuracy",
    **{kind: kind.replace("_", " ") for kind in KINDS},
    "image_nsc": "NSC, image",
    "text_nsc": "NSC, text",
    "diversity": "diversity",
    "richness": "richness",
    "kl": "KL",
}
BASE = "nsc"
# What the paper (arXiv 2509.25562) finds, or chose for its method, where an arm differs from it.
PAPER = {
    "sc": "finds: uncertainty, not certainty, improves images",
    "image_nsc_text_sc": "chose: NSC of the text too",
    "image_sc_text_nsc": "chose: NSC of the image too",
    "backward_kl": "finds: KL(U, p) does better than entropy",
    "no_cot": "chose: a chain of thought",
    "direct": "finds: direct optimisation collapses",
}
COLUMNS, PANEL_WIDTH, LABEL_WIDTH, LINE, HEAD, FOOT = 3, 360, 130, 16, 26, 22


def page(results: Results) -> str:
    """Markdown: what was run, everything measured, and where that agrees with the paper."""
    seeds = ", ".join(map(str, results["seeds"]))
    parts = [
        "# Ablations in the small world",
        f"{results['steps']} steps from seeds {seeds}, every arm with the hyperparameters of the "
        f"preset `tiny`, each measured on {results['pictures']} pictures of the held-out prompts, "
        "with the same random numbers before and after. Mean ± standard deviation over seeds. "
        f"Commit {results['commit']}; {results['hardware']}.",
        "![every arm and seed](ablation.svg)",
        "A dot is a run, a bar the mean of an arm, a dashed line the untrained model.",
        table(results),
        "NSC is per token (nats), KL that to the untrained model per token in the last step "
        "(nats). Accuracy is the mean of the six kinds.",
        "## The paper's reward against the others",
        comparison(results),
        "Differences are taken seed by seed. Agrees: the paper's side is ahead from every seed; "
        "disagrees: behind from every one; else undecided. With three seeds and no effect at all, "
        "one in four comes out one way or the other.",
    ]
    if results["failed"]:
        parts += ["## Not finished", *(f"- {k}: {v}" for k, v in results["failed"].items())]
    return "\n\n".join(parts) + "\n"


def table(results: Results) -> str:
    """A line an arm, and one for each way of drawing with the untrained model."""
    lines = [f"| arm | {' | '.join(MEASURES.values())} |", "|---|" + "---|" * len(MEASURES)]
    starts: dict[str, tuple[str, dict[str, float]]] = {}
    for name, arm in results["arms"].items():
        starts.setdefault(str(arm["before"]), (name, arm["before"]))
    for name, before in starts.values():
        shown = [f"{before[key]:.3f}" if key in before else "" for key in MEASURES]
        lines.append(f"| untrained, drawn as {name} | {' | '.join(shown)} |")
    for name, arm in results["arms"].items():
        runs = list(arm["after"].values())
        shown = [spread([run[key] for run in runs if key in run]) for key in MEASURES]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def comparison(results: Results) -> str:
    """Accuracy of the paper's arm minus that of each other, and of its own start."""
    lines = [
        f"| {BASE} minus | difference in accuracy | the paper | the small world |",
        "|---|---|---|---|",
    ]
    base = results["arms"].get(BASE, {"before": {}, "after": {}})
    ours = {seed: run["mean"] for seed, run in base["after"].items()}
    rows = {"untrained": ({seed: base["before"]["mean"] for seed in ours}, "finds: training helps")}
    for name, arm in results["arms"].items():
        if name != BASE:
            theirs = {seed: run["mean"] for seed, run in arm["after"].items()}
            rows[name] = (theirs, PAPER.get(name, ""))
    for name, (theirs, claim) in rows.items():
        gaps = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
        lines.append(f"| {name} | {spread(gaps)} | {claim} | {verdict(gaps) if claim else ''} |")
    return "\n".join(lines)


def verdict(gaps: list[float]) -> str:
    """Whether a difference that the paper finds positive is so from every seed."""
    if gaps and min(gaps) > 0:
        return "agrees"
    return "disagrees" if gaps and max(gaps) < 0 else "undecided"


def spread(values: list[float]) -> str:
    """Mean ± standard deviation, as far as there are values."""
    if not values:
        return ""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def draw(results: Results) -> str:
    """SVG: a panel a measure, a line an arm; a dot a seed, a bar their mean, a dash the start."""
    height = HEAD + LINE * len(results["arms"]) + FOOT
    rows = -(-len(MEASURES) // COLUMNS)
    panels = [
        f"<g transform='translate({i % COLUMNS * PANEL_WIDTH},{i // COLUMNS * height})'>"
        f"{_panel(results, key, title)}</g>"
        for i, (key, title) in enumerate(MEASURES.items())
    ]
    width, height = COLUMNS * PANEL_WIDTH, rows * height
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' "
        "font-family='system-ui, sans-serif' font-size='11' fill='#222'>"
        f"<rect width='{width}' height='{height}' fill='#fff'/>{''.join(panels)}</svg>\n"
    )


def _panel(results: Results, key: str, title: str) -> str:
    arms = results["arms"]
    values = {
        name: [run[key] for run in arm["after"].values() if key in run]
        for name, arm in arms.items()
    }
    starts = {name: arm["before"][key] for name, arm in arms.items() if key in arm["before"]}
    shown = [*(value for mine in values.values() for value in mine), *starts.values()]
    low, high = (min(shown), max(shown)) if shown else (0.0, 0.0)
    left, right = LABEL_WIDTH, PANEL_WIDTH - 20

    def place(value: float) -> str:
        return f"{left + (right - left) * (value - low) / ((high - low) or 1):.1f}"

    def mark(value: float, y: int, style: str) -> str:
        x = place(value)
        return f"<line x1='{x}' x2='{x}' y1='{y - 6}' y2='{y + 6}' {style}/>"

    parts = [f"<text x='{left}' y='14' font-weight='bold'>{escape(title)}</text>"]
    for line, name in enumerate(arms):
        y = HEAD + LINE * line + LINE // 2
        parts += [
            f"<text x='{left - 10}' y='{y + 4}' text-anchor='end'>{escape(name)}</text>",
            f"<line x1='{left}' x2='{right}' y1='{y}' y2='{y}' stroke='#ddd'/>",
        ]
        if name in starts:
            parts.append(mark(starts[name], y, "stroke='#777' stroke-dasharray='2 2'"))
        parts += [
            f"<circle cx='{place(value)}' cy='{y}' r='3' fill='#b45309' opacity='.6'/>"
            for value in values[name]
        ]
        if values[name]:
            parts.append(mark(fmean(values[name]), y, "stroke='#1d4ed8' stroke-width='2.5'"))
    foot = HEAD + LINE * len(arms) + 12
    parts += [
        f"<text x='{left}' y='{foot}'>{low:.3g}</text>",
        f"<text x='{right}' y='{foot}' text-anchor='end'>{high:.3g}</text>",
    ]
    return "".join(parts)
