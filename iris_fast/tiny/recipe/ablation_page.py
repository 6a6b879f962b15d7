"""The ablation's results as a page of Markdown and a figure, for `iris_fast.tiny.recipe.ablate`.

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
UNTRAINED = "untrained"
# What the paper (arXiv 2509.25562) finds, or chose for its method, where an arm differs from it.
PAPER = {
    ("mean", UNTRAINED): "finds: training helps",
    ("mean", "sc"): "finds: uncertainty, not certainty, improves images",
    ("mean", "image_nsc_text_sc"): "chose: NSC of the text too",
    ("mean", "image_sc_text_nsc"): "chose: NSC of the image too",
    ("mean", "backward_kl"): "finds: KL(U, p) does better than entropy",
    ("mean", "no_cot"): "chose: a chain of thought",
    ("mean", "direct"): "finds: direct optimisation collapses",
    ("diversity", "sc"): "finds: certain models draw uniform images",
    ("richness", "sc"): "finds: certain models draw simple images",
}
OFF_SCALE = "direct"  # lies so far from the others that they would be one dot on its scale
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
        "A dot is a run, a bar the mean of an arm, a dashed line the untrained model. Direct "
        "optimisation does not shape the scales: where it lies off them it is put at the edge.",
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
    """The paper's arm minus its own start and each other: accuracy, and where the paper says
    something of it, another measure."""
    lines = [
        f"| {BASE} minus | of | difference | the paper | the small world |",
        "|---|---|---|---|---|",
    ]
    others = [UNTRAINED, *(name for name in results["arms"] if name != BASE)]
    asked = [("mean", name) for name in others]
    asked += [pair for pair in PAPER if pair[0] != "mean" and pair[1] in others]
    for measure, name in asked:
        found, claim = gaps(results, measure, name), PAPER.get((measure, name), "")
        told = verdict(found) if claim else ""
        lines.append(f"| {name} | {MEASURES[measure]} | {spread(found)} | {claim} | {told} |")
    return "\n".join(lines)


def gaps(results: Results, measure: str, name: str) -> list[float]:
    """What the paper's arm has more of a measure than arm `name`, or than its start, per seed."""
    base = results["arms"].get(BASE, {"before": {}, "after": {}})
    ours = {seed: run[measure] for seed, run in base["after"].items()}
    if name == UNTRAINED:
        return [value - base["before"][measure] for value in ours.values()]
    theirs = {seed: run[measure] for seed, run in results["arms"][name]["after"].items()}
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


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
    scale = [mine for name, mine in values.items() if name != OFF_SCALE] or values.values()
    shown = [*(value for mine in scale for value in mine), *starts.values()]
    low, high = (min(shown), max(shown)) if shown else (0.0, 0.0)
    left, right = LABEL_WIDTH, PANEL_WIDTH - 20

    def place(value: float) -> str:
        share = (value - low) / ((high - low) or 1)
        return f"{left + (right - left) * min(max(share, 0.0), 1.0):.1f}"

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
            mean = fmean(values[name])
            parts.append(mark(mean, y, "stroke='#1d4ed8' stroke-width='2.5'"))
            if not low <= mean <= high:
                x, anchor = (left + 10, "start") if mean < low else (right - 10, "end")
                parts.append(
                    f"<text x='{x}' y='{y + 4}' text-anchor='{anchor}'>off scale: {mean:.3g}</text>"
                )
    foot = HEAD + LINE * len(arms) + 12
    parts += [
        f"<text x='{left}' y='{foot}'>{low:.3g}</text>",
        f"<text x='{right}' y='{foot}' text-anchor='end'>{high:.3g}</text>",
    ]
    return "".join(parts)
