"""The exceptions that end a program with one line, and the decorator that prints it."""

from __future__ import annotations

import difflib
import errno
import functools
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any


class InputError(ValueError):
    """A file, key or value given by the user is wrong. The message is one line: what is wrong, where, and what was expected."""


class RankLost(RuntimeError):
    """Another rank of this run has died; its own output or its launcher's says why."""


class Interrupted(KeyboardInterrupt):
    """A signal asked this program to end."""

    def __init__(self, number: int, advice: str = "") -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}{advice}")
        self.number = number


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the choice most like ``word``, or ``""`` if none is similar."""
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def counted(number: int, noun: str) -> str:
    """Return ``"1 text"`` or ``"2,000 texts"``."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('x') else 's'}"


def print_error(message: object) -> None:
    """Print ``message`` on one line of stderr."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


class _Output(io.FileIO):
    """The descriptor of standard output or error. Drop what cannot be written; the first time, ``exits`` ends the program."""

    exits = False

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            exits, self.exits = self.exits, False
            if exits and error.errno == errno.EPIPE:  # the reader of the output, such as head, has ended
                sys.exit(128 + signal.SIGPIPE)
            if exits:
                print_error(f"standard output: cannot be written ({error.strerror}); free space or redirect it elsewhere")
                sys.exit(2)
            return len(data)


def _open_standard_streams() -> None:
    """Open the null device in place of closed streams, whose numbers a result file could take; guard writes to the others."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        stream = getattr(sys, name)
        if stream is None:
            number = os.open(os.devnull, os.O_RDWR)  # the lowest free one, that of the closed stream
            os.set_inheritable(number, True)  # or child processes would find it closed
            setattr(sys, name, open(number, mode))  # noqa: SIM115
        elif mode == "w" and stream is getattr(sys, f"__{name}__"):  # no test reads it
            raw, by_line = _Output(number, "w", closefd=False), stream.line_buffering or stream.write_through
            raw.exits = name == "stdout"
            # Names may contain what the terminal cannot show.
            text = io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, "backslashreplace", line_buffering=by_line)
            setattr(sys, name, text)


def one_line_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate ``main`` of a program to end with one line and an exit code instead of a traceback.

    Exit codes: 2 for ``InputError``, 3 for ``RankLost``, 128 plus the signal's number for ``Interrupted`` (143 for SIGTERM),
    130 for Ctrl-C, 141 if the reader of stdout has ended. An error that cannot be printed is dropped.
    """

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> None:
        _open_standard_streams()
        try:
            try:
                main(*args, **kwargs)
            finally:  # or Python would do it, and exit with 120 if that fails
                sys.stdout.flush()
        except (InputError, RankLost) as error:
            print_error(error)
            sys.exit(2 if isinstance(error, InputError) else 3)
        except Interrupted as interruption:
            print(interruption, file=sys.stderr)
            sys.exit(128 + interruption.number)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return wrapped
