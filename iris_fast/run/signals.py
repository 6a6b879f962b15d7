"""SIGTERM and Ctrl-C: recorded when they arrive, acted on at the next safe point of the loop."""

import os
import signal
import time
from typing import Any, Self


class Interrupted(Exception):
    """A stop was requested: the current step is abandoned. Raised on all ranks at once."""


class StopSignal:
    """Records SIGTERM and Ctrl-C inside its `with` block instead of ending the process.

    torchrun forwards one Ctrl-C as two signals; only another Ctrl-C more than `GRACE_S` seconds
    after the first raises KeyboardInterrupt at once.
    """

    GRACE_S = 2.0

    def __init__(self) -> None:
        self.requested = False
        self._first_at = 0.0
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.requested and number == signal.SIGINT and now - self._first_at > self.GRACE_S:
            raise KeyboardInterrupt
        if not self.requested:
            self._first_at = now
            if os.environ.get("RANK", "0") == "0":  # os.write: print is not safe in a handler
                os.write(2, b"stopping: a checkpoint is saved at the next opportunity\n")
        self.requested = True
