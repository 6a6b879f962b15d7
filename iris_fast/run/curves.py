"""The curves of a report: values by step and their moving mean."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

WINDOW = 5  # the moving mean covers at most this many steps on each side

Point = tuple[int, float]


@dataclass(frozen=True)
class Curve:
    """Values by step, with further values as `dots`; `curve.html.jinja` draws it."""

    title: str
    points: list[Point]
    dots: list[Point]

    @property
    def smooth_points(self) -> list[Point]:
        """The moving mean of `points`."""
        steps, values = zip(*self.points, strict=True)
        return list(zip(steps, moving_mean(values), strict=True))


def moving_mean(values: Sequence[float]) -> list[float]:
    """Average each value with its neighbours, up to WINDOW and a quarter of all on each side."""
    reach = min(WINDOW, len(values) // 4)
    return [fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]
