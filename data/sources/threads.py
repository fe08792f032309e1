"""The threads of a download: their progress and their end."""

from __future__ import annotations

import io
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TypeVar

from utils.errors import InputError

TICK = 0.25  # seconds between updates of the status line
GRACE = 0.5  # seconds that threads have to stop; one that waits for a server is abandoned

Item = TypeVar("Item")
Result = TypeVar("Result")


class Cancelled(Exception):
    """The program is ending, and this thread with it."""


class Pool:
    """Run functions in threads, count the bytes they process, and show the count on a terminal.

    The threads are daemons, unlike those of ``concurrent.futures``, so that none delays the end while it waits for a server.
    """

    def __init__(self, jobs: int) -> None:
        self.total = self._done = 0  # bytes
        self._jobs = jobs
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._threads: list[threading.Thread] = []
        self._started = time.monotonic()

    def close(self) -> None:
        """Stop the threads."""
        self._cancelled.set()
        self._show("")
        deadline = time.monotonic() + GRACE
        for thread in self._threads:
            thread.join(max(0, deadline - time.monotonic()))

    def advance(self, count: int) -> None:
        """Count bytes. Raises ``Cancelled`` if the thread must stop."""
        with self._lock:
            self._done += count
        self.pause(0)

    def pause(self, seconds: float) -> None:
        """Wait. Raises ``Cancelled`` if the thread must stop."""
        if self._cancelled.wait(seconds):
            raise Cancelled

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result | InputError]:
        """Yield what the calls return, or the ``InputError`` that they raise, in the order in which they end."""
        waiting = deque(items)
        outcomes: SimpleQueue[Result | BaseException] = SimpleQueue()

        def run() -> None:
            with suppress(IndexError):
                while not self._cancelled.is_set():
                    item = waiting.popleft()
                    try:
                        outcomes.put(function(item))
                    except BaseException as error:
                        outcomes.put(error)

        self._threads = [threading.Thread(target=run, daemon=True) for _ in range(min(self._jobs, len(items)))]
        for thread in self._threads:
            thread.start()
        remaining = len(items)
        while remaining:
            try:
                outcome = outcomes.get(timeout=TICK)
            except Empty:
                speed = self._done / 1e6 / (time.monotonic() - self._started)
                self._show(f"{self._done / 1e9:,.1f} of {self.total / 1e9:,.1f} GB fetched and unpacked, {speed:,.1f} MB/s")
                continue
            remaining -= 1
            self._show("")
            if isinstance(outcome, BaseException) and not isinstance(outcome, InputError):
                raise outcome
            yield outcome

    def _show(self, line: str) -> None:
        if self.total and sys.stderr.isatty():
            print(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)


class Reader(io.FileIO):
    """A file whose reads count as progress."""

    def __init__(self, path: Path, pool: Pool) -> None:
        super().__init__(path)
        self._pool = pool

    def read(self, size: int | None = -1, /) -> bytes:
        """Read like ``FileIO``. Raises ``Cancelled`` if the thread must stop."""
        block = super().read(size)
        self._pool.advance(len(block))
        return block
