"""Geometry of the curves in report.html, which `curve.html.jinja` draws as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

WIDTH, HEIGHT, MARGIN, AXIS_HEIGHT = 340, 150, 10, 18
WINDOW = 5  # the moving mean covers at most this many steps on each side

Point = tuple[int, float]


@dataclass(frozen=True)
class Curve:
    """Values by step; `line`, `smooth_line` (their moving mean) and `dots` in SVG coordinates.

    `low` and `high` are the limits of the vertical axis.
    """

    title: str
    steps: Sequence[int]
    values: Sequence[float]
    low: float
    high: float
    line: str
    smooth_line: str
    dots: Sequence[tuple[str, str]]
    width: int = WIDTH
    height: int = HEIGHT
    axis_height: int = AXIS_HEIGHT


def make_curve(title: str, points: Sequence[Point], dots: Sequence[Point] = ()) -> Curve:
    """Lay out `points` as a curve, with further values as `dots`."""
    steps, values = zip(*points, strict=True)
    shown = [*values, *(value for _, value in dots)]
    low, high = min(shown), max(shown)

    def place(step: float, value: float) -> tuple[str, str]:
        x = MARGIN + (WIDTH - 2 * MARGIN) * (step - steps[0]) / max(steps[-1] - steps[0], 1)
        plot_height = HEIGHT - AXIS_HEIGHT - MARGIN
        y = MARGIN + plot_height * (high - value) / ((high - low) or 1)
        return f"{x:.1f}", f"{y:.1f}"

    def polyline(heights: Sequence[float]) -> str:
        return " ".join(",".join(place(*point)) for point in zip(steps, heights, strict=True))

    smooth = moving_mean(values)
    places = [place(*dot) for dot in dots]
    return Curve(title, steps, values, low, high, polyline(values), polyline(smooth), places)


def moving_mean(values: Sequence[float]) -> list[float]:
    """Average each value with its neighbours, up to WINDOW and a quarter of all on each side."""
    reach = min(WINDOW, len(values) // 4)
    return [fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]
