"""Write docs/settings.md from iris_fast/config.py: `python docs/render_settings.py`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from iris_fast.cli import help_texts
from iris_fast.config import (
    PRESETS,
    GenerateConfig,
    SamplingConfig,
    TrainConfig,
    sections,
)
from iris_fast.fields import bounds_text, defaults

TARGET = Path(__file__).with_name("settings.md")
INTRODUCTION = """\
# Settings

<!-- Written by `python docs/render_settings.py` from iris_fast/config.py. Do not edit. -->

On the command line a setting is written `--name value`, in a YAML file for `--config` it is written
`name: value`. Flags override `--config` files, which override the preset (`--preset`, training
only), which overrides the defaults below. Booleans are written `--cot true`, lists
`--reward_funcs '[image_nsc, random]'`.

`--help` prints the same text with the preset's values, and `--print_config` prints the settings as
YAML. `iris_fast.generate --config RUN/config.yaml` uses what generation and the run's training have
in common.
"""
TYPES = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "boolean",
    list[str]: "list of text",
    list[float]: "list of numbers",
}


def render() -> str:
    """The whole page."""
    shared = set(defaults(SamplingConfig))
    lines = [INTRODUCTION, "## Training and generation\n", *tables(SamplingConfig, set())]
    lines += ["## Training only\n", *tables(TrainConfig, shared)]
    lines += ["## Generation only\n", *tables(GenerateConfig, shared)]
    changed = list(dict.fromkeys(name for values in PRESETS.values() for name in values))
    lines += ["## Presets\n", row("setting", "default", *PRESETS)]
    lines.append(row(*["---"] * (2 + len(PRESETS))))
    for name in changed:
        default = defaults(TrainConfig)[name]
        values = [preset.get(name, default) for preset in PRESETS.values()]
        lines.append(row(code(name), *map(yaml, [default, *values])))
    return "\n".join(lines) + "\n"


def tables(config_class: type[Any], without: set[str]) -> list[str]:
    """One table per section, without the settings `without`."""
    helps, types = help_texts(config_class), get_type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    lines = []
    for title, section in sections(config_class).items():
        names = [name for name in section if name not in without]
        if names:
            lines += [f"### {title}\n", row("setting", "values", "default", "meaning")]
            lines.append(row(*["---"] * 4))
        for name in names:
            values = f"{values_text(types[name])} {bounds_text(fields[name])}".strip()
            default = yaml(defaults(config_class)[name])
            lines.append(row(code(name), values, default, helps[name]))
        lines += [""] if names else []
    return lines


def row(*cells: str) -> str:
    """One row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def code(text: str) -> str:
    """Text in backquotes."""
    return f"`{text}`"


def yaml(value: Any) -> str:
    """A value as it is written in YAML."""
    return code(value if isinstance(value, str) else json.dumps(value).replace('"', ""))


def values_text(kind: Any) -> str:
    """The values that a setting of this type takes."""
    if get_origin(kind) is UnionType:  # all of them are `... | None`
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        return ", ".join(map(code, get_args(kind)))
    return TYPES[kind]


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
