"""Runs a reader on hostile bytes in a child process, so that a crash, a hang or a full memory is an outcome like any other."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Literal

_FORK = multiprocessing.get_context("fork")
_LONGEST_MESSAGE = 64 << 10  # it may quote the input, but not all of it


@dataclass(frozen=True)
class Outcome:
    """What a reader made of one input.

    Attributes:
        kind: ``error`` is one of the errors that the reader documents; a ``finding`` is anything that must not happen.
        detail: the error, or what happened.
        seconds: how long it took.
        memory: by how many bytes the process has grown at most since its start, in this or an earlier input.
    """

    kind: Literal["result", "error", "finding"]
    detail: str
    seconds: float
    memory: int


class Sandbox:
    """A child process that runs ``read`` on one input after another, and is replaced when it dies.

    Args:
        errors: what ``read`` may raise.
        memory: by how many bytes the child may grow, all that it maps counted; past them Python's MemoryError is a finding.
        seconds: how long one input may take.
        warm_up: an input to read before the child's size is taken.
    """

    def __init__(
        self, read: Callable[[bytes], object], errors: tuple[type[Exception], ...], memory: int, seconds: float, warm_up: bytes
    ) -> None:
        self._work = (read, errors, memory, warm_up)
        self._seconds = seconds
        self._child: Any = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def run(self, data: bytes) -> Outcome:
        """What ``read(data)`` comes to."""
        if self._child is None:
            self._connection, theirs = _FORK.Pipe()
            self._child = _FORK.Process(target=_serve, args=(theirs, self._connection, *self._work))
            self._child.start()
            theirs.close()
            self._connection.recv()  # it is ready
        start = time.monotonic()
        try:
            self._connection.send_bytes(data)
            if self._connection.poll(self._seconds):
                return Outcome(*self._connection.recv())
            detail = f"took over {self._seconds} seconds"
        except (EOFError, OSError):
            self._child.join()
            code = self._child.exitcode
            detail = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self._end()
        return Outcome("finding", detail, time.monotonic() - start, 0)

    def _end(self) -> None:
        if self._child is not None:
            self._connection.close()
            self._child.kill()
            self._child.join()
            self._child.close()
            self._child = None


def _serve(
    connection: Connection,
    others: Connection,
    read: Callable[[bytes], object],
    errors: tuple[type[Exception], ...],
    memory: int,
    warm_up: bytes,
) -> None:
    others.close()
    faulthandler.disable()
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(Exception):  # what is wrong with it is told to those who run it
        read(warm_up)
    with open("/proc/self/statm") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before = _settled_memory()
    connection.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            data = connection.recv_bytes()
            start = time.monotonic()
            kind, detail = _outcome(read, data, errors)
            connection.send((kind, detail, time.monotonic() - start, _most_memory() - before))
    os._exit(0)  # nothing of the parent's is to be tidied up here


def _settled_memory() -> int:
    """How much memory this process has once the room is given back that the parent had freed, and is measured from now on."""
    gc.freeze()  # and no collection goes through what is the parent's, either
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _most_memory()


def _most_memory() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM:"))


def _outcome(read: Callable[[bytes], object], data: bytes, errors: tuple[type[Exception], ...]) -> tuple[str, str]:
    try:
        read(data)
    except errors as error:
        message = str(error)
        return (
            ("error", message) if len(message) <= _LONGEST_MESSAGE else ("finding", f"a message of {len(message)} characters")
        )
    except BaseException as error:
        return "finding", f"{type(error).__name__}: {str(error)[:200]}"
    return "result", ""
