"""Read the files of a database without stopping at what is wrong with them."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from data.inspection.faults import Faults
from data.lmdb_store import LmdbReader
from data.pages import check_pages
from utils.errors import InputError
from utils.files import read_json, short_repr
from utils.parallel import in_order

UNREADABLE = "files that cannot be read"

Item = TypeVar("Item")
Summary = TypeVar("Summary")


@dataclass(frozen=True)
class Reading:
    """How records are read: ``sample`` of each LMDB drawn at random, or all of them; in ``nproc`` processes."""

    sample: int | None
    nproc: int

    def chosen(self, names: list[str]) -> list[str]:
        """Those of ``names`` to read, always the same ones, in their order."""
        if self.sample is None or self.sample >= len(names):
            return names
        return [names[place] for place in sorted(random.Random(0).sample(range(len(names)), self.sample))]

    def summaries(
        self, task: Callable[[Sequence[Item]], Summary], items: Sequence[Item], at_once: int, faults: Faults
    ) -> Iterator[Summary]:
        """What ``task`` makes of ``items``, ``at_once`` of them at a time; a killed process is a fault and ends it."""
        pieces = [items[first : first + at_once] for first in range(0, len(items), at_once)]
        with tqdm(total=len(items), unit=" records", disable=None, leave=False) as progress:
            try:
                for piece, summary in zip(pieces, in_order(task, pieces, max(1, min(self.nproc, len(pieces)))), strict=True):
                    yield summary
                    progress.update(len(piece))
            except InputError as error:
                faults.add("records that could not be read to the end", f"after {progress.n:,} of {len(items):,}: {error}")

    def describe(self, names: list[str] | None) -> str:
        """How many records there are, and whether it is a sample that is read."""
        if names is None:
            return "cannot be read"
        chosen = len(self.chosen(names))
        return f"{len(names):,}" if chosen == len(names) else f"{len(names):,}, of which a sample of {chosen:,} was read"


def record_names(folder: Path, faults: Faults) -> list[str] | None:
    """Names of the records of an LMDB folder, None where its file is damaged."""
    try:
        check_pages(folder / "data.mdb")
        with LmdbReader(folder) as store:
            return list(store.keys())
    except InputError as error:
        faults.add(UNREADABLE, str(error))
        return None


def read_object(file: Path, faults: Faults) -> dict[str, Any] | None:
    """A JSON object, None where it cannot be read; a key that it has twice is a fault."""
    try:
        contents = read_json(file)
    except InputError as error:
        faults.add(UNREADABLE, str(error))
        return None
    if not isinstance(contents, dict):
        faults.add(UNREADABLE, f"{file}: expected a JSON object")
        return None

    def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            times = Counter(key for key, _ in pairs)
            faults.add_names(f"keys that {file.name} has more than once", (key for key in fields if times[key] > 1))
        return fields

    json.loads(file.read_bytes(), object_pairs_hook=without_repetition)
    return contents


def read_map(file: Path, meaning: str, fits: Callable[[Any], bool], faults: Faults) -> dict[str, Any] | None:
    """Those entries of a JSON object whose value passes ``fits``, the others being faults; ``meaning`` says what fits."""
    contents = read_object(file, faults)
    if contents is None:
        return None
    for key in [key for key, value in contents.items() if not fits(value)]:
        faults.add(f"entries of {file.name} that are not {meaning}", f"{short_repr(key)} has {short_repr(contents.pop(key))}")
    return contents
