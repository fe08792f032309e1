"""Tools of all programs. Importing any of them replaces the traceback of a package that is not installed by one line."""

import importlib.util
import sys

_show_other = sys.excepthook


def _show(kind, error, trace):  # type: ignore[no-untyped-def]
    name = (getattr(error, "name", None) or "").partition(".")[0]
    if kind is not ModuleNotFoundError or importlib.util.find_spec(name):
        _show_other(kind, error, trace)
        return
    how = "run 'make venv' in the repository, then use .venv/bin/python"
    print(f"error: {sys.executable} has no package {name}; {how}", file=sys.stderr)
    sys.exit(2)


sys.excepthook = _show
