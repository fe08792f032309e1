"""Messages and progress bars on the screen, and the log folder of a run: its messages and its scalars."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

# The writer beneath SummaryWriter, whose queue and thread lose two minutes of scalars in a killed run and ignore a full disk.
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from tqdm import tqdm

from utils.errors import InputError
from utils.files import atomic_file, lock, read_file

FORMAT = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
SCALARS = "scalars.jsonl"


class _ScreenHandler(logging.Handler):
    """Print above the progress bars instead of through them."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def log_to_screen(rank: int = 0) -> None:
    """Print the program's messages on stderr; only warnings on ranks other than 0."""
    handler = _ScreenHandler()
    origin = f"rank {rank}: " if rank else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {origin}%(message)s", FORMAT.datefmt))
    handler.setLevel(logging.WARNING if rank else logging.INFO)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)


def progress_bar(shown: bool, **settings: Any) -> tqdm:
    """Return a tqdm bar, disabled unless ``shown``; in the log file of a batch job it prints once a minute."""
    seconds = 0.1 if sys.stderr.isatty() else 60
    return tqdm(disable=not shown, dynamic_ncols=True, mininterval=seconds, maxinterval=max(seconds, 10), **settings)


class _LogFile(logging.FileHandler):
    """A log file that ignores a full disk, which the checkpoints report."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class RunLog:
    """The log folder of a run: ``log.txt``, ``scalars.jsonl`` and TensorBoard's event files. Use it as a context manager.

    ``updates`` were done before, in a resumed run; what was recorded after them is dropped. Raises ``InputError`` if the disk
    refuses, here and in ``scalars``, or another process logs there.
    """

    def __init__(self, folder: Path, updates: int = 0) -> None:
        self.folder = folder
        if (folder / "log.txt").exists() and not (folder / "log.txt").is_file():
            raise InputError(f"{folder / 'log.txt'}: not a regular file; remove it or choose another output_dir")
        with self._disk_errors("log.txt"):
            self.file = _LogFile(folder / "log.txt")
        try:
            assert self.file.stream is not None
            lock(self.file.stream, folder.parent)
        except InputError:
            self.file.close()
            raise
        self.file.setFormatter(FORMAT)
        with self._disk_errors("the scalars"):
            path = folder / SCALARS
            kept = [line for line, update, _ in _read(path) if update <= updates] if path.exists() else []
            with atomic_file(path) as file:
                file.writelines(kept)
            self.lines = open(path, "a")  # noqa: SIM115 - closed by __exit__
            self.events = EventsWriter(str(folder / "events"), f".{os.getpid()}")
            self.events.write_event(Event(step=updates + 1, session_log=SessionLog(status=SessionLog.START)))
            self.events.flush()
        logging.getLogger().addHandler(self.file)

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        """Record ``values`` after ``update`` updates."""
        with self._disk_errors("the scalars"):
            self.lines.write(json.dumps({"update": update, **values}) + "\n")
            self.lines.flush()
            os.fsync(self.lines.fileno())
            for name, value in values.items():
                self.events.write_event(Event(wall_time=time.time(), step=update, summary=scalar(name, value)))
            self.events.flush()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is not None:
            self.file.handle(logging.makeLogRecord({"levelname": "ERROR", "msg": f"ended by {type(error).__name__}: {error}"}))
        logging.getLogger().removeHandler(self.file)
        for stream in (self.lines, self.events, self.file):
            with suppress(OSError):  # reported before
                stream.close()

    @contextmanager
    def _disk_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"{self.folder}: {what} cannot be written ({error.strerror})") from error


def read_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Return what ``RunLog.scalars`` recorded in ``folder``: by name, the value after each update, in their order.

    Raises ``InputError`` if the folder has no ``scalars.jsonl``, or it cannot be read or is damaged.
    """
    path = folder / SCALARS
    if not path.exists():
        raise InputError(f"{folder}: no {SCALARS} in it, expected the log folder of a training; for older ones use TensorBoard")
    scalars: dict[str, dict[int, float]] = {}
    for _, update, values in _read(path):
        for name, value in values.items():
            scalars.setdefault(name, {})[update] = value
    return {name: dict(sorted(values.items())) for name, values in scalars.items()}


def _read(path: Path) -> Iterator[tuple[bytes, int, dict[str, float]]]:
    """Yield each complete line of a ``scalars.jsonl``, its update and its values; a kill may have cut the last line short."""
    lines = read_file(path).splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            return
        try:
            values = {name: float(value) for name, value in json.loads(line).items()}
            yield line, int(values.pop("update")), values
        except (ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
            raise InputError(f'{path}: line {number}: damaged, expected {{"update": number, name: number, …}}') from error
