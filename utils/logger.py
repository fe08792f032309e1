"""Text log on screen and in a file, and scalars for TensorBoard."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

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


class RunLog:
    """The log folder of a run: ``log.txt`` and TensorBoard's event file. Use it as a context manager.

    Args:
        updates: done before; TensorBoard forgets what a killed run recorded after them.
    """

    def __init__(self, folder: Path, updates: int = 0) -> None:
        self.file = logging.FileHandler(folder / "log.txt")
        self.file.setFormatter(FORMAT)
        logging.getLogger().addHandler(self.file)
        self.writer = SummaryWriter(str(folder), purge_step=updates + 1 if updates else None)

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        """Record ``values`` after ``update`` updates."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, update)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is not None:
            self.file.emit(logging.makeLogRecord({"levelname": "ERROR", "msg": f"ended by {type(error).__name__}: {error}"}))
        self.writer.close()
        logging.getLogger().removeHandler(self.file)
        self.file.close()
