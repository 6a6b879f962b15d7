"""The JSON rows that every benchmark writes. Does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

Row = dict[str, Any]
CEILINGS = "ceilings"  # the suite that measures the machine, before all others


class Measured(NamedTuple):
    """Result of one implementation: a value (None if it failed), its peak bytes, or its error."""

    value: float | None = None
    peak_bytes: int | None = None
    error: str | None = None

    def times(self, factor: float) -> Measured:
        """The value multiplied by `factor`, to convert its unit."""
        return self._replace(value=None if self.value is None else self.value * factor)

    def inverse(self, numerator: float) -> Measured:
        """`numerator` divided by the value, to convert a time to a rate."""
        return self._replace(value=None if self.value is None else numerator / self.value)


def make_row(
    suite: str,
    case: str,
    shape: dict[str, Any],
    dtype: torch.dtype | None,
    metric: str | None,
    unit: str | None,
    ours: Measured,
    floor: float | None = None,
    copy_floor: float | None = None,
    peers: dict[str, Measured] | None = None,
) -> Row:
    """One row, its numbers rounded to four significant digits.

    All values are in `unit`; a unit that ends in "/s" is a rate, where higher is better. `floor` is
    the best value the machine allows, `copy_floor` the best that its copy bandwidth alone allows.
    """
    row = {
        "suite": suite,
        "case": case,
        "shape": shape,
        "dtype": None if dtype is None else dtype_name(dtype),
        "metric": metric,
        "value": _rounded(ours.value),
        "unit": unit,
        "floor": _rounded(floor),
        "fraction_of_floor": _fraction(floor, ours.value, unit),
        "fraction_of_copy": _fraction(copy_floor, ours.value, unit),
        "peak_memory_bytes": ours.peak_bytes,
        "peers": {name: _peer(peer, unit) for name, peer in (peers or {}).items()},
    }
    return row | ({} if ours.error is None else {"error": ours.error})


def failed_row(suite: str, case: str, error: str) -> Row:
    return make_row(suite, case, {}, None, None, None, Measured(error=error))


def _peer(peer: Measured, unit: str | None) -> Row:
    row = {"value": _rounded(peer.value), "unit": unit, "peak_memory_bytes": peer.peak_bytes}
    return row | ({} if peer.error is None else {"error": peer.error})


def _fraction(floor: float | None, value: float | None, unit: str | None) -> float | None:
    if floor is None or not value:
        return None
    is_rate = unit is not None and unit.endswith("/s")
    return rounded(value / floor if is_rate else floor / value)


def rounded(number: float) -> float:
    """Four significant digits: more is noise."""
    return float(f"{number:.4g}")


def _rounded(number: float | None) -> float | None:
    return None if number is None else rounded(number)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
