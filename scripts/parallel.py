"""Work on a stream of items in several processes, in order and with little of it in memory."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from utils.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")


def add_nproc(parser: argparse.ArgumentParser) -> None:
    """Give a program the option ``--nproc``."""
    parser.add_argument("--nproc", type=_positive, default=_cores(), help="worker processes (%(default)s)")


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: expected at least 1")
    return number


def _cores() -> int:
    """Those that this process may use, where the system says."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _end_with_parent() -> None:
    """A worker waits for work that never comes when its parent is killed; and Ctrl-C is the parent's to act upon."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def in_order(task: Callable[[Item], Result], items: Iterable[Item], nproc: int) -> Iterator[Result]:
    """Results in the order of ``items``; workers are never more than a few items ahead of whoever takes the results.

    With ``nproc`` 1 all is done in this process. Raises ``InputError`` when a worker is killed.
    """
    if nproc == 1:
        yield from map(task, items)
        return
    waiting: deque[Future[Result]] = deque()
    # Spawned, because this process may have a database open.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(nproc, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(task, item))
                if len(waiting) > 4 * nproc:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise InputError(f"--nproc {nproc}: a worker was killed, perhaps for memory; try fewer") from error
