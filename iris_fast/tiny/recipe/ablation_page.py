"""Markdown page and SVG figure of an ablation's results, for `iris_fast.tiny.recipe.ablate`.

Both show all results. `PAPER` lists the paper's findings; the rule in `verdict` decides whether the
synthetic world reproduces each of them.
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
INITIAL = "initial model"
# What the paper (arXiv 2509.25562) finds, or which choice of its method an arm changes.
PAPER = {
    ("mean", INITIAL): "finds: training helps",
    ("mean", "sc"): "finds: rewarding uncertainty, not certainty, improves images",
    ("mean", "image_nsc_text_sc"): "uses NSC of text and image",
    ("mean", "image_sc_text_nsc"): "uses NSC of text and image",
    ("mean", "backward_kl"): "finds: KL(U, p) is a better reward than entropy",
    ("mean", "no_cot"): "uses a chain of thought",
    ("mean", "direct"): "finds: direct optimisation collapses",
    ("diversity", "sc"): "finds: models rewarded for certainty generate uniform images",
    ("richness", "sc"): "finds: models rewarded for certainty generate simple images",
}
OFF_SCALE = "direct"  # ignored for the axis ranges: its values are far from all others
COLUMNS, PANEL_WIDTH, LABEL_WIDTH, LINE, HEAD, FOOT = 3, 360, 130, 16, 26, 22


def page(results: Results) -> str:
    """The results as Markdown: setup, all measurements, and the comparison with the paper."""
    seeds = ", ".join(map(str, results["seeds"]))
    parts = [
        "# Ablations in the synthetic world",
        f"{results['steps']} training steps with seeds {seeds}. All arms use the hyperparameters "
        f"of the preset `tiny` and are measured on {results['pictures']} images of the held-out "
        "prompts, with the same random numbers before and after training. Values are mean ± "
        f"standard deviation over seeds. Commit {results['commit']}; {results['hardware']}.",
        "![Results of all arms and seeds](ablation.svg)",
        "Dots are runs, solid bars the mean of an arm, dashed bars the initial model. The axes "
        "ignore direct optimisation; its values outside the axes are shown at the edge.",
        table(results),
        "Accuracy is the share of images that the verifier accepts, averaged over the six kinds. "
        "NSC is per token, in nats. KL is the divergence from the initial model per token in the "
        "last training step, in nats.",
        "## The paper's reward compared with the other arms",
        comparison(results),
        "Differences are per seed. The synthetic world agrees with the paper if the difference is "
        "positive for every seed, disagrees if it is negative for every seed, and is undecided "
        "otherwise. With three seeds and no effect, one comparison in four is decided by chance.",
    ]
    if results["failed"]:
        parts += ["## Not finished", *(f"- {k}: {v}" for k, v in results["failed"].items())]
    return "\n\n".join(parts) + "\n"


def table(results: Results) -> str:
    """Table with one row per arm, and one for the initial model per distinct sampling setting."""
    lines = [f"| arm | {' | '.join(MEASURES.values())} |", "|---|" + "---|" * len(MEASURES)]
    initial: dict[str, tuple[str, dict[str, float]]] = {}
    for name, arm in results["arms"].items():
        initial.setdefault(str(arm["before"]), (name, arm["before"]))
    for name, before in initial.values():
        shown = [f"{before[key]:.3f}" if key in before else "" for key in MEASURES]
        lines.append(f"| initial model, sampled as {name} | {' | '.join(shown)} |")
    for name, arm in results["arms"].items():
        runs = list(arm["after"].values())
        shown = [mean_and_std([run[key] for run in runs if key in run]) for key in MEASURES]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def comparison(results: Results) -> str:
    """Table of differences between the paper's arm and the others, and the paper's findings.

    It compares accuracy for every arm, and other measures where `PAPER` has a finding.
    """
    lines = [
        f"| {BASE} minus | measure | difference | paper | synthetic world |",
        "|---|---|---|---|---|",
    ]
    others = [INITIAL, *(name for name in results["arms"] if name != BASE)]
    compared = [("mean", name) for name in others]
    compared += [pair for pair in PAPER if pair[0] != "mean" and pair[1] in others]
    for measure, name in compared:
        values, claim = differences(results, measure, name), PAPER.get((measure, name), "")
        outcome = verdict(values) if claim else ""
        lines.append(
            f"| {name} | {MEASURES[measure]} | {mean_and_std(values)} | {claim} | {outcome} |"
        )
    return "\n".join(lines)


def differences(results: Results, measure: str, name: str) -> list[float]:
    """Per seed: a measure of the paper's arm minus that of arm `name` or of the initial model."""
    base = results["arms"].get(BASE, {"before": {}, "after": {}})
    ours = {seed: run[measure] for seed, run in base["after"].items()}
    if name == INITIAL:
        return [value - base["before"][measure] for value in ours.values()]
    theirs = {seed: run[measure] for seed, run in results["arms"][name]["after"].items()}
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def verdict(values: list[float]) -> str:
    """Whether differences that are positive in the paper are positive for every seed."""
    if values and min(values) > 0:
        return "agrees"
    return "disagrees" if values and max(values) < 0 else "undecided"


def mean_and_std(values: list[float]) -> str:
    """`mean ± standard deviation`, the mean alone for one value, nothing for none."""
    if not values:
        return ""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def figure(results: Results) -> str:
    """The results as SVG with one panel per measure and one line per arm.

    Dots are seeds, solid bars their mean, dashed bars the initial model.
    """
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
    initial = {name: arm["before"][key] for name, arm in arms.items() if key in arm["before"]}
    on_scale = [runs for name, runs in values.items() if name != OFF_SCALE] or values.values()
    shown = [*(value for runs in on_scale for value in runs), *initial.values()]
    low, high = (min(shown), max(shown)) if shown else (0.0, 0.0)
    left, right = LABEL_WIDTH, PANEL_WIDTH - 20

    def x_of(value: float) -> str:
        share = (value - low) / ((high - low) or 1)
        return f"{left + (right - left) * min(max(share, 0.0), 1.0):.1f}"

    def bar(value: float, y: int, style: str) -> str:
        x = x_of(value)
        return f"<line x1='{x}' x2='{x}' y1='{y - 6}' y2='{y + 6}' {style}/>"

    parts = [f"<text x='{left}' y='14' font-weight='bold'>{escape(title)}</text>"]
    for line, name in enumerate(arms):
        y = HEAD + LINE * line + LINE // 2
        parts += [
            f"<text x='{left - 10}' y='{y + 4}' text-anchor='end'>{escape(name)}</text>",
            f"<line x1='{left}' x2='{right}' y1='{y}' y2='{y}' stroke='#ddd'/>",
        ]
        if name in initial:
            parts.append(bar(initial[name], y, "stroke='#777' stroke-dasharray='2 2'"))
        parts += [
            f"<circle cx='{x_of(value)}' cy='{y}' r='3' fill='#b45309' opacity='.6'/>"
            for value in values[name]
        ]
        if values[name]:
            mean = fmean(values[name])
            parts.append(bar(mean, y, "stroke='#1d4ed8' stroke-width='2.5'"))
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
