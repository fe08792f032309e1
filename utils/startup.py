"""Imported first by every program: errors and Ctrl-C are one line also while the other imports run, which take seconds."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from types import FrameType, TracebackType

from utils import errors

_show_other = sys.excepthook


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    name = str(getattr(error, "name", "")).partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or find_spec(name):
        _show_other(kind, error, trace)
        return
    how = "run 'make venv' in the repository, then use .venv/bin/python"
    errors.print_error(f"{sys.executable} has no package {name}; {how}")
    sys.exit(2)


def _end(number: int, frame: FrameType | None) -> None:
    with suppress(OSError):  # standard error is closed
        os.write(2, b"interrupted\n")
    os._exit(128 + number)


def one_line_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate ``main`` as ``utils.errors.one_line_errors`` does. From now on Ctrl-C raises ``KeyboardInterrupt``."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return errors.one_line_errors(main)


sys.excepthook = _show
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    with suppress(ValueError):  # imported in another thread
        signal.signal(signal.SIGINT, _end)
