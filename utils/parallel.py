"""Apply a function to a stream of items in several processes, in order and with few items in memory.

``concurrent.futures.ProcessPoolExecutor`` will not do: its workers share their pipes, so that it waits forever for the rest of
a result if the worker that was sending it is killed, and its workers stay if their parent is.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from utils.errors import InputError
from utils.signals import SIGNALS, leave_to_parent

MAX_PROCESSES = 256
Item = TypeVar("Item")
Result = TypeVar("Result")


def add_nproc(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--nproc`` to ``parser``."""
    parser.add_argument("--nproc", type=_number, default=min(cores(), MAX_PROCESSES), help="worker processes (%(default)s)")


def _number(word: str) -> int:
    number = int(word)
    if not 1 <= number <= MAX_PROCESSES:
        raise argparse.ArgumentTypeError(f"{number}: expected 1 to {MAX_PROCESSES}")
    return number


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(function: Callable[[Item], Result], items: Iterable[Item], processes: int) -> Iterator[Result]:
    """Yield ``function(item)`` in the order of ``items``, of which at most 4 per process are taken ahead of the caller.

    With one process everything is done in this one. Raises ``InputError`` if a worker is killed.
    """
    if processes == 1:
        yield from map(function, items)
        return
    workers: list[_Worker] = []
    of_thread = threading.local()

    def apply(item: Item) -> Result:
        if not hasattr(of_thread, "worker"):
            of_thread.worker = _Worker(function)
            workers.append(of_thread.worker)
        result: Result = of_thread.worker(item)
        return result

    pending: deque[Future[Result]] = deque()
    threads = ThreadPoolExecutor(processes)
    try:
        for item in items:
            pending.append(threads.submit(apply, item))
            if len(pending) > 4 * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BaseException:
        for worker in workers:
            worker.process.kill()
        raise
    finally:
        threads.shutdown(cancel_futures=True)
        for worker in workers:
            worker.close()


class _Worker:
    """A process that applies ``function`` to one item at a time; either side sees the other's death as the end of the pipe."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share this process's open databases
        self._pipe, remote = context.Pipe()
        self.process = context.Process(target=_serve, args=(function, remote), daemon=True)
        # Of this thread, and of the child until it ignores them: Ctrl-C must not print a traceback of its first imports.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self.process.start()
        remote.close()

    def __call__(self, item: Any) -> Any:
        try:
            self._pipe.send(item)
            result, failure = self._pipe.recv()
        except (EOFError, OSError) as error:
            reason = "a worker was killed, perhaps because memory ran out"
            raise InputError(f"{reason}; try a lower --nproc (--workers of make_scenes.py)") from error
        if failure is not None:
            raise failure
        return result

    def close(self) -> None:
        """End the process, which must be idle or killed."""
        self._pipe.close()
        self.process.join()


def _serve(function: Callable[[Any], Any], pipe: Connection) -> None:
    leave_to_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    with suppress(EOFError, OSError):  # the parent has closed the pipe or died
        while True:
            item = pipe.recv()
            try:
                answer: tuple[Any, Exception | None] = function(item), None
            except Exception as error:
                answer = None, error
            pipe.send(answer)
