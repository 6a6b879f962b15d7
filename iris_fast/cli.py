"""The command line and --config files -> checked settings, errors told in one line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import signal
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import jsonargparse
import yaml

from iris_fast.config import PRESETS, SamplingConfig, TrainConfig
from iris_fast.errors import UserError, report_error

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

Config = TypeVar("Config", bound=SamplingConfig)


class CommandParser(argparse.ArgumentParser):
    """An argparse parser whose errors are UserErrors, for commands with a few arguments."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{message}; see --help")


class _Parser(jsonargparse.ArgumentParser):
    """Reports an error as one line on standard error, with the nearest valid name, exit code 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        line = " ".join(str(message).split())
        line = re.sub(r'Parser key "(.+?)": ', r"\1: ", line)
        line = re.sub(r"<class '(\w+)'>|typing\.Literal", r"\1", line).replace("a [", "one of [")
        line = re.sub(
            r"Does not validate .*Subtypes: \[list\[(\w+)\].*Given value: (.*)",
            r"\2 is no list of \1",
            line,
        )
        line = re.sub(
            r"Does not validate .*Subtypes: \[(\w+), NoneType\].*Given value: (.*)",
            r"\2 is no \1",
            line,
        )
        line = re.sub(r"Expected a list\. Got value: (.*)", r"\1 is no list of str", line)
        line = re.sub(r": ([^[]+) is no list of \w+$", r"\g<0>; write it as [\1]", line)
        line = re.sub(
            r"argument --(\w+): expected one argument",
            r"\1: no value given; write --\1 VALUE, a switch as --\1 true",
            line,
        )
        line = re.sub(
            r"(\w+): Expected a bool. Got value: (.*)", r"\1: \2 is neither true nor false", line
        )
        if re.match("resume_from_checkpoint: .* is neither", line):  # TRL takes a path here
            line += "; write --resume_from_checkpoint true, and the run's folder as --output_dir"
        unknown = re.search(r"unrecognized arguments: (\S+)|Option '(\S+?)' is not accepted", line)
        if unknown:
            name = (unknown[1] or unknown[2]).lstrip("-").split("=")[0]
            names = [action.dest for action in self._actions]
            near = difflib.get_close_matches(name, names, n=1)
            line = f"{name}: there is no such setting; " + (
                f"did you mean {near[0]}?" if near else "--help lists them"
            )
        raise UserError(line)


def _files_first(arguments: list[str]) -> list[str]:
    """The arguments with every --config in front: a flag counts wherever it stands, while
    jsonargparse would let a file that comes after it win."""
    files, flags = [], []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--config":
            files += [argument, *(value for value in [next(rest, None)] if value is not None)]
        elif argument.startswith("--config="):
            files.append(argument)
        else:
            flags.append(argument)
    return files + flags


def _config_files(arguments: list[str]) -> list[str]:
    """The --config files that exist; others are the parser's to report."""
    named = [argument.partition("=")[2] for argument in arguments if argument[:9] == "--config="]
    named += [value for flag, value in pairwise(arguments) if flag == "--config"]
    return [path for path in named if Path(path).is_file()]


def _named_preset(arguments: list[str]) -> Any:
    """The preset that flags or, failing them, a --config file name; defaults depend on it."""
    chosen: Any = TrainConfig.preset
    for position, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name not in ("--preset", "--config"):
            continue
        value = value or next(iter(arguments[position + 1 :]), "")
        if name == "--preset":
            chosen = value
        elif Path(value).is_file():
            chosen = _read_settings(value).get("preset", chosen)
    return chosen


def _read_settings(path: str) -> dict[str, Any]:
    """What a --config file holds; UserError unless it is a mapping."""
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"config: {path} is not YAML ({' '.join(str(error).split())}); mend the file, or "
            "start from --print_config"
        ) from None
    if not isinstance(settings, dict):
        raise UserError(
            f"config: {path} holds no settings; write lines such as `max_steps: 100`, or start "
            "from --print_config"
        )
    return settings


def _check_file(path: str, config_class: type[Config]) -> None:
    """UserError for what a --config file can hold and a flag cannot: keys that are no names, values
    that are left out, and mappings."""
    hints = get_type_hints(config_class)
    for name, value in _read_settings(path).items():
        if not isinstance(name, str):
            raise UserError(f"config: {path}: {name!r} is no setting's name; --help lists them")
        if value is None and type(None) not in get_args(hints.get(name, None | str)):
            raise UserError(f"{name}: {path} gives it no value; give one, or delete the line")
        nested = value if isinstance(value, list) else [value]
        if any(isinstance(each, dict | list) for each in nested):
            raise UserError(f"{name}: {path} gives it a mapping or a list of lists; give a value")


def parse(config_class: type[Config], program: str, arguments: list[str]) -> Config:
    """The checked settings that `arguments` (without the program's name) ask for.

    Raises UserError, one line, on an unknown or mistyped name or a value that does not fit.
    """
    parser = _Parser(prog=program, description=config_class.__doc__, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of settings.")
    parser.add_class_arguments(config_class)
    arguments = _files_first(arguments)
    for path in _config_files(arguments):
        _check_file(path, config_class)
    if config_class is TrainConfig:
        preset = _named_preset(arguments)
        if isinstance(preset, str) and preset in PRESETS:  # others are the parser's to report
            parser.set_defaults(PRESETS[preset])
    settings = parser.parse_args(arguments)
    names = {field.name for field in dataclasses.fields(config_class)}
    return config_class(**{k: v for k, v in settings.as_dict().items() if k in names})


def parse_command_line(config_class: type[Config], program: str) -> Config:
    """`parse` for `sys.argv`, with errors told as one line and exit code 2.

    From here on Ctrl-C ends the process without a traceback, until there is something to save.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return parse(config_class, program, sys.argv[1:])
    except UserError as error:
        sys.exit(report_error(program, error))
