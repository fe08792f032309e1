"""The exceptions that end a program in one line, and the decorator that prints it."""

from __future__ import annotations

import difflib
import functools
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable


class InputError(ValueError):
    """A file, key or value that a user gave is wrong; the message is one line that names it and says what was expected."""


class RankLost(RuntimeError):
    """Another worker of this run has gone; it or its launcher says why."""


class Interrupted(KeyboardInterrupt):
    """A signal asked this program to end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number


def nearest(word: str, choices: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the choice most like ``word``, or nothing when none is like it."""
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def print_error(message: object) -> None:
    """Print ``message`` as the one line with which a program ends."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def one_line_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate a program's ``main``: its exit code is 2 for an ``InputError``, 3 for a ``RankLost``, 130 for Ctrl-C.

    An ``Interrupted`` ends with 128 plus the signal's number, as shells have it: 143 for SIGTERM; so does output that nobody
    reads any more, 141.
    """

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # names may have what the terminal has not
        try:
            main(*args, **kwargs)
            if sys.stdout is not None:
                sys.stdout.flush()
        except BrokenPipeError:  # whoever read the output, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + signal.SIGPIPE)
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
