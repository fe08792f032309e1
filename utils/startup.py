"""Imported first by every program: errors and Ctrl-C are one line also while the other imports run, which take seconds."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress


def _end(number: int, frame: object) -> None:
    with suppress(OSError):  # standard error is closed
        os.write(2, b"interrupted\n")
    os._exit(128 + number)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    with suppress(ValueError):  # imported in another thread
        signal.signal(signal.SIGINT, _end)

# ruff: noqa: E402
import functools
from collections.abc import Callable
from importlib.util import find_spec
from types import TracebackType

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


sys.excepthook = _show


def one_line_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate ``main`` as ``utils.errors.one_line_errors`` does. From now on Ctrl-C raises ``KeyboardInterrupt``.

    A program ignores Ctrl-C once its ``main`` has ended: the same one may arrive twice, from the terminal and the launcher.
    """

    @functools.wraps(main)
    def uninterrupted(*args: object, **kwargs: object) -> None:
        try:
            main(*args, **kwargs)
        finally:
            if main.__module__ == "__main__":  # not called by a test
                signal.signal(signal.SIGINT, signal.SIG_IGN)

    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return errors.one_line_errors(uninterrupted)
