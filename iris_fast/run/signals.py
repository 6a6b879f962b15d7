"""SIGTERM and Ctrl-C: remembered, so that a run can end at a step's border."""

from __future__ import annotations

import os
import signal
import time
from typing import Any


class Interrupted(Exception):
    """A stop was asked for: the step under way is given up. Raised on all ranks alike."""


class StopSignal:
    """Remembers SIGTERM and Ctrl-C inside its `with` block, so that the loop can end in good order.

    torchrun passes one Ctrl-C on as two signals; only a second Ctrl-C a while later, from somebody
    who does not want to wait, interrupts at once.
    """

    GRACE_S = 2.0

    def __init__(self) -> None:
        """Nothing is caught before the `with` block."""
        self.requested = False
        self._first_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        """Catch both signals."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        """Give both signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.requested and number == signal.SIGINT and now - self._first_at > self.GRACE_S:
            raise KeyboardInterrupt
        if not self.requested:
            self._first_at = now
            if os.environ.get("RANK", "0") == "0":  # os.write: print is not safe in a handler
                os.write(2, b"stopping: a checkpoint is saved at the next opportunity\n")
        self.requested = True
