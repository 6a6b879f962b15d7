"""Do the rewards order the images of a prompt as the metrics do? Known before a long run.

The alignment of a reward with a metric is Spearman's rank correlation of their values over the G
images of one prompt (ties get their average rank), averaged over the groups in which both vary.
An advantage compares images of one prompt only, so a run whose reward has a negative alignment
with a metric makes images more likely that the metric rates lower.

The names are `REWARD~METRIC`, where REWARD is a term before its weight, or `reward`, the weighted
sum that is trained on.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, Self

from torch import Tensor

TOTAL = "reward"
MIN_GROUPS = 8  # before them the standard error itself is too uncertain for a warning
LABELS = {"value": "", "standard_error": "_se", "groups": "_groups"}  # in metrics.jsonl


class Alignment(NamedTuple):
    """A mean over groups, its standard error (None below two groups), and their number."""

    value: float | None
    standard_error: float | None
    groups: int

    @classmethod
    def of(cls, correlations: Tensor) -> Self:
        """Average the correlations [groups]."""
        groups = len(correlations)
        values = correlations.double()
        error = (values.std() / groups**0.5).item() if groups > 1 else None
        return cls(values.mean().item() if groups else None, error, groups)

    @classmethod
    def pooled(cls, parts: Iterable[Self]) -> Self:
        """Join alignments of disjoint groups; exact, not an average of averages."""
        parts = [part for part in parts if part.groups]
        groups = sum(part.groups for part in parts)
        if not groups:
            return cls(None, None, 0)
        mean = sum(part.groups * part.value for part in parts) / groups
        # Sums of squares inside the parts, from their standard errors, and between them.
        squares = sum(
            part.groups * (part.groups - 1) * (part.standard_error or 0.0) ** 2
            + part.groups * (part.value - mean) ** 2
            for part in parts
        )
        error = math.sqrt(squares / (groups - 1) / groups) if groups > 1 else None
        return cls(mean, error, groups)

    @property
    def direction(self) -> int:
        """1 above 0 by more than two standard errors, -1 below, 0 otherwise, or with fewer than
        `MIN_GROUPS` groups."""
        if self.value is None or self.standard_error is None or self.groups < MIN_GROUPS:
            return 0
        return (self.value > 2 * self.standard_error) - (self.value < -2 * self.standard_error)

    @property
    def is_clearly_negative(self) -> bool:
        """Whether value + 2 standard errors < 0, with at least `MIN_GROUPS` groups."""
        return self.direction < 0

    def __str__(self) -> str:
        if self.value is None:
            return "not known"
        error = "?" if self.standard_error is None else f"{self.standard_error:.2f}"
        return f"{self.value:+.2f} ± {error}"


def group_correlations(left_N: Tensor, right_N: Tensor, group: int) -> Tensor:
    """Spearman's correlation of each `group` consecutive values, float64 [groups in which both
    vary]."""
    left, right = _centred_ranks(left_N, group), _centred_ranks(right_N, group)
    covariance = (left * right).sum(dim=1)
    scale = (left.square().sum(dim=1) * right.square().sum(dim=1)).sqrt()
    varied = scale > 0
    return covariance[varied] / scale[varied]


def _centred_ranks(values_N: Tensor, group: int) -> Tensor:
    """Twice the rank within its group minus the mean rank, [N / group, group]; ties share one."""
    rows, columns = values_N.view(-1, group, 1), values_N.view(-1, 1, group)
    # Not the sign of a difference, which is NaN for two values of -inf.
    return (rows > columns).double().sum(dim=2) - (rows < columns).double().sum(dim=2)


def align(
    terms: dict[str, Tensor], total_N: Tensor, metrics: dict[str, Tensor], group: int
) -> dict[str, Alignment]:
    """`REWARD~METRIC` -> alignment of the total and every term with every metric."""
    return {
        f"{reward}~{metric}": Alignment.of(group_correlations(left_N, right_N, group))
        for metric, right_N in metrics.items()
        for reward, left_N in {TOTAL: total_N, **terms}.items()
    }


def alignment_metrics(alignments: dict[str, Alignment]) -> dict[str, float]:
    """As metrics of a step: `reward_alignment/NAME`, `reward_alignment_se/NAME` and
    `reward_alignment_groups/NAME`, without those that are not known."""
    return {
        f"reward_alignment{label}/{name}": value
        for name, alignment in alignments.items()
        for field, label in LABELS.items()
        if (value := getattr(alignment, field)) is not None
    }


def pooled_alignments(rows: list[dict[str, Any]], num_iterations: int = 1) -> dict[str, Alignment]:
    """The alignments over the groups of all steps of a run, from their metrics.

    Of `num_iterations` steps on one rollout the first counts.
    """
    parts: dict[str, list[Alignment]] = {}
    prefix = f"reward_alignment{LABELS['groups']}/"
    for row in rows:
        if (row["step"] - 1) % num_iterations:
            continue
        for name in (key.removeprefix(prefix) for key in row if key.startswith(prefix)):
            fields = (row.get(f"reward_alignment{label}/{name}") for label in LABELS.values())
            parts.setdefault(name, []).append(Alignment(*fields))
    return {name: Alignment.pooled(found) for name, found in parts.items()}


def by_metric(alignments: dict[str, Alignment]) -> dict[str, dict[str, Alignment]]:
    """Metric -> reward -> alignment, without the total where it equals its only term."""
    found: dict[str, dict[str, Alignment]] = {}
    for name, alignment in alignments.items():
        reward, _, metric = name.partition("~")
        found.setdefault(metric, {})[reward] = alignment
    for rewards in found.values():
        if len(rewards) == 2 and len(set(rewards.values())) == 1:
            del rewards[TOTAL]
    return found


def alignment_lines(alignments: dict[str, Alignment]) -> list[str]:
    """One line per metric."""
    lines = []
    for metric, rewards in by_metric(alignments).items():
        parts = [f"{name} {found} ({found.groups} groups)" for name, found in rewards.items()]
        known = any(found.groups for found in rewards.values())
        text = ", ".join(parts) if known else "no group varies in both"
        lines.append(f"alignment with {metric}: {text}")
    return lines


def alignment_warnings(alignments: dict[str, Alignment]) -> dict[str, str]:
    """A warning for every metric that the total reward is clearly against. The terms give none:
    a term may have a negative weight, and the total is what is trained on."""
    return {
        f"reward against {name.partition('~')[2]}": (
            f"the reward is against {name.partition('~')[2]}: within groups their rank "
            f"correlation is {found} over {found.groups} groups, so training can be expected to "
            "lower it; see docs/rewards.md"
        )
        for name, found in alignments.items()
        if name.startswith(f"{TOTAL}~") and found.is_clearly_negative
    }
