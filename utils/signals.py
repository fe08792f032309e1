"""SIGTERM, SIGHUP and Ctrl-C: at once where nothing can be lost, otherwise once the work at hand is done."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from utils.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAME_KEY = 1.0  # seconds within which one Ctrl-C may arrive twice, from the terminal and from the launcher


class StopSignal:
    """Raise ``Interrupted`` in the main thread on one of ``SIGNALS``; later within ``deferred``. Use it as a context manager.

    Only the first signal counts, so that nothing interrupts the clean-up that it causes; but a later Ctrl-C raises
    ``KeyboardInterrupt`` at once, for users who would rather lose what is in memory. A signal that the parent process ignores
    stays ignored. ``advice`` is appended to the message. On exit the former handlers return, except that of
    Ctrl-C if there was a signal: the clean-up goes on.
    """

    def __init__(self, advice: str = "") -> None:
        self._advice = advice
        self._received: int | None = None
        self._received_at = 0.0
        self._deferring = False
        self._former_handlers: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._former_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former_handlers.items():
            if number != signal.SIGINT or self._received is None:
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the block finish, or reach its next ``check``, before a signal raises ``Interrupted``."""
        self._deferring = True
        try:
            yield
        except RuntimeError:  # the signal may have ended another rank, too
            self.check()
            raise
        finally:
            self._deferring = False
        self.check()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within ``deferred``: raise ``Interrupted`` at once all the same, while there is only a wait to interrupt."""
        deferring, self._deferring = self._deferring, False
        try:
            self.check()
            yield
        finally:
            self._deferring = deferring

    def check(self) -> None:
        """Raise ``Interrupted`` if a signal has arrived."""
        if self._received is not None:
            raise Interrupted(self._received, self._advice)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received is None:
            self._received, self._received_at = number, time.monotonic()
            if not self._deferring:
                self.check()
        elif number == signal.SIGINT and time.monotonic() > self._received_at + SAME_KEY:
            raise KeyboardInterrupt


@contextmanager
def killable() -> Iterator[None]:
    """Let Ctrl-C kill the process at once within the block, where C++ may hold the main thread and no handler can run."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def blocked() -> Iterator[None]:
    """Delay signals in the main thread, and in a child process that starts within the block until it ignores them."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    arrived: list[int] = []  # in other threads, for which Python runs the handler in the main one all the same
    in_main = threading.current_thread() is threading.main_thread()  # only there handlers can be set
    handlers = {number: signal.getsignal(number) for number in SIGNALS if in_main and callable(signal.getsignal(number))}
    for number in handlers:
        signal.signal(number, lambda number, frame: arrived.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
        for delayed in arrived:
            signal.raise_signal(delayed)


def ignore_stop_signals() -> None:
    """Ignore, in a child process, the signals that a terminal or launcher sends to all: its parent will end it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
