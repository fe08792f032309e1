"""The result of an evaluation: a JSON file that says what it was made from, and that another evaluation does not replace."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from utils.errors import InputError
from utils.files import read_json, save_json, sha256
from utils.provenance import provenance

LOGGER = logging.getLogger(__name__)


def check_origin(file: Path, before: Any, origin: Mapping[str, Any], remedy: str) -> None:
    """Raise ``InputError`` unless ``file`` was made from ``origin``: what results depend on, by name; checksums for contents.

    ``before`` is the origin that the file names, and ``remedy`` what to do if it is another one.
    """
    if not isinstance(before, Mapping):
        raise InputError(f"{file}: does not say what it was made from, so it is not of this version, or damaged; {remedy}")
    if differences := _differences(before, origin):
        raise InputError(f"{file}: belongs to an evaluation with another {', '.join(differences)}; {remedy}")


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of what differs, with the values unless they are checksums."""
    named = []
    for name in dict.fromkeys((*now, *before)):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            named += _differences(old, new)
        elif old != new:
            is_checksum = any(isinstance(value, str) and len(value) == 64 for value in (old, new))
            named.append(name if is_checksum else f"{name} (was {old}, is {new})")
    return named


def saved_results(file: Path, origin: Mapping[str, Any], table: Callable[[dict[str, Any]], str]) -> dict[str, Any] | None:
    """Return what an earlier call with the same ``origin`` saved in ``file``, or None if there is no such file.

    Raises ``InputError`` if it has another origin, is damaged so that ``table`` fails, or misses a file that belongs to it.
    """
    if not os.path.lexists(file):
        return None
    remedy = "choose another output_dir"
    results = read_json(file)
    made: Any = results.get("provenance") if isinstance(results, dict) else None
    check_origin(file, made.get("origin") if isinstance(made, dict) else None, origin, remedy)
    try:
        table(results)
        for name, checksum in made["files"].items():
            if sha256(file.with_name(name)) != checksum:
                raise InputError(f"{file.with_name(name)}: has changed since {file.name} was written")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = error if isinstance(error, InputError) else f"{file}: damaged ({error!r})"
        raise InputError(f"{reason}; remove {file} and what belongs to it to evaluate again, or {remedy}") from error
    LOGGER.info("%s: finished by an earlier call with the same model, data and settings; nothing is computed again", file)
    for name, now in provenance().items():
        if name in ("commit", "torch") and made.get(name) != now:
            LOGGER.warning("%s: made with %s %s, this is %s: a new result might differ", file, name, made.get(name), now)
    return results


def save_results(file: Path, results: dict[str, Any], origin: Mapping[str, Any], *beside: Path) -> None:
    """Write ``results`` last of all, with their ``origin`` and the checksums of the files ``beside`` in their provenance."""
    results["provenance"] |= {"origin": origin, "files": {path.name: sha256(path) for path in beside}}
    save_json(file, results)
