"""The command line and --config files -> checked settings; errors are reported in one line."""

import argparse
import difflib
import signal
import sys
from datetime import date
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import docstring_parser
import jsonargparse

from iris_fast.config import PRESETS, SamplingConfig, TrainConfig, sections
from iris_fast.errors import UserError, read_yaml, report_error
from iris_fast.fields import defaults

Config = TypeVar("Config", bound=SamplingConfig)


class CommandParser(argparse.ArgumentParser):
    """An argparse parser whose errors are UserErrors, for commands with a few arguments."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{message}; see --help")


def help_texts(config_class: type[Any]) -> dict[str, str]:
    """Setting -> help, from the docstrings of the fields."""
    texts = {}
    for documented in reversed(config_class.__mro__[:-1]):
        for param in docstring_parser.parse_from_object(documented).params:
            texts[param.arg_name] = " ".join(param.description.split())
    return texts


def make_parser(config_class: type[Any], program: str) -> jsonargparse.ArgumentParser:
    """The parser that checks values against the settings' types and prints the help."""
    parser = jsonargparse.ArgumentParser(
        prog=program,
        usage="%(prog)s [--config FILE.yaml] [--setting VALUE ...]",
        description=config_class.__doc__,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of settings.")
    types, usual = get_type_hints(config_class), defaults(config_class)
    helps = help_texts(config_class)
    for title, names in sections(config_class).items():
        group = parser.add_argument_group(title)
        for name in names:
            group.add_argument(f"--{name}", type=types[name], default=usual[name], help=helps[name])
    return parser


def parse(config_class: type[Config], program: str, arguments: list[str]) -> Config:
    """The checked settings for the command-line `arguments`, without the program's name.

    UserError, one line, for an unknown name or a value that does not fit. Flags override --config
    files wherever they stand, later files earlier ones. --help and --print_config print and exit.
    """
    parser, types = make_parser(config_class, program), get_type_hints(config_class)
    files, flags, requests = split_arguments(arguments, list(types))
    given: dict[str, Any] = {}
    for path in files:
        given |= settings_of_file(path, config_class)
    given |= flags
    given = {name: check_value(parser, name, given[name], types[name]) for name in given}
    preset = given.get("preset", TrainConfig.preset)
    preset_defaults = PRESETS[preset] if config_class is TrainConfig else {}
    if requests:
        parser.set_defaults(preset_defaults)
        try:
            parser.parse_args(requests, namespace=jsonargparse.Namespace(given))
        except argparse.ArgumentError as error:  # an unknown option of --print_config
            raise UserError(str(error)) from None
    return config_class(**preset_defaults | given)


def split_arguments(
    arguments: list[str], known: list[str]
) -> tuple[list[str], dict[str, str], list[str]]:
    """The --config files, the settings given as `--name value` or `--name=value`, and the requests
    to print something instead of running."""
    files, flags, requests = [], {}, []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        flag, has_value, value = argument.partition("=")
        if flag in ("-h", "--help", "--print_config"):
            requests.append(argument)
            continue
        if not flag.startswith("--"):
            raise UserError(f"{argument}: not a setting; write --NAME VALUE, see --help")
        name = flag.removeprefix("--")
        check_name(name, [*known, "config"])
        if not has_value:
            if not rest or rest[0].startswith("--"):
                raise UserError(
                    f"{name}: no value given; write {flag} VALUE; booleans: {flag} true"
                )
            value = rest.pop(0)
        if name == "config":
            files.append(value)
        else:
            flags[name] = value
    return files, flags, requests


def settings_of_file(path: str, config_class: type[Config]) -> dict[str, Any]:
    """The settings in a --config file; UserError if it cannot be read or has unknown ones.

    Other commands also take the config.yaml of a training run. They use the settings that they
    share with training, except for the run's folder.
    """
    remedy = "give a YAML file with lines such as `max_steps: 100`, or start from --print_config"
    settings = read_yaml("config", Path(path), remedy)
    for name, value in settings.items():
        if isinstance(value, date):  # YAML reads a name such as 2026-01-31 as a date
            settings[name] = str(value)
    own = defaults(config_class)
    of_training = defaults(TrainConfig).keys() - own.keys()
    if of_training & settings.keys():
        ignored = {"output_dir", *of_training}
        settings = {name: value for name, value in settings.items() if name not in ignored}
    for name in settings:
        check_name(name, list(own))
    return settings


def check_name(name: Any, known: list[str]) -> None:
    """UserError, with the nearest known name, unless `name` is known."""
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        advice = f"did you mean {near[0]}?" if near else "--help lists them"
        raise UserError(f"{name}: there is no such setting; {advice}")


def check_value(parser: jsonargparse.ArgumentParser, name: str, value: Any, kind: Any) -> Any:
    """`value`, which is text if it is from a flag, as a `kind`; UserError if it does not fit."""
    if get_origin(kind) is UnionType:  # all of them are `... | None`
        kind = get_args(kind)[0]
    elif value is None:
        raise UserError(f"{name}: no value given; write `{name}: VALUE`, or delete the line")
    try:
        return parser.parse_object({name: value}, defaults=False)[name]
    except argparse.ArgumentError:
        pass
    remedy = {
        bool: "give true or false",
        int: "give a whole number",
        float: "give a number",
        str: "give text, in quotes if it looks like a number",
    }.get(kind, "")
    if get_origin(kind) is Literal:
        remedy = f"choose from {', '.join(get_args(kind))}"
    if get_origin(kind) is list:
        example = "" if "[" in str(value) else f", such as [{value}]"
        remedy = f"give a list of {get_args(kind)[0].__name__}{example}"
    if name == "resume_from_checkpoint":  # TRL takes a path here
        remedy = "write --resume_from_checkpoint true, and the run's folder as --output_dir"
    raise UserError(f"{name}: {value} is not valid; {remedy}")


def parse_command_line(config_class: type[Config], program: str) -> Config:
    """`parse` for `sys.argv`; errors are reported in one line, with exit code 2.

    From here on Ctrl-C ends the process without a traceback, until there is something to save.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return parse(config_class, program, sys.argv[1:])
    except UserError as error:
        sys.exit(report_error(program, error))
