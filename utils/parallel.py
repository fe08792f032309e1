"""Work on a stream of items in several processes, in order and with little of it in memory."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, TypeVar

from utils.errors import InputError
from utils.signals import SIGNALS, leave_to_parent

MOST = 256  # processes that anyone can mean
Item = TypeVar("Item")
Result = TypeVar("Result")


def add_nproc(parser: argparse.ArgumentParser) -> None:
    """Give a program the option ``--nproc``."""
    parser.add_argument("--nproc", type=_number, default=min(cores(), MOST), help="worker processes (%(default)s)")


def _number(word: str) -> int:
    number = int(word)
    if not 1 <= number <= MOST:
        raise argparse.ArgumentTypeError(f"{number}: expected 1 to {MOST}")
    return number


def cores() -> int:
    """Those that this process may use, where the system says."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    """A process that does ``task`` on the items that it is called with, one at a time.

    Nothing but its own pipe leads to it, so that whichever of the two processes ends, the other one sees the pipe's end.
    """

    def __init__(self, task: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context("spawn")  # this process may have a database open
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(task, theirs), daemon=True)
        # Signals to all processes are this one's to act upon, also while the other one is still importing.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()

    def __call__(self, item: Any) -> Any:
        try:
            self._pipe.send(item)
            done, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise InputError("--nproc: a worker was killed, perhaps for memory; try fewer") from error
        if not done:
            raise value
        return value

    def close(self) -> None:
        """Let it end, when it has nothing to do."""
        self._pipe.close()
        self.process.join()


def _serve(task: Callable[[Any], Any], pipe: Connection) -> None:
    leave_to_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    while True:
        try:
            item = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = True, task(item)
        except Exception as error:
            answer = False, error
        try:
            pipe.send(answer)
        except OSError:  # nobody waits for it any more
            return


def in_order(task: Callable[[Item], Result], items: Iterable[Item], nproc: int) -> Iterator[Result]:
    """Results in the order of ``items``; workers are never more than a few items ahead of whoever takes the results.

    With ``nproc`` 1 all is done in this process. Raises ``InputError`` when a worker is killed.
    """
    if nproc == 1:
        yield from map(task, items)
        return
    workers = [_Worker(task) for _ in range(nproc)]
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def do(item: Item) -> Result:
        worker = idle.get()
        try:
            result: Result = worker(item)
            return result
        finally:
            idle.put(worker)

    waiting: deque[Future[Result]] = deque()
    threads = ThreadPoolExecutor(nproc)  # each waits for a worker
    try:
        for item in items:
            waiting.append(threads.submit(do, item))
            if len(waiting) > 4 * nproc:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BaseException:
        for worker in workers:
            worker.process.kill()
        raise
    finally:
        threads.shutdown(cancel_futures=True)
        for worker in workers:
            worker.close()
