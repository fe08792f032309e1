"""What an inspection says of one database, or of two together, apart from how it is drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from data.inspection.faults import Faults, one_line

MOST_BINS = 20
MOST_FIELDS = 20


@dataclass
class Range:
    """Smallest and largest of the numbers seen, their mean, and the share of zeros."""

    count: int = 0
    total: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    zeros: int = 0

    def add(self, values: np.ndarray) -> None:
        """See all of ``values``, which are finite and at least one."""
        self.count += values.size
        self.total += float(values.sum(dtype=np.float64))
        self.low = min(self.low, float(values.min()))
        self.high = max(self.high, float(values.max()))
        self.zeros += values.size - int(np.count_nonzero(values))

    def update(self, other: Range) -> None:
        """See what another process has seen."""
        self.count, self.total, self.zeros = self.count + other.count, self.total + other.total, self.zeros + other.zeros
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def zero_share(self) -> float:
        return self.zeros / self.count


@dataclass
class Report:
    """``facts`` and ``tables`` are rows of label and value; ``histogram`` is a title and how often each number occurs."""

    kind: str
    place: str
    facts: dict[str, str] = field(default_factory=dict)
    histogram: tuple[str, Mapping[int, int]] = ("", {})
    ranges: dict[str, Range] = field(default_factory=dict)
    tables: dict[str, dict[str, str]] = field(default_factory=dict)
    faults: Faults = field(default_factory=Faults)


def bins(counts: Mapping[int, int]) -> list[tuple[int, int, int]]:
    """``counts`` gathered into at most twenty bins of 1, 2, 5, 10 ... numbers: first number, last number, how many."""
    low, high = min(counts), max(counts)
    steps = (digit * 10**power for power in count() for digit in (1, 2, 5))
    step = next(step for step in steps if high // step - low // step < MOST_BINS)
    totals = dict.fromkeys(range(low // step, high // step + 1), 0)
    for number, times in counts.items():
        totals[number // step] += times
    return [(place * step, place * step + step - 1, total) for place, total in totals.items()]


def spread(counts: Mapping[int, int], each: str) -> str:
    """Smallest, largest and mean of numbers that occur ``counts`` times; ``each`` says of what they are the number."""
    low, high = min(counts), max(counts)
    mean = sum(number * times for number, times in counts.items()) / sum(counts.values())
    return f"{low:,} {each}" if low == high else f"{low:,} to {high:,} {each}, {mean:.1f} on average"


def share(part: int, whole: int, things: str) -> str:
    """How many of the ``whole`` number of ``things``."""
    return f"{part:,} of {whole:,} {things} ({part / whole:.2%})"


def size_on_disk(files: Iterable[Path]) -> str:
    """How much those of ``files`` that exist take together."""
    size = float(sum(file.stat().st_size for file in files if file.is_file()))
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def table(fields: Mapping[str, Any]) -> dict[str, str]:
    """Rows of label and value for the fields of a JSON object; the fields of short objects in it have rows of their own."""
    rows = {}
    for key, value in fields.items():
        inner = isinstance(value, dict) and 0 < len(value) <= MOST_FIELDS
        rows |= {f"{key}.{name}": part for name, part in value.items()} if inner else {key: value}
    return {
        one_line(key): one_line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for key, value in rows.items()
    }
