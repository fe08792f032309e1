"""Imported first by every program, whose other imports take seconds: Ctrl-C then ends it with one line, as it does later."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from utils import errors


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


def one_line_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate ``main`` as ``utils.errors.one_line_errors`` does. From now on Ctrl-C raises ``KeyboardInterrupt``."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return errors.one_line_errors(main)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    with suppress(ValueError):  # imported in another thread
        signal.signal(signal.SIGINT, _end)
