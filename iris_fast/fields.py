"""The fields of a class of settings: bounds, defaults. Imports neither torch nor the settings."""

import dataclasses
import math
import operator
from dataclasses import field
from typing import Any

from iris_fast.errors import require

SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def number(default: float | None, note: str = "", **bounds: float) -> Any:
    """A dataclass field with bounds: `gt`, `ge`, `lt`, `le`, as in pydantic. `note` is added to the
    message about a value outside them."""
    return field(default=default, metadata={"bounds": bounds, "note": note})


def bounds_text(setting: dataclasses.Field) -> str:
    """The bounds of a setting in words, such as "> 0 and <= 1"; empty where it has none."""
    bounds = setting.metadata.get("bounds", {})
    return " and ".join(f"{SIGNS[name]} {limit:g}" for name, limit in bounds.items())


def check_bounds(config: Any) -> None:
    """Raise UserError for the first number of `config` that is not finite or not within bounds."""
    for setting in dataclasses.fields(config):
        value, data = getattr(config, setting.name), setting.metadata
        if isinstance(value, int | float):
            holds = [getattr(operator, n)(value, b) for n, b in data.get("bounds", {}).items()]
            finite = isinstance(value, int) or math.isfinite(value)
            remedy = f"give a number {bounds_text(setting)}{data.get('note', '')}".strip()
            require(finite and all(holds), setting.name, value, remedy)


def defaults(config_class: type[Any]) -> dict[str, Any]:
    """The default of every setting, without a preset's."""
    return {
        setting.name: setting.default_factory()
        if setting.default is dataclasses.MISSING
        else setting.default
        for setting in dataclasses.fields(config_class)
    }
