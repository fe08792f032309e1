"""Batches of a dataset, read ahead by worker processes and moved to the device.

torch's ``DataLoader`` will not do: its workers need /dev/shm, of which Docker gives 64 MB, and a file descriptor per tensor. If
one of these runs out, a batch is lost and the main process waits forever. Here each worker has a pipe, which ends with it.
"""

from __future__ import annotations

import atexit
import fcntl
import io
import multiprocessing
import pickle
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import cycle, islice
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from data.batch import AnchorBatch, PairBatch
from utils.errors import InputError
from utils.signals import blocked, leave_to_parent

PIPE_BYTES = 1 << 20  # Linux's limit for users; the default of 64 KB makes reader and writer wait for each other too often
Item = TypeVar("Item", PairBatch, AnchorBatch)


class ReadingFailed(InputError):
    """The machine, not the data, keeps a batch from being read: a worker was killed, or memory or descriptors are short."""


@dataclass(frozen=True)
class Loader:
    """How to read: in ``workers`` processes (0: this one), and whether into page-locked memory for the copy to a GPU."""

    device: torch.device
    workers: int = 0
    pin: bool = False

    def __call__(self, dataset: Dataset[Item], indices: Sequence[int] | None = None) -> Iterator[Item]:
        """Yield the batches with these ``indices``, all by default, on the device.

        Raises the dataset's ``InputError``, and ``ReadingFailed``.
        """
        order: Sequence[int] = range(len(dataset)) if indices is None else indices  # type: ignore[arg-type]
        if self.workers == 0:
            for index in order:
                item = _read(dataset, index)
                yield (item.pin_memory() if self._pins else item).to(self.device)
            return
        received: SimpleQueue[Item | Exception] = SimpleQueue()
        room = threading.Semaphore(self.workers)  # of ``received``; each worker holds one batch more
        with ExitStack() as stack:
            stack.callback(room.release, self.workers)  # the thread then ends
            try:
                shares = [order[first :: self.workers] for first in range(min(self.workers, len(order)))]
                started: list[_Worker] = [stack.enter_context(_Worker(dataset, share)) for share in shares]
                turns: list[_Worker] = [*islice(cycle(started), len(order))]
                threading.Thread(target=self._receive, args=(turns, received, room), daemon=True).start()
            except (OSError, MemoryError, RuntimeError) as error:
                raise ReadingFailed(
                    f"n_workers {self.workers}: cannot start a loader worker ({error or 'memory ran out'}); raise the limits "
                    "of processes, open files and memory (ulimit -a), or use n_workers 0"
                ) from error
            for worker in turns:
                outcome = received.get()
                if isinstance(outcome, EOFError):
                    raise worker.death()
                if isinstance(outcome, Exception):
                    raise outcome
                room.release()
                yield outcome.to(self.device)

    def _receive(self, turns: Sequence[_Worker], received: SimpleQueue[Any], room: threading.Semaphore) -> None:
        """Put the next batch of each worker into ``received``, up to the first error; in a thread."""
        try:
            if self._pins:
                torch.cuda.set_device(self.device)  # of this thread
            for worker in turns:
                room.acquire()
                item = worker.receive()
                received.put(item.pin_memory() if self._pins and not isinstance(item, Exception) else item)
        except Exception as error:
            received.put(error)

    @property
    def _pins(self) -> bool:
        return self.pin and self.device.type == "cuda"


class _Worker:
    """A process that reads batches with the given indices and writes them into a pipe. Use it as a context manager."""

    def __init__(self, dataset: Dataset[Any], indices: Sequence[int]) -> None:
        reader, writer = multiprocessing.Pipe(duplex=False)
        with suppress(OSError, AttributeError):  # not Linux, or this user's pipes are too large together
            fcntl.fcntl(reader.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._reader, self._file = reader, open(reader.fileno(), "rb", closefd=False)  # noqa: SIM115
        self._process = multiprocessing.Process(target=_serve, args=(dataset, indices, reader, writer), daemon=True)
        with writer, blocked():  # a pipe ends when its last writer is closed
            self._process.start()

    def receive(self) -> Any:
        """Return the next batch, or the ``Exception`` of reading it. Raises ``EOFError`` if the process has died."""
        try:
            head, sizes = pickle.load(self._file)
        except pickle.UnpicklingError as error:
            raise EOFError from error
        buffers = [np.empty(size, np.uint8).data for size in sizes]
        for buffer in buffers:
            if self._file.readinto(buffer) < len(buffer):
                raise EOFError
        return pickle.loads(head, buffers=buffers)

    def death(self) -> ReadingFailed:
        """Return the error that says how the process died."""
        self._process.join()
        code = self._process.exitcode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        likely = (
            "memory ran out: use fewer n_workers, or 0" if code == -signal.SIGKILL else "the database is damaged: inspect_db"
        )
        return ReadingFailed(f"a loader worker was {how}; perhaps {likely}")

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._file.close()
        self._reader.close()


def _serve(dataset: Dataset[Any], indices: Sequence[int], reader: Connection, writer: Connection) -> None:
    leave_to_parent()
    reader.close()  # so that writing fails once the parent has died
    torch.set_num_threads(1)
    with suppress(OSError), open(writer.fileno(), "wb", closefd=False) as file:
        for index in indices:
            try:
                _send(_read(dataset, index), file)
            except InputError as error:
                _send(type(error)(str(error)), file)
            except BrokenPipeError:
                raise
            except Exception:
                _send(RuntimeError(f"in a loader worker:\n{traceback.format_exc()}"), file)


def _read(dataset: Dataset[Item], index: int) -> Item:
    try:
        return dataset[index]
    except (OSError, MemoryError) as error:
        raise ReadingFailed(f"cannot read a batch ({error or 'memory ran out'}); use fewer n_workers") from error


def _send(item: Any, file: io.BufferedWriter) -> None:
    """Write ``item`` so that ``receive`` reads it; without a copy of its tensors, which follow the pickle."""
    head, buffers = io.BytesIO(), []  # type: ignore[var-annotated]
    _Pickler(head, protocol=5, buffer_callback=buffers.append).dump(item)
    views = [buffer.raw() for buffer in buffers]
    pickle.dump((head.getvalue(), [view.nbytes for view in views]), file)
    for view in views:
        file.write(view)
    file.flush()


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, torch.Tensor) else NotImplemented


def _kill_workers() -> None:
    """Kill workers that an exception left behind: multiprocessing would send them SIGTERM, which they ignore, and wait."""
    for child in multiprocessing.active_children():
        child.kill()


atexit.register(_kill_workers)
