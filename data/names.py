"""Many strings in little memory."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np


class Names(Sequence[str]):
    """A list of different strings as one piece of bytes, with numbers to find them by place or by name.

    A million ids as Python's strings take a hundred megabytes, and processes made by a fork come to hold copies of them all
    the same, because looking at an object writes its count of references.
    """

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [_encode(name) for name in names]
        self._text = b"".join(encoded)
        self._bounds = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(name) for name in encoded], out=self._bounds[1:])
        checksums = np.array([zlib.crc32(name) for name in encoded], np.uint32)
        self._order = checksums.argsort(kind="stable").astype(np.uint32)
        self._checksums = checksums[self._order]

    @property
    def packed(self) -> bytes:
        """All of them and where each ends, to take a checksum of."""
        return self._text + self._bounds.tobytes()

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = range(len(self))[place]  # negative places, and IndexError for those that there are not
        return self._text[self._bounds[number] : self._bounds[number + 1]].decode("utf-8", "surrogatepass")

    def place(self, name: object) -> int | None:
        """Where ``name`` is, None if it is not among these."""
        if not isinstance(name, str):
            return None
        encoded = _encode(name)
        checksum = np.uint32(zlib.crc32(encoded))
        first = int(np.searchsorted(self._checksums, checksum))
        while first < len(self) and self._checksums[first] == checksum:
            number = int(self._order[first])
            if self._text[self._bounds[number] : self._bounds[number + 1]] == encoded:
                return number
            first += 1
        return None

    def index(self, value: object, start: int = 0, stop: int = sys.maxsize) -> int:
        """``place``; ``ValueError`` where that is None or outside ``start`` and ``stop``."""
        place = self.place(value)
        if place is None or not start <= place < stop:
            raise ValueError(f"{value!r} is not among the names")
        return place

    def __contains__(self, name: object) -> bool:
        return self.place(name) is not None


def _encode(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")  # JSON may hold halves of surrogate pairs
