"""SIGTERM and Ctrl-C: at once where nothing can be lost, otherwise when the work at hand is done."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from utils.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_KEY = 1.0  # seconds in which one Ctrl-C may arrive twice, from the terminal and from the launcher


class Stop:
    """Raises ``Interrupted`` in the main thread on SIGTERM or SIGINT, within ``deferred`` later. Use it as a context manager.

    Only the first signal counts, so that nothing interrupts what is done because of it; but a later Ctrl-C raises
    ``KeyboardInterrupt`` at once, for users who would rather lose what is in memory. A signal that the parent process chose to
    ignore stays ignored.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._when = 0.0
        self._deferring = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A block that a signal does not interrupt before its end, or its next ``check``."""
        self._deferring = True
        try:
            yield
        except RuntimeError:  # the signal may have ended a reading process or another worker, too
            self.check()
            raise
        finally:
            self._deferring = False
        self.check()

    def check(self) -> None:
        """Raise ``Interrupted`` if a signal has arrived."""
        if self._received is not None:
            raise Interrupted(self._received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received is None:
            self._received, self._when = number, time.monotonic()
            if not self._deferring:
                self.check()
        elif number == signal.SIGINT and time.monotonic() > self._when + SAME_KEY:
            raise KeyboardInterrupt


@contextmanager
def killable() -> Iterator[None]:
    """A block that Ctrl-C ends with the process at once, also where C++ holds the main thread and no handler can run."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def leave_to_parent() -> None:
    """For a child process: signals that a terminal or a launcher sends to all are its parent's business."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
