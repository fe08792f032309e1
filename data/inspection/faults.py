"""What is wrong with a database, by kind: how often, and the first few examples."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

EXAMPLES = 10
LONGEST = 300

# What differs between two refusals for the same reason: what is in brackets or quotes, and numbers.
_PARTICULARS = re.compile(r"\(.*\)|\[[^\]]*\]|(['\"]).*?\1|\b\d[\d,.]*\b")


def one_line(text: str) -> str:
    """``text`` as a terminal can show it, not too long."""
    line = " ".join("".join(character if character.isprintable() else " " for character in text[: 2 * LONGEST]).split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."


class Faults:
    """Counts the faults of each kind and keeps the first ten of it, so that it stays small however much is wrong."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def __bool__(self) -> bool:
        return bool(self.counts)

    def add(self, kind: str, example: str) -> None:
        """One more of a ``kind``, which is said in the plural."""
        self.counts[kind] += 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < EXAMPLES:
            examples.append(one_line(example))

    def add_names(self, kind: str, names: Iterable[str]) -> None:
        """One more of a ``kind`` for each of ``names``."""
        for name in names:
            self.add(kind, repr(name))

    def refuse(self, name: str, reason: object) -> None:
        """A record that reading refuses; refusals that differ in particulars alone are one kind."""
        general = _PARTICULARS.sub("...", str(reason))
        self.add(f"records that are refused: {general}", repr(name) if general == str(reason) else f"{name!r}: {reason}")

    def update(self, other: Faults) -> None:
        """Count what another process has found, too."""
        for kind, examples in other.examples.items():
            kept = self.examples.setdefault(kind, [])
            kept += examples[: EXAMPLES - len(kept)]
        self.counts.update(other.counts)
