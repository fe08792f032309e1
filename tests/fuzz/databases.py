"""LMDB files of every shape that there is, and where their numbers are."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import lmdb

PAGE = 4096
META = 16  # where a meta page's fields begin


def _empty(environment: lmdb.Environment) -> None:
    environment.begin(write=True).commit()


def _one_record(environment: lmdb.Environment) -> None:
    _put(environment, {b"a": b"1"})


def _two_levels(environment: lmdb.Environment) -> None:
    _put(environment, {b"key %d" % number: b"x" * (number % 60) for number in range(300)})


def _deep(environment: lmdb.Environment) -> None:
    """The longest keys make three levels of few pages."""
    _put(environment, {(b"%d" % (number * 7919)).rjust(511, b"k"): b"x" * (number % 9) for number in range(70)})


def _large_values(environment: lmdb.Environment) -> None:
    _put(environment, {b"image %d" % number: bytes([number]) * (number * 997) for number in range(14)})


def _rewritten(environment: lmdb.Environment) -> None:
    """Records replaced by shorter, longer and larger ones, and removed, which leaves free pages."""
    _put(environment, {b"%d" % number: b"x" * 500 for number in range(120)})
    with environment.begin(write=True) as transaction:
        for number in range(0, 120, 3):
            transaction.delete(b"%d" % number)
        transaction.put(b"1", b"y" * 9000)
        transaction.put(b"1", b"z" * 5000)  # in the pages of the value before
    _put(environment, {b"%d" % number: b"x" * number for number in range(60, 90)})
    with environment.begin(write=True) as transaction:
        transaction.delete(b"1")


SHAPES: dict[str, Callable[[lmdb.Environment], None]] = {
    "empty": _empty,
    "one record": _one_record,
    "two levels": _two_levels,
    "deep": _deep,
    "large values": _large_values,
    "rewritten": _rewritten,
}


def _put(environment: lmdb.Environment, records: dict[bytes, bytes]) -> None:
    with environment.begin(write=True) as transaction:
        for key, value in records.items():
            transaction.put(key, value)


def make(folder: Path, fill: Callable[[lmdb.Environment], None]) -> Path:
    """Make the database ``folder`` and return its file, cut to the pages in use as LmdbWriter does."""
    with lmdb.open(str(folder), map_size=64 << 20, lock=False) as environment:
        fill(environment)
        pages = environment.info()["last_pgno"] + 1
    file = folder / "data.mdb"
    with open(file, "r+b") as stream:
        stream.truncate(pages * PAGE)
    return file


def fields(data: bytes) -> list[tuple[int, int]]:
    """Place and width of the numbers in a file of LMDB: those of its meta pages, page headers, offsets and nodes."""
    numbers = []
    for meta in (0, PAGE):
        start = meta + META
        trees = [(tree + place, width) for tree in (24, 72) for place, width in _fields(0, "IHHQQQQQ")]
        numbers += [(start + place, width) for place, width in [(0, 4), (4, 4), (8, 8), (16, 8), *trees, (120, 8), (128, 8)]]
    for page in range(0, len(data), PAGE):
        numbers += _fields(page, "QHHHH")
        if page > PAGE and data[page + 10] in (1, 2):  # a branch or a leaf
            (lower,) = struct.unpack_from("<H", data, page + 12)
            for place in range(page + 16, page + lower, 2):
                node = page + struct.unpack_from("<H", data, place)[0]
                numbers += [(place, 2), *_fields(node, "HHHH")]
                key_bytes = struct.unpack_from("<H", data, node + 6)[0]
                numbers.append((node + 8 + key_bytes, 8))
    return numbers


def _fields(start: int, codes: str) -> Iterator[tuple[int, int]]:
    for code in codes:
        yield start, struct.calcsize(code)
        start += struct.calcsize(code)
