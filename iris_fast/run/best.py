"""The best checkpoint of a run, by a metric that is higher for better models (`--best_metric`).

A checkpoint is judged by the mean of the metric over the steps around it, up to half of
`save_steps` on each side: one step has few images, and a mean over the steps before it alone would
favour a checkpoint whose weights are already past the maximum.

Which one is the best is not stored. It follows from metrics.jsonl and the checkpoints that are
there, so no interruption can leave a record that does not fit them. The best of those whose steps
have all been taken stays, and so does each of the others until its own have.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

TOTAL = "reward"


@dataclass(frozen=True)
class Judge:
    """Judges the weights after a step by the metric `key` of the `rows` of metrics.jsonl within
    `reach` steps. The list of rows may grow."""

    rows: list[dict[str, Any]]
    key: str
    reach: int

    @classmethod
    def of(cls, settings: dict[str, Any], rows: list[dict[str, Any]]) -> Self | None:
        """The judge that a run's settings name; None without `best_metric`."""
        name = settings.get("best_metric")
        if name is None:
            return None
        kind = "metrics" if name in settings["metric_funcs"] else "rewards"
        return cls(rows, name if name == TOTAL else f"{kind}/{name}", settings["save_steps"] // 2)

    def values_around(self, step: int) -> dict[int, float]:
        """Step -> metric of the rows that judge the weights after `step`. The row of step t
        measures those after step t - 1."""
        near = (row for row in self.rows if abs(row["step"] - 1 - step) <= self.reach)
        found = {row["step"]: row.get(self.key, math.nan) for row in near}
        return {at: value for at, value in found.items() if math.isfinite(value)}

    def score(self, step: int) -> float | None:
        """The mean of the metric around `step`; None if it was not measured there."""
        values = self.values_around(step).values()
        return sum(values) / len(values) if values else None

    def is_decided(self, step: int) -> bool:
        """Whether the steps around `step` have all been taken, so that its score is final."""
        return bool(self.rows) and self.rows[-1]["step"] > step + self.reach

    def ranked(self, steps: list[int]) -> list[int]:
        """The measured ones of `steps`, the best first; of equal ones the earliest first."""
        scores = {step: self.score(step) for step in steps}
        measured = [step for step, score in scores.items() if score is not None]
        return sorted(measured, key=lambda step: (-scores[step], step))

    def needed(self, steps: list[int]) -> list[int]:
        """Those of the checkpoints `steps` that must stay: the undecided, and the best of the
        decided. An undecided one replaces no other: its score may still fall."""
        decided = [step for step in steps if self.is_decided(step)]
        return [*self.ranked(decided)[:1], *(step for step in steps if step not in decided)]

    def describe(self, path: Path, step: int) -> str:
        """Why the checkpoint of `step` at `path` is the best."""
        around = list(self.values_around(step))
        name = self.key.partition("/")[2] or self.key
        window = f"mean of steps {around[0]} to {around[-1]}"
        return f"{path.name}: {name} {self.score(step):.3f} ({window})"
