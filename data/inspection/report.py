"""What an inspection finds in one database, or in two together, and what is wrong with it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.errors import counted

MAX_EXAMPLES = 10
_MAX_LINE = 300
_MAX_BINS = _MAX_FIELDS = 20

# The part of a message that differs between two faults of one kind: brackets, quotes and numbers.
_PARTICULARS = re.compile(r"\(.*\)|\[[^\]]*\]|(['\"]).*?\1|\b\d[\d,.]*\b")


def one_line(text: str) -> str:
    """Shorten ``text`` to one line of printable characters."""
    line = " ".join("".join(character if character.isprintable() else " " for character in text[: 2 * _MAX_LINE]).split())
    return line if len(line) <= _MAX_LINE else f"{line[:_MAX_LINE]} ..."


class Faults:
    """Counts the faults of each kind and keeps the first ten examples, so that it stays small however much is wrong."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def __bool__(self) -> bool:
        return bool(self.counts)

    def add(self, kind: str, example: str) -> None:
        """Count a fault; ``kind`` is a plural."""
        self.counts[kind] += 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(one_line(example))

    def add_names(self, kind: str, names: Iterable[str]) -> None:
        """Count a fault for each of ``names``."""
        for name in names:
            self.add(kind, repr(name))

    def refuse(self, name: str, reason: object) -> None:
        """Count a record that cannot be read; reasons that differ only in numbers and names are one kind."""
        general = _PARTICULARS.sub("...", str(reason))
        self.add(f"records that are refused: {general}", repr(name) if general == str(reason) else f"{name!r}: {reason}")

    def update(self, other: Faults) -> None:
        """Add the faults that another process has found."""
        for kind, examples in other.examples.items():
            kept = self.examples.setdefault(kind, [])
            kept += examples[: MAX_EXAMPLES - len(kept)]
        self.counts.update(other.counts)


class Range(NamedTuple):
    """Number, minimum, maximum and sum of all numbers seen, and how many of them are 0."""

    number: int
    low: float
    high: float
    total: float
    zeros: int

    @classmethod
    def of(cls, values: np.ndarray) -> Range:
        """That of ``values``, which are finite and not empty."""
        low, high, total = float(values.min()), float(values.max()), float(values.sum(dtype=np.float64))
        return cls(values.size, low, high, total, int(np.count_nonzero(values == 0)))

    @property
    def mean(self) -> float:
        return self.total / self.number


@dataclass
class Summary:
    """What some records hold: how often each thing occurs, ranges of values, a first example of each thing, faults."""

    counts: Counter[Any] = field(default_factory=Counter)
    ranges: dict[str, Range] = field(default_factory=dict)
    examples: dict[Any, Any] = field(default_factory=dict)
    faults: Faults = field(default_factory=Faults)

    def add_range(self, name: str, new: Range) -> None:
        """Extend a range by more numbers."""
        old = self.ranges.get(name, new._replace(number=0, total=0, zeros=0))
        low, high = min(old.low, new.low), max(old.high, new.high)
        self.ranges[name] = Range(old.number + new.number, low, high, old.total + new.total, old.zeros + new.zeros)

    def update(self, other: Summary) -> None:
        """Add what later records hold."""
        self.counts.update(other.counts)
        for name, values in other.ranges.items():
            self.add_range(name, values)
        self.examples = other.examples | self.examples
        self.faults.update(other.faults)

    def counts_of(self, thing: str) -> Counter[Any]:
        """The counts whose keys are pairs of ``thing`` and a value, by value."""
        return Counter({key[1]: number for key, number in self.counts.items() if key[0] == thing})


@dataclass
class Report:
    """``facts`` and ``tables`` have rows of label and value; ``histogram`` is a title and how often each number occurs."""

    kind: str
    place: str
    facts: dict[str, str] = field(default_factory=dict)
    histogram: tuple[str, Mapping[int, int]] = ("", {})
    ranges: dict[str, Range] = field(default_factory=dict)
    tables: dict[str, dict[str, str]] = field(default_factory=dict)
    faults: Faults = field(default_factory=Faults)


def bins(counts: Mapping[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Group ``counts`` into at most twenty bins 1, 2, 5, 10 ... numbers wide: the edges (bins + 1,) and the totals (bins,)."""
    low, high = min(counts), max(counts)
    steps = (digit * 10**power for power in count() for digit in (1, 2, 5))
    step = next(step for step in steps if high // step - low // step < _MAX_BINS)
    edges = np.arange(low // step, high // step + 2) * step
    totals, _ = np.histogram(list(counts), edges, weights=list(counts.values()))
    return edges, totals


def spread(counts: Mapping[int, int], each: str) -> str:
    """Minimum, maximum and mean of numbers that occur ``counts`` times; ``each`` is their unit."""
    low, high = min(counts), max(counts)
    mean = sum(number * times for number, times in counts.items()) / sum(counts.values())
    return f"{low:,} {each}" if low == high else f"{low:,} to {high:,} {each}, {mean:.1f} on average"


def share(part: int, whole: int, thing: str) -> str:
    """``part`` of ``whole`` things, with the percentage."""
    return f"{part:,} of {counted(whole, thing)} ({part / whole:.2%})"


def size_on_disk(files: Iterable[Path]) -> str:
    """The total size of those ``files`` that exist."""
    return f"{sum(file.stat().st_size for file in files if file.is_file()) / 1e6:,.1f} MB"


def table(fields: Mapping[str, Any]) -> dict[str, str]:
    """Rows of label and value for a JSON object; the fields of small objects in it have their own rows."""
    rows: dict[str, Any] = {}
    for key, value in fields.items():
        is_small = isinstance(value, dict) and 0 < len(value) <= _MAX_FIELDS
        rows |= {f"{key}.{name}": part for name, part in value.items()} if is_small else {key: value}
    return {
        one_line(key): one_line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for key, value in rows.items()
    }
