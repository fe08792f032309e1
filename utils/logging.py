"""What programs say: messages and progress on the screen, and a run's text log and scalars for TensorBoard."""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # tensorboardX stands on it
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar
from tqdm import tqdm

from utils.errors import InputError

FORMAT = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")


class _ScreenHandler(logging.Handler):
    """Prints above the progress bars instead of through them."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def log_to_screen(worker: int = 0) -> None:
    """Send the program's messages to the screen; of workers other than the first only warnings."""
    handler = _ScreenHandler()
    if worker:
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s worker {worker}: %(message)s", FORMAT.datefmt))
        handler.setLevel(logging.WARNING)
    else:
        handler.setFormatter(FORMAT)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)


def progress_bar(shown: bool, **settings: Any) -> tqdm:
    """A tqdm bar with these settings, if ``shown``; where nobody watches, in a queue's log file, it speaks once a minute."""
    seconds = 0.1 if sys.stderr.isatty() else 60
    return tqdm(disable=not shown, dynamic_ncols=True, mininterval=seconds, maxinterval=max(seconds, 10), **settings)


EVENT_FILES = "events.out.tfevents.*"


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


def read_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What ``RunLog.scalars`` recorded in ``folder``: by name, the value after each update, in their order.

    Of a run that was resumed, what its killed parts recorded after the update that it went on from is forgotten.

    Raises:
        InputError: there are no event files, or one cannot be read or is damaged. That the last record of one is cut short, as
            a kill may leave it, is no damage.
    """
    try:
        recorded = [_read_events(file) for file in folder.glob(EVENT_FILES)]
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from error
    if not recorded:
        raise InputError(f"{folder}: no {EVENT_FILES} in it, expected the log folder of a training")
    # By their first event, which has the time to a fraction of a second; the names have it to a second.
    sessions = sorted(filter(None, recorded), key=lambda events: events[0].wall_time)
    scalars: dict[str, dict[int, float]] = {}
    for event in chain.from_iterable(sessions):
        if event.session_log.status == SessionLog.START:
            scalars = {
                name: {update: value for update, value in values.items() if update < event.step}
                for name, values in scalars.items()
            }
        for value in event.summary.value:
            if value.HasField("simple_value"):
                scalars.setdefault(value.tag, {})[event.step] = value.simple_value
    return {name: dict(sorted(values.items())) for name, values in scalars.items() if values}


def _read_events(file: Path) -> list[Event]:
    """The events of a file of TFRecords: length (8 bytes), its checksum (4), so many bytes, their checksum (4)."""
    contents = file.read_bytes()
    events: list[Event] = []
    start = 0
    while start + 12 <= len(contents):
        try:
            (length,) = struct.unpack("<Q", _checked(contents, start, 8))
            end = start + 12 + length + 4
            if end > len(contents):
                break
            events.append(Event.FromString(_checked(contents, start + 12, length)))
        except DecodeError as error:
            raise InputError(f"{file}: damaged at byte {start} ({error}), expected TensorBoard's events") from error
        start = end
    return events


def _checked(contents: bytes, start: int, length: int) -> bytes:
    """The ``length`` bytes from ``start`` on, which have their checksum behind them."""
    end = start + length
    if contents[end : end + 4] != struct.pack("<I", masked_crc32c(contents[start:end])):
        raise DecodeError("its checksum does not fit")
    return contents[start:end]
