"""What a run writes down as it goes: a text log, and scalars for TensorBoard."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from utils.errors import InputError
from utils.logger import FORMAT


class _LogFile(logging.FileHandler):
    """One that leaves it to the checkpoints to tell of a full disk."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class RunLog:
    """The log folder of a run: ``log.txt`` and TensorBoard's event file. Use it as a context manager.

    Args:
        updates: done before; TensorBoard forgets what a killed run recorded after them.

    Raises:
        InputError: the disk refuses, here and in ``scalars``; or another process logs there.
    """

    def __init__(self, folder: Path, updates: int = 0) -> None:
        self.folder = folder
        with self._told("log.txt"):
            self.file = _LogFile(folder / "log.txt")
        try:
            # Of this process alone, not of the readers that it forks: it ends with the run, however that ends.
            assert self.file.stream is not None
            fcntl.lockf(self.file.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.file.close()
            raise InputError(f"{folder.parent}: another run is at work in this folder, expected one at a time") from error
        self.file.setFormatter(FORMAT)
        logging.getLogger().addHandler(self.file)
        with self._told("TensorBoard's events"):
            # The writer itself: tensorboardX's queue and thread before it lose two minutes when the process is killed, and
            # wait for ever once the disk is full.
            self.events = EventsWriter(str(folder / "events"), f".{os.getpid()}")
            self.events.write_event(Event(step=updates + 1, session_log=SessionLog(status=SessionLog.START)))
            self.events.flush()

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        """Record ``values`` after ``update`` updates."""
        with self._told("TensorBoard's events"):
            for name, value in values.items():
                self.events.write_event(Event(wall_time=time.time(), step=update, summary=scalar(name, value)))
            self.events.flush()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is not None:
            self.file.handle(logging.makeLogRecord({"levelname": "ERROR", "msg": f"ended by {type(error).__name__}: {error}"}))
        with suppress(OSError):  # said before
            self.events.close()
        logging.getLogger().removeHandler(self.file)
        with suppress(OSError):
            self.file.close()

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"{self.folder}: {what} cannot be written ({error.strerror})") from error
