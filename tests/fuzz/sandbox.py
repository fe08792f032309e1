"""Run readers on hostile bytes in a child process, so that a crash, a hang or full memory is an outcome like any other."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import hashlib
import multiprocessing
import os
import random
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tests.fuzz.mutations import Make
from utils.errors import InputError

MIB = 1 << 20

_FORK = multiprocessing.get_context("fork")
_MAX_MESSAGE = 64 << 10  # a message may quote the input, but not all of it

Read = Callable[[bytes], object]
Errors = tuple[type[Exception], ...]


class Outcome(NamedTuple):
    """What reading one input led to: an ``error`` is one that the reader documents, a ``finding`` is what must not happen."""

    kind: Literal["result", "error", "finding"]
    detail: str
    seconds: float
    memory: int  # the largest growth of the process while it read the input, in bytes


class Sandbox:
    """A child process that runs ``read`` on one input after another; it is replaced when it dies. Use as a context manager.

    Args:
        errors: the exceptions that ``read`` documents.
        memory: maximum growth of the child per input in bytes, all mappings counted; a MemoryError beyond it is a finding.
        seconds: limit of processor time per input.
        warm_up: an input to read first, so that what is loaded once is not counted.
    """

    def __init__(self, read: Read, errors: Errors, memory: int, seconds: float = 5, warm_up: bytes = b"") -> None:
        self._work, self._seconds = (read, errors, memory, warm_up), seconds
        self._child: Any = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._connection.close()
            self._child.kill()
            self._child.join()
            self._child = None

    def run(self, data: bytes) -> Outcome:
        """Run ``read(data)`` in the child."""
        if self._child is None:
            self._connection, theirs = _FORK.Pipe()
            self._child = _FORK.Process(target=_serve, args=(theirs, self._connection, *self._work))
            self._child.start()
            theirs.close()
            self._connection.recv()  # it is ready
        start = time.monotonic()
        try:
            self._connection.send_bytes(data)
            detail = f"took over {self._seconds} seconds"
            if self._connection.poll(4 * self._seconds):  # the processor may be shared
                outcome = Outcome(*self._connection.recv())
                return outcome if outcome.seconds <= self._seconds else outcome._replace(kind="finding", detail=detail)
        except (EOFError, OSError):
            self._child.join()
            code = self._child.exitcode
            detail = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self.__exit__()
        return Outcome("finding", detail, time.monotonic() - start, 0)


def _serve(connection: Connection, others: Connection, read: Read, errors: Errors, memory: int, warm_up: bytes) -> None:
    others.close()  # so that recv_bytes raises EOFError when the parent ends
    faulthandler.disable()
    for descriptor in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(Exception):
        read(warm_up)
    gc.freeze()  # no collection touches, and so copies, the parent's objects
    connection.send("ready")
    while True:
        data = connection.recv_bytes()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew; receiving holds the input twice
        before, start = _peak_memory(), time.process_time()
        _limit_growth(memory)
        kind, detail = _outcome(read, data, errors)
        _limit_growth(None)
        connection.send((kind, detail, time.process_time() - start, _peak_memory() - before))


def _limit_growth(memory: int | None) -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft = resource.RLIM_INFINITY if memory is None else size + memory
    resource.setrlimit(resource.RLIMIT_AS, (soft, resource.RLIM_INFINITY))


def _peak_memory() -> int:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10


def _outcome(read: Read, data: bytes, errors: Errors) -> tuple[str, str]:
    try:
        read(data)
    except errors as error:
        message = str(error)
        if len(message) > _MAX_MESSAGE or "\n" in message:
            return "finding", f"a message of {len(message)} characters and {message.count(chr(10)) + 1} lines"
        return "error", message
    except BaseException as error:
        return "finding", f"{type(error).__name__}: {str(error)[:200]}"
    return "result", ""


class Fuzz:
    """Run a campaign of ``inputs`` per reader, and print a row of a table for each."""

    def __init__(self, inputs: int) -> None:
        self.inputs = inputs

    def __call__(
        self,
        name: str,
        read: Read,
        make: Make,
        sound: bytes,
        *,
        errors: Errors = (InputError,),
        memory: int = 64 * MIB,
        share: float = 1.0,
        deaths: Collection[str] = (),
    ) -> None:
        """Read different inputs that ``make`` makes of the ``sound`` one, the same ones every time.

        ``share`` of the inputs is for slow readers and for several files of a database; ``deaths`` may end the process.
        """
        kinds, findings, inputs = Counter[str](), dict[str, bytes](), round(self.inputs * share)
        outcomes: dict[bytes, Outcome] = {}
        with Sandbox(read, errors, memory, warm_up=sound) as sandbox:
            assert sandbox.run(sound).kind == "result", sandbox.run(sound)
            for data in (make(random.Random(number)) for number in range(20 * inputs)):
                key = hashlib.sha256(data).digest()
                if len(outcomes) == inputs or key in outcomes:
                    continue
                outcome = outcomes[key] = sandbox.run(data)
                kind = "death" if outcome.detail in deaths else outcome.kind
                kinds[kind] += 1
                if kind == "finding":
                    findings.setdefault(outcome.detail, data)
        counts = " | ".join(f"{kinds[kind]:,}" for kind in ("result", "error", "death", "finding"))
        seconds, peak = (max(column) for column in list(zip(*outcomes.values(), strict=True))[2:])
        print(f"| {name} | {counts} | {1000 * seconds:.0f} ms | {peak // MIB} MiB | {memory // MIB} MiB |")
        assert not findings, name
        assert kinds["error"], name
        assert len(outcomes) == inputs, f"{name}: too few different inputs"

    def file(
        self, name: str, path: Path, load: Callable[[Path], object], make: Make, sound: bytes, named: str = "", **limits: Any
    ) -> None:
        """Fuzz a reader of the file ``path``; its errors must contain ``named``, by default the folder."""

        def read(data: bytes) -> None:
            path.write_bytes(data)
            try:
                load(path)
            except InputError as error:
                if (named or str(path.parent)) not in str(error):
                    raise AssertionError(f"names no file: {error}") from error
                raise

        self(name, read, make, sound, **limits)
        path.write_bytes(sound)
