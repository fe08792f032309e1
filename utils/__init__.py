"""Tools of all programs. Importing them replaces the traceback of a package that is not installed by one line."""

import sys
from importlib.util import find_spec

_show_other = sys.excepthook


def _show(kind, error, trace):  # type: ignore[no-untyped-def]
    name = str(getattr(error, "name", "")).partition(".")[0]
    if kind is not ModuleNotFoundError or find_spec(name):
        return _show_other(kind, error, trace)
    how = "run 'make venv' in the repository, then use .venv/bin/python"
    print(f"error: {sys.executable} has no package {name}; {how}", file=sys.stderr)
    sys.exit(2)


sys.excepthook = _show
