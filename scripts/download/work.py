"""The threads of a download, how far they are, and their end."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from queue import Empty, SimpleQueue
from typing import Any

from utils.errors import InputError, print_error

TICK = 0.25  # seconds between two looks at the progress
GRACE = 0.5  # seconds that threads have to come to an end; one that waits for a server is left behind


class Cancelled(Exception):
    """The program ends, and this thread with it."""


class Work:
    """Runs a function on many items in ``jobs`` threads. Use it as a context manager, at whose end the threads stop.

    ``total`` is the number of bytes to fetch and to unpack, for the status line, which only a terminal gets.
    """

    def __init__(self, jobs: int) -> None:
        self.total = 0
        self.failures = 0
        self._jobs = jobs
        self._done = 0
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._threads: list[threading.Thread] = []
        self._started = time.monotonic()
        self._watched = sys.stderr.isatty()

    def __enter__(self) -> Work:
        return self

    def __exit__(self, *_: object) -> None:
        self._cancelled.set()
        self._clear()
        deadline = time.monotonic() + GRACE
        for thread in self._threads:
            thread.join(max(0, deadline - time.monotonic()))

    def advance(self, count: int = 0) -> None:
        """Say from a thread that ``count`` more bytes are done. Raises ``Cancelled`` when it is to end."""
        with self._lock:
            self._done += count
        self.pause(0)

    def pause(self, seconds: float) -> None:
        """Wait in a thread. Raises ``Cancelled`` when it is to end."""
        if self._cancelled.wait(seconds):
            raise Cancelled

    def fail(self, error: InputError) -> None:
        """Print the line of something that went wrong while the rest goes on."""
        self._clear()
        self.failures += 1
        print_error(error)

    def run(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """The results of ``function`` as they come; an ``InputError`` that it raises is printed and counted instead."""
        waiting: SimpleQueue[Any] = SimpleQueue()
        outcomes: SimpleQueue[Any] = SimpleQueue()
        for item in items:
            waiting.put(item)
        count = waiting.qsize()
        self._threads = [
            threading.Thread(target=self._labour, args=(function, waiting, outcomes), daemon=True)
            for _ in range(min(self._jobs, count))
        ]
        for thread in self._threads:
            thread.start()
        while count:
            try:
                outcome = outcomes.get(timeout=TICK)
            except Empty:
                self._show()
                continue
            count -= 1
            if isinstance(outcome, InputError):
                self.fail(outcome)
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                self._clear()
                yield outcome

    def _labour(self, function: Callable[[Any], Any], waiting: SimpleQueue[Any], outcomes: SimpleQueue[Any]) -> None:
        while not self._cancelled.is_set():
            try:
                item = waiting.get_nowait()
            except Empty:
                return
            try:
                outcomes.put(function(item))
            except BaseException as error:
                outcomes.put(error)

    def _show(self) -> None:
        if self._watched and self.total:
            rate = self._done / (time.monotonic() - self._started)
            line = f"{in_units(self._done)} of {in_units(self.total)} fetched and unpacked, {in_units(rate)}/s"
            print(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if self._watched:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def in_units(size: float) -> str:
    """A number of bytes for people, such as ``1.5 GB``."""
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"
