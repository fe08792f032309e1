"""What the programs say on the screen."""

from __future__ import annotations

import logging
import sys
from typing import Any

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
