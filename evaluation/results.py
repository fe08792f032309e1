"""What a result was made from, so that no other one replaces it, continues it or is taken for it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from data.image_db import ImageDatabase
from evaluation.options import ModelOptions
from utils.errors import InputError
from utils.files import read_json, sha256
from utils.precision import Precision
from utils.provenance import provenance

LOGGER = logging.getLogger(__name__)


def made_with(options: ModelOptions, precision: Precision, image_db: ImageDatabase, **more: Any) -> dict[str, Any]:
    """Return what results of a model on ``image_db`` depend on, and ``more``, to be saved with them.

    ``more`` has ``checkpoint_sha256``, computed when the checkpoint was read: by now, the file may be another one.
    """
    return {
        "options": asdict(options),
        "device": str(precision.device),
        "precision": precision.name,
        "image_db": image_db.describe(),
        **more,
        **provenance(),
    }


Paths = Mapping[str, tuple[Any, Any]]


def check_origin(file: Path, before: Any, origin: Mapping[str, Any], remedy: str, paths: Paths = MappingProxyType({})) -> None:
    """Raise ``InputError`` unless the origin ``before`` that ``file`` names is ``origin``.

    An origin has all that results depend on, by name; checksums stand for contents, whose former and present ``paths`` the
    message has if they are given.
    """
    if not isinstance(before, Mapping):
        raise InputError(f"{file}: does not say what it was made from, so it is of an older version or damaged; {remedy}")
    if differences := _differences(before, origin, paths):
        raise InputError(f"{file}: belongs to an evaluation with another {', '.join(differences)}; {remedy}")


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], paths: Paths) -> list[str]:
    """The names of what differs, with the values, or the paths of checksums."""
    named = []
    for name in dict.fromkeys((*now, *before)):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            named += _differences(old, new, paths)
        elif old != new:
            is_checksum = any(isinstance(value, str) and len(value) == 64 for value in (old, new))
            shown = paths.get(name) if is_checksum else (old, new)
            named.append(f"{name} (was {shown[0]}, is {shown[1]})" if shown else name)
    return named


def saved_results(
    file: Path, origin: Mapping[str, Any], table: Callable[[dict[str, Any]], str], checkpoint: str
) -> dict[str, Any] | None:
    """Return the results that an earlier call with the same ``origin`` saved in ``file``, or None if there is no such file.

    Raises ``InputError`` if it has another origin or is damaged: ``table`` fails, or a file that belongs to it has changed.
    """
    if not os.path.lexists(file):
        return None
    results: Any = read_json(file)
    made: Any = results.get("provenance") if isinstance(results, dict) else None
    made = made if isinstance(made, dict) else {}
    former = made["options"].get("checkpoint") if isinstance(made.get("options"), dict) else None
    paths = {"checkpoint": (former, checkpoint if checkpoint != former else "the same file with other contents")}
    check_origin(file, made.get("origin"), origin, "choose another output_dir", paths)
    try:
        table(results)
        damaged = [name for name, checksum in made["files"].items() if sha256(file.with_name(name)) != checksum]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        damaged = [f"{file.name} ({error})"]
    if damaged:
        raise InputError(f"{file.parent}: {damaged[0]} is damaged; remove this folder or choose another output_dir")
    LOGGER.info("%s: finished by an earlier call with the same model, data and settings; nothing is computed again", file)
    now = provenance()
    for name in ("commit", "torch"):
        if made.get(name) != now[name]:
            LOGGER.warning("%s: made with %s %s, this is %s: a new result might differ", file, name, made.get(name), now[name])
    if made.get("modified") or now["modified"]:
        LOGGER.warning("%s: the program has or had uncommitted changes: a new result might differ", file)
    return results
