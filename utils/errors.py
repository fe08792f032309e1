"""The exceptions that end a program with one line, and the decorator that prints it."""

from __future__ import annotations

import difflib
import functools
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable


class InputError(ValueError):
    """A file, key or value given by the user is wrong. The message is one line: what is wrong, where, and what was expected."""


class RankLost(RuntimeError):
    """Another rank of this run has died; its own output or its launcher's says why."""


class Interrupted(KeyboardInterrupt):
    """A signal asked this program to end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
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


def one_line_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate ``main`` of a program to end with one line and an exit code instead of a traceback.

    Exit codes: 2 for ``InputError``, 3 for ``RankLost``, 128 plus the signal's number for ``Interrupted`` (143 for SIGTERM),
    130 for Ctrl-C, 141 if nobody reads the output any more.
    """

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # names may contain what the terminal cannot show
        try:
            main(*args, **kwargs)
            if sys.stdout is not None:
                sys.stdout.flush()
        except BrokenPipeError:  # the reader of the output, such as head, has closed it
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
