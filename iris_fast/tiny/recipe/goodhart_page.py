"""Markdown page and SVG figure of accuracy over KL, for `iris_fast.tiny.recipe.goodhart`."""

from __future__ import annotations

import math
from html import escape
from typing import Any

Results = dict[str, Any]
Point = dict[str, Any]  # step, kl, images, mean (accuracy) and other measurements

COLOURS = ("#1d4ed8", "#b45309", "#047857", "#7c3aed", "#be123c")
WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 440, 34, 240


def page(results: Results) -> str:
    """What the curves say, the figure, and all checkpoints."""
    points = [
        point for runs in results["rewards"].values() for run in runs.values() for point in run
    ]
    pictures = max((point["images"] for point in points), default=0)
    parts = [
        "# Accuracy over KL",
        f"Up to {results['steps']} training steps with the hyperparameters of the preset `tiny`; "
        f"every checkpoint is measured on {pictures} images of held-out prompts, with the same "
        "random numbers. ±: standard error of images that are independent. Commit "
        f"{results['commit']}; {results['hardware']}.",
        "\n".join(f"- {conclusion(name, runs)}" for name, runs in results["rewards"].items()),
        "![Accuracy over KL](goodhart.svg)",
        "KL is the divergence from the initial model per token, in nats, averaged over the steps "
        "around a checkpoint. `--max_kl` is compared with the KL of single steps, which scatter "
        "around that. The highest of several accuracies is too high by chance.",
    ]
    for name, runs in results["rewards"].items():
        for seed, run in runs.items():
            parts += [f"## {name}, seed {seed}", f"{describe(run)}.", table(run)]
    if results["failed"]:
        parts += ["## Failed", "\n".join(f"- {k}: {v}" for k, v in results["failed"].items())]
    return "\n\n".join(part for part in parts if part) + "\n"


def standard_error(point: Point) -> float:
    """Of the accuracy, if images were independent."""
    return math.sqrt(point["mean"] * (1 - point["mean"]) / point["images"])


def is_clearly_above(point: Point, other: Point) -> bool:
    """Whether the accuracy is higher by more than two standard errors of the difference."""
    error = math.hypot(standard_error(point), standard_error(other))
    return point["mean"] - other["mean"] > 2 * error


def peak(run: list[Point]) -> Point:
    """The checkpoint with the highest accuracy, the first of equal ones."""
    return max(run[1:], key=lambda point: point["mean"])


def describe(run: list[Point]) -> str:
    """Accuracy before training, at its highest, and at the last checkpoint."""
    shown = [f"Accuracy {run[0]['mean']:.3f} before training"]
    if run[1:]:
        best, last = peak(run), run[-1]
        shown.append(
            f"highest after step {best['step']} with {best['mean']:.3f} ± "
            f"{standard_error(best):.3f} at KL {best['kl']:.2g}"
        )
        shown.append(f"after step {last['step']} {last['mean']:.3f} at KL {last['kl']:.2g}")
    return ", ".join(shown)


def conclusion(name: str, runs: dict[str, list[Point]]) -> str:
    """The KL at which accuracy peaks, and so the limit to use, over all seeds of a reward."""
    measured = [run for run in runs.values() if run[1:]]
    better = [run for run in measured if is_clearly_above(peak(run), run[0])]
    falling = [peak(run) for run in better if is_clearly_above(peak(run), run[-1])]
    seeds = len(measured)
    if not better:
        return f"{name}: no checkpoint of {seeds} runs is clearly better than the initial model."
    if falling:
        limit = min(point["kl"] for point in falling)
        return (
            f"{name}: accuracy is highest at KL {limit:.2g} and clearly lower at the end of "
            f"{len(falling)} of {seeds} runs: `--max_kl {limit:.2g}`."
        )
    farthest = max(run[-1]["kl"] for run in better)
    return (
        f"{name}: accuracy does not fall clearly up to KL {farthest:.2g}, the end of the runs: "
        "no limit follows."
    )


def table(run: list[Point]) -> str:
    """One line per checkpoint."""
    lines = ["| step | KL | accuracy | NSC image | broken |", "|---|---|---|---|---|"]
    for point in run:
        rest = [f"{point[key]:.3f}" if key in point else "" for key in ("image_nsc", "broken")]
        lines.append(
            f"| {point['step']} | {point['kl']:.3g} | {point['mean']:.3f} ± "
            f"{standard_error(point):.3f} | {' | '.join(rest)} |"
        )
    return "\n".join(lines)


def figure(results: Results) -> str:
    """Accuracy over KL on a logarithmic axis: one line per run, one colour per reward; dashed, the
    initial model."""
    rewards: dict[str, dict[str, list[Point]]] = results["rewards"]
    runs = [run for found in rewards.values() for run in found.values()]
    kls = [point["kl"] for run in runs for point in run if point["kl"] > 0]
    low = math.floor(math.log10(min(kls, default=0.1)))
    high = max(math.ceil(math.log10(max(kls, default=1.0))), low + 1)

    def x_of(kl: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * (math.log10(kl) - low) / (high - low), 1)

    def y_of(accuracy: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * accuracy, 1)

    parts = [
        f"<text x='{LEFT - 8}' y='{y_of(tick) + 4}' text-anchor='end'>{tick:g}</text>"
        f"<line x1='{LEFT}' x2='{RIGHT}' y1='{y_of(tick)}' y2='{y_of(tick)}' stroke='#ddd'/>"
        for tick in (0, 0.2, 0.4, 0.6, 0.8, 1)
    ]
    parts += [
        f"<text x='{x_of(10.0**power)}' y='{BOTTOM + 18}' text-anchor='middle'>{10.0**power:g}"
        "</text>"
        for power in range(low, high + 1)
    ]
    middle = (LEFT + RIGHT) // 2
    parts.append(
        f"<text x='{middle}' y='{BOTTOM + 40}' text-anchor='middle'>KL to the initial model, nats "
        "per token</text>"
    )
    parts.append(f"<text x='{RIGHT}' y='20' text-anchor='end' fill='#666'>accuracy</text>")
    if runs:
        y = y_of(runs[0][0]["mean"])
        parts.append(
            f"<line x1='{LEFT}' x2='{RIGHT}' y1='{y}' y2='{y}' stroke='#777' "
            "stroke-dasharray='4 3'/>"
            f"<text x='{RIGHT}' y='{y - 5}' text-anchor='end' fill='#666'>before training</text>"
        )
    for number, (name, found) in enumerate(rewards.items()):
        colour = COLOURS[number % len(COLOURS)]
        parts.append(
            f"<text x='{LEFT + 110 * number}' y='20' fill='{colour}' font-weight='bold'>"
            f"{escape(name)}</text>"
        )
        for run in found.values():
            places = [(x_of(p["kl"]), y_of(p["mean"])) for p in run if p["kl"] > 0]
            line = " ".join(f"{x},{y}" for x, y in places)
            parts.append(f"<polyline points='{line}' fill='none' stroke='{colour}'/>")
            parts += [f"<circle cx='{x}' cy='{y}' r='3' fill='{colour}'/>" for x, y in places]
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' "
        "font-family='system-ui, sans-serif' font-size='12' fill='#222'>"
        f"<rect width='{WIDTH}' height='{HEIGHT}' fill='#fff'/>{''.join(parts)}</svg>\n"
    )
