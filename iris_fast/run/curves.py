"""Curves as SVG, for `iris_fast.run.report`."""

from __future__ import annotations

import html
from statistics import fmean

WIDTH, HEIGHT, MARGIN, BELOW = 340, 150, 10, 18
WINDOW = 5  # steps on each side that the bold line is a mean of, at most

Point = tuple[int, float]


def curve(title: str, points: list[Point], dots: list[Point] = ()) -> str:
    """A `<figure>` of values by step: the values thin, their moving mean bold; `dots` beside them.

    The lowest and highest value stand at the left, the first and last step below.
    """
    steps, values = [step for step, _ in points], [value for _, value in points]
    shown = [*values, *(value for _, value in dots)]
    low, high = min(shown), max(shown)
    first, last = steps[0], steps[-1]

    def place(step: float, value: float) -> tuple[str, str]:
        x = MARGIN + (WIDTH - 2 * MARGIN) * (step - first) / max(last - first, 1)
        y = HEIGHT - BELOW - (HEIGHT - BELOW - MARGIN) * (value - low) / ((high - low) or 1)
        return f"{x:.1f}", f"{y:.1f}"

    def line(of: list[float], style: str) -> str:
        path = " ".join(",".join(place(*point)) for point in zip(steps, of, strict=True))
        return f"<polyline points='{path}' fill='none' {style}/>"

    smooth = moving_mean(values)
    label = (
        f"{title}: {values[0]:.4g} at step {first}, {values[-1]:.4g} at step {last}, "
        f"between {min(values):.4g} and {max(values):.4g}"
    )
    marks = [place(*dot) for dot in dots]
    parts = [
        *[f"<circle cx='{x}' cy='{y}' r='2' fill='#b45309' opacity='.6'/>" for x, y in marks],
        line(values, "stroke='#1d4ed8' stroke-width='1' opacity='.45'"),
        line(smooth, "stroke='#1d4ed8' stroke-width='2.5'"),
        f"<text x='4' y='11'>{high:.4g}</text>",
        f"<text x='4' y='{HEIGHT - BELOW - 4}'>{low:.4g}</text>",
        f"<text x='4' y='{HEIGHT - 4}'>step {first}</text>",
        f"<text x='{WIDTH - 4}' y='{HEIGHT - 4}' text-anchor='end'>step {last}</text>",
    ]
    ends = f"{values[0]:.4g} → {values[-1]:.4g}"
    return (
        f"<figure><figcaption><strong>{html.escape(title)}</strong> {ends}</figcaption>"
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' "
        f"aria-label='{html.escape(label, quote=True)}'>{''.join(parts)}</svg></figure>"
    )


def moving_mean(values: list[float]) -> list[float]:
    """The mean of each value and its neighbours, up to WINDOW and a quarter of all on each side."""
    reach = min(WINDOW, len(values) // 4)
    return [fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]
