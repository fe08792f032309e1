"""SIGTERM and Ctrl-C: at once where nothing can be lost, otherwise when the work at hand is done."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from utils.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Raises ``Interrupted`` in the main thread on SIGTERM or SIGINT, within ``deferred`` later. Use it as a context manager.

    A second Ctrl-C within ``deferred`` raises ``KeyboardInterrupt`` at once, for users who would rather lose what is in memory.
    A signal that the parent process chose to ignore stays ignored.
    """

    def __init__(self) -> None:
        self._received: int | None = None
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
        if self._deferring and number == self._received == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number
        if not self._deferring:
            self.check()


def leave_to_parent() -> None:
    """For a process that its parent ends by SIGTERM: such an end is no failure, and Ctrl-C is the parent's business.

    Terminals and launchers signal both. A child that died of it would raise an error in the parent, which is saving its state.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
