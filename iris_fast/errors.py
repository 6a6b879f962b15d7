"""Errors that the user can fix: one line on standard error instead of a traceback."""

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

EXIT_CODE = 2
OTHER_RANKS_WAIT_S = 1.0


class UserError(ValueError):
    """An error that the user can fix. The message is one line: the setting or file, what was
    received, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def require(holds: bool, name: str, value: Any, remedy: str) -> None:
    """Raise UserError unless `holds`."""
    if not holds:
        raise UserError(f"{name}: {value} is not valid; {remedy}")


def read_yaml(setting: str, path: Path, remedy: str) -> dict[str, Any]:
    """The mapping in a YAML file that `setting` names; UserError, with `remedy`, without one."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        fault = f"cannot be read ({error.strerror})"
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        fault = f"is not valid YAML ({error})"
    else:
        if isinstance(content, dict):
            return content
        fault = "has no settings in it"
    raise UserError(f"{setting}: {path} {fault}; {remedy}")


@contextlib.contextmanager
def writing(setting: str, path: Path) -> Iterator[None]:
    """Report an OSError of the `with` block, which writes `path`, as a UserError that names the
    setting the path comes from."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{setting}: {path} cannot be written ({error.strerror or error}); name a place "
            "that you may write to, on a disk with free space"
        ) from None


@contextlib.contextmanager
def atomic_write(setting: str, path: Path) -> Iterator[Path]:
    """A temporary path for the `with` block to write, renamed to `path` at its end: no reader sees
    an incomplete file, and a failed write leaves nothing behind. UserError as for `writing`."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with writing(setting, path):
            yield partial
            partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


@contextlib.contextmanager
def optional_import(package: str, setting: str, alternative: str) -> Iterator[None]:
    """For imports of a `package` that only one `setting` needs: UserError if it is not installed.
    The package's warnings while importing, for example about parts that are not used, are muted.
    """
    logging.disable(logging.WARNING)
    try:
        yield
    except ImportError:
        raise UserError(
            f"{setting} needs {package}, which is not installed; pip install {package}, or "
            f"{alternative}"
        ) from None
    finally:
        logging.disable(logging.NOTSET)


def report_error(program: str, error: UserError) -> int:
    """Print the error in one line, once rather than once per rank, and return the exit code.

    Most errors occur on every rank. Rank 0 prints at once; torchrun then ends the others while they
    still wait here, unless the error was theirs alone. Under torchrun the line is also written to
    the file that its closing report reads, which would otherwise advise "to enable traceback see".
    """
    line = f"{program}: error: {error}"
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
        report = {"message": {"message": line, "extraInfo": extra}}
        with contextlib.suppress(OSError):  # the error may be about the disk
            Path(error_file).write_text(json.dumps(report))
    if os.environ.get("RANK", "0") != "0":
        time.sleep(OTHER_RANKS_WAIT_S)
    print(line, file=sys.stderr, flush=True)
    return EXIT_CODE
