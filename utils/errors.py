"""The one exception for what a user can cause, and how a program ends on it."""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Callable, Iterable


class InputError(ValueError):
    """A file, key or value that a user gave is wrong; the message is one line that names it and says what was expected."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the choice most like ``word``, or nothing when none is like it."""
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def one_line_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate a program's ``main``: an ``InputError`` ends in one line and exit code 2, Ctrl-C in 130."""

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> None:
        try:
            main(*args, **kwargs)
        except InputError as error:
            message = " ".join(str(error).split())
            print(f"error: {message}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return wrapped
