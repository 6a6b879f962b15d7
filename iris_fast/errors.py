"""Errors that the user can mend: one line on standard error instead of a traceback."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EXIT_CODE = 2
FIRST_RANK_SPEAKS_S = 1.0


class UserError(ValueError):
    """An error that the user can fix. The message is one line: the setting or file, what was
    received, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def require(holds: bool, name: str, value: Any, remedy: str) -> None:
    """Raise UserError unless `holds`."""
    if not holds:
        raise UserError(f"{name}: {value} is not valid; {remedy}")


@contextlib.contextmanager
def writing(setting: str, path: Path) -> Iterator[None]:
    """Turns an OSError in the `with` block, which writes `path`, into a UserError about the setting
    that named the place."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{setting}: {path} cannot be written ({error.strerror or error}); name a place "
            "that you may write to, on a disk with room"
        ) from None


@contextlib.contextmanager
def replacing(setting: str, path: Path) -> Iterator[Path]:
    """A neighbour of `path` for the `with` block to write, which then takes its place: a reader
    never meets half a file, and nothing is left of one that fails. UserError as `writing`."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with writing(setting, path):
            yield partial
            partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


@contextlib.contextmanager
def optional(package: str, setting: str, otherwise: str) -> Iterator[None]:
    """For imports of a `package` that only one `setting` asks for: UserError where it is missing.
    Its warnings meanwhile, such as of parts that do not load here and that nothing uses, are muted.
    """
    logging.disable(logging.WARNING)
    try:
        yield
    except ImportError:
        raise UserError(
            f"{setting} needs {package}, which is not installed; pip install {package}, or "
            f"{otherwise}"
        ) from None
    finally:
        logging.disable(logging.NOTSET)


def report_error(program: str, error: UserError) -> int:
    """Print the error's one line, once and not once a rank, and return the exit code.

    Most errors are met by every rank. Rank 0 speaks at once; torchrun then ends the others while
    they still wait here, unless the error was theirs alone. Under torchrun the line is also left
    where its closing report looks for it: that would otherwise end on "to enable traceback see".
    """
    line = " ".join(f"{program}: error: {error}".split())
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):  # the disk may be what the error is about
            Path(error_file).write_text(
                json.dumps({"message": {"message": line, "extraInfo": extra}})
            )
    if os.environ.get("RANK", "0") != "0":
        time.sleep(FIRST_RANK_SPEAKS_S)
    print(line, file=sys.stderr, flush=True)
    return EXIT_CODE
