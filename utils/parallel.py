"""Apply a function to a stream of items in several processes, in order and with few items in memory.

``concurrent.futures.ProcessPoolExecutor`` hangs if a process is killed while it sends a result, and its processes outlive a
killed parent.
"""

from __future__ import annotations

import argparse
import atexit
import multiprocessing
import os
import pickle
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, ThreadPoolExecutor, wait
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Literal, TypeVar

import numpy as np

from utils.errors import InputError
from utils.signals import blocked, ignore_stop_signals

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


class WorkerFailed(InputError):
    """The machine, not the input, is to blame: a worker process was killed, or none can be started."""


def cannot_start(error: Exception, option: str) -> WorkerFailed:
    """Return what to raise if ``error`` prevents another of the processes, whose number is set by ``option``."""
    return WorkerFailed(f"cannot start a worker ({error}); try a lower {option}, or see ulimit -a")


def in_order(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    processes: int,
    *,
    finish: Callable[[Result], Any] = lambda result: result,
    ahead: int = 4,
    method: Literal["spawn", "fork"] = "spawn",
    option: str = "--nproc",
) -> Iterator[Any]:
    """Yield ``finish(function(item))`` in the order of ``items``; ``function`` is called in worker processes.

    Args:
        processes: their number; instead of a single one that is spawned, this process is used.
        finish: called in a thread of this process.
        ahead: how many items per process are taken ahead of the caller.
        method: how processes start; a fork is fast, and needs care with open files and threads.
        option: what the user calls ``processes``.

    Raises ``WorkerFailed``, and what ``function`` raises.
    """
    if processes == 1 and method == "spawn":
        yield from map(finish, map(function, items))
        return
    workers: list[_Worker] = []
    idle: SimpleQueue[_Worker] = SimpleQueue()

    def apply(item: Item) -> Any:
        worker = idle.get()
        try:
            result, failure, trace = worker(item)
        except (EOFError, OSError):
            with suppress(InvalidStateError):  # not the first one
                died.set_exception(WorkerFailed(f"a worker was killed, perhaps because memory ran out; try a lower {option}"))
            raise
        finally:
            idle.put(worker)
        if failure is not None:
            raise failure from RuntimeError(f"in a worker process:\n{trace}")
        return finish(result)

    def oldest() -> Any:
        first = pending.popleft()
        wait((first, died), return_when=FIRST_COMPLETED)  # the worker of the oldest item may be stalled
        return (died if died.done() else first).result()

    pending: deque[Future[Any]] = deque()
    died: Future[Any] = Future()  # fails when a worker dies
    threads = ThreadPoolExecutor(processes)
    try:
        for item in items:
            try:
                if len(workers) < processes:
                    workers.append(_Worker(function, multiprocessing.get_context(method)))
                    idle.put(workers[-1])
                pending.append(threads.submit(apply, item))
            except (OSError, RuntimeError) as error:
                raise cannot_start(error, option) from error
            if len(pending) > ahead * processes:
                yield oldest()
        while pending:
            yield oldest()
    finally:
        for worker in workers:  # their results are not needed; a forked one also holds the pipes of those before it
            worker.process.kill()
        threads.shutdown(cancel_futures=True)
        for worker in workers:
            worker.close()


class _Worker:
    """A process that applies ``function`` to one item at a time; either side sees the other's death as the end of the pipe."""

    def __init__(self, function: Callable[[Any], Any], context: Any) -> None:
        self._pipe, remote = context.Pipe()
        with remote, blocked():  # Ctrl-C must not print a traceback of the child's first imports
            self.process = context.Process(target=_serve, args=(function, remote, self._pipe), daemon=True)
            self.process.start()

    def __call__(self, item: Any) -> Any:
        self._pipe.send(item)
        sizes = self._pipe.recv()
        head, *views = [np.empty(size, np.uint8).data for size in sizes]
        for view in (head, *views):
            while view:
                if not (count := os.readv(self._pipe.fileno(), [view])):
                    raise EOFError
                view = view[count:]
        return pickle.loads(head, buffers=views)

    def close(self) -> None:
        """Release what the killed process leaves."""
        self._pipe.close()
        self.process.join()


def _serve(function: Callable[[Any], Any], pipe: Connection, parents: Connection) -> None:
    ignore_stop_signals()
    parents.close()  # so that the pipe ends with the parent
    with suppress(EOFError, OSError):  # the parent has closed the pipe or died
        while True:
            item = pipe.recv()
            try:
                views = _views((function(item), None, ""))
            except Exception as error:
                views = _views((None, _picklable(error), traceback.format_exc()))
            pipe.send([view.nbytes for view in views])
            for view in views:
                while view:
                    view = view[os.write(pipe.fileno(), view) :]


def _views(answer: tuple[Any, ...]) -> list[memoryview]:
    """Pickle ``answer``, its buffers apart and not copied."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(answer, protocol=5, buffer_callback=buffers.append)
    return [memoryview(head), *(buffer.raw() for buffer in buffers)]


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its __reduce__ or __init__ raises
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@atexit.register
def _kill_workers() -> None:
    """Kill what an exception left behind: multiprocessing would send SIGTERM, which workers ignore, and wait."""
    for child in multiprocessing.active_children():
        child.kill()
