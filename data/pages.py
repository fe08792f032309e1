"""Checks the pages of an LMDB file. LMDB trusts them, so that damaged ones can end or deceive the process that reads them.

The layout is that of LMDB 0.9 on little-endian machines (data version 1), which py-lmdb 1.4 to 3.0 write and read:

- A page has 2^n bytes. It begins with its number (8 bytes), 2 unused bytes, its flags (2), and ``lower`` and ``upper`` (2
  each): the bounds of the free room in its middle. The first of a value's overflow pages has their number (4) there instead.
- Pages 0 and 1 are meta pages, which describe the free and the main database and have the number of the last page in use and
  that of the transaction that wrote them. The one of the later transaction counts, page 0 if both are of the same.
- A database is a tree of branch and leaf pages. The main one has the records. The free one has lists of unused pages, by the
  number (8 bytes) of the transaction that left them; its description begins with the page size.
- The offsets (2 bytes each) of a page's nodes, in the order of their keys, reach up to ``lower``; the nodes lie from ``upper``
  on. A node has 4 bytes, flags (2), the length of its key (2), and the key. On a leaf the 4 bytes are the length of the value,
  which follows; in place of a value on overflow pages the number (8) of their first one does. On a branch the 4 bytes and the
  flags are a page's number: keys there are not less than this node's and less than the next one's. A branch's first key means
  nothing.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from itertools import pairwise
from operator import lt
from pathlib import Path

import numpy as np

from utils.errors import InputError

_HEADER = struct.Struct("<Q2xHHH")
_OVERFLOW_HEADER = struct.Struct("<Q2xHI")
_META = struct.Struct("<II16x" + "IHHQQQQQ" + "4xHHQQQQQ" + "QQ")
_NODE = struct.Struct("<IHH")
_NUMBER = struct.Struct("<Q")

_BRANCH, _LEAF, _OVERFLOW, _META_PAGE, _DIRTY = 1, 2, 4, 8, 16
_KINDS = {_BRANCH: "a branch page", _LEAF: "a leaf page", _OVERFLOW: "an overflow page", _META_PAGE: "a meta page"}
_MAGIC, _VERSION = 0xBEEFC0DE, 1
_NO_ROOT = 2**64 - 1
_MOST_LEVELS, _LONGEST_KEY = 32, 511
_ON_OVERFLOW_PAGES = 1
_INTEGER_KEYS = 8
_OPENED_WITH = 0x4001  # the free database's flags also tell how the file was first opened, which means nothing to a reader


def check_pages(file: Path) -> None:
    """``InputError``, which names the page, unless all that a reader of LMDB file ``file`` can come to is sound.

    Sound is: pages inside the file, of the right kind, and not reached twice; nodes whole and apart; keys in order and between
    those above them; values within the page or pages that are theirs; leaves all as deep, and entries as many, as the meta page
    says. Nested databases and keys with several values, which UNITER's databases never have, are refused.

    Every branch and leaf page is read, and the header of every value on overflow pages. Memory is one byte for each page of the
    file. Which pages are free is left unchecked, as only writers need to know. The file must not change from then on.
    """
    try:
        if not file.is_file():
            raise InputError(f"{file}: no such file, expected an LMDB database")
        with open(file, "rb", buffering=0) as stream:
            _check(stream.fileno())
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{file}: {error}") from error


@dataclass(frozen=True)
class _Tree:
    """One of the two databases, as a meta page describes it."""

    name: str
    depth: int
    entries: int
    root: int


@dataclass(frozen=True)
class _Meta:
    number: int
    page_bytes: int
    last_page: int
    transaction: int
    trees: tuple[_Tree, _Tree]


def _check(descriptor: int) -> None:
    first = _read_meta(descriptor, 0, 0)
    second = _read_meta(descriptor, 1, first.page_bytes)
    if second.page_bytes != first.page_bytes:
        raise ValueError(f"page 1: has a page size of {second.page_bytes:,}, page 0 one of {first.page_bytes:,}")
    meta = second if second.transaction > first.transaction else first
    size, needed = os.fstat(descriptor).st_size, (meta.last_page + 1) * meta.page_bytes
    if meta.last_page < 1 or size < needed:
        raise ValueError(f"page {meta.number}: the file has {size:,} bytes, its last page {meta.last_page} ends at {needed:,}")
    pages = _Pages(descriptor, meta.page_bytes, meta.last_page + 1)
    for tree in meta.trees:
        _check_tree(pages, tree)


def _read_meta(descriptor: int, number: int, start: int) -> _Meta:
    data = os.pread(descriptor, _HEADER.size + _META.size, start)
    if len(data) < _HEADER.size + _META.size:
        raise ValueError(f"page {number}: cut short, expected a meta page")
    _check_kind(number, _HEADER.unpack_from(data)[1], _META_PAGE)
    fields = _META.unpack_from(data, _HEADER.size)
    magic, version, page_bytes = fields[:3]
    free_flags, free_depth, _, _, _, free_entries, free_root = fields[3:10]
    flags, depth, _, _, _, entries, root, last_page, transaction = fields[10:]
    if (magic, version) != (_MAGIC, _VERSION):
        raise ValueError(f"page {number}: has magic {magic:#x} and data version {version}, expected {_MAGIC:#x} and {_VERSION}")
    if page_bytes not in [512 << doublings for doublings in range(7)]:
        raise ValueError(f"page {number}: has a page size of {page_bytes:,}, expected a power of two from 512 to 32,768")
    if flags or free_flags & ~_OPENED_WITH != _INTEGER_KEYS:
        raise ValueError(f"page {number}: has databases with flags {flags:#x} and {free_flags:#x}, expected a plain one")
    trees = _Tree("main", depth, entries, root), _Tree("free", free_depth, free_entries, free_root)
    return _Meta(number, page_bytes, last_page, transaction, trees)


def _check_kind(number: int, flags: int, kind: int) -> None:
    if flags & ~_DIRTY != kind:
        raise ValueError(f"page {number}: has flags {flags:#x}, expected {_KINDS[kind]}")


class _Pages:
    """The pages in use, each of which may be taken once."""

    def __init__(self, descriptor: int, page_bytes: int, count: int) -> None:
        self._descriptor, self._page_bytes, self._count = descriptor, page_bytes, count
        self._taken = np.zeros(count, bool)
        self._taken[:2] = True

    def take(self, number: int, kind: int) -> bytes:
        """Branch or leaf page ``number``."""
        self._claim(number, 1)
        page = self._read(number, self._page_bytes)
        self._check_header(kind, number, *_HEADER.unpack_from(page)[:2])
        return page

    def take_value(self, number: int, length: int) -> None:
        """Check the overflow pages from ``number`` on, which hold a value of ``length`` bytes."""
        needed = -(-(_HEADER.size + length) // self._page_bytes)
        self._claim(number, needed)
        own_number, flags, present = _OVERFLOW_HEADER.unpack(self._read(number, _OVERFLOW_HEADER.size))
        self._check_header(_OVERFLOW, number, own_number, flags)
        if present < needed:
            raise ValueError(f"page {number}: has {present} overflow pages, the {length:,} bytes of its value take {needed}")

    def _claim(self, number: int, count: int) -> None:
        if number + count > self._count:
            raise ValueError(f"page {number}: outside the file, or its {count} pages are; the last in use is {self._count - 1}")
        if self._taken[number : number + count].any():
            raise ValueError(f"page {number}: reached twice, or one of its {count} pages is")
        self._taken[number : number + count] = True

    def _read(self, number: int, count: int) -> bytes:
        data = os.pread(self._descriptor, count, number * self._page_bytes)
        if len(data) < count:
            raise ValueError(f"page {number}: cut short")
        return data

    def _check_header(self, kind: int, number: int, own_number: int, flags: int) -> None:
        if own_number != number:
            raise ValueError(f"page {number}: says that it is page {own_number}")
        _check_kind(number, flags, kind)


def _check_tree(pages: _Pages, tree: _Tree) -> None:
    """Walk a database in the order of its keys."""
    if tree.root == _NO_ROOT:
        if tree.entries or tree.depth:
            raise ValueError(f"{tree.name} database: has no root, but {tree.entries:,} entries on {tree.depth} levels")
        return
    if not 1 <= tree.depth <= _MOST_LEVELS:
        raise ValueError(f"{tree.name} database: has {tree.depth} levels, expected 1 to {_MOST_LEVELS}")
    entries = 0
    # Page, level, and bounds of the keys below: not less than the first, less than the second if there is one.
    waiting: list[tuple[int, int, bytes, bytes | None]] = [(tree.root, 1, b"", None)]
    while waiting:
        number, level, low, high = waiting.pop()
        is_leaf = level == tree.depth
        page = pages.take(number, _LEAF if is_leaf else _BRANCH)
        try:
            keys, links = _read_nodes(page, is_leaf)
            if tree.name == "free":
                keys = _as_numbers(keys, is_leaf)
            if not is_leaf:
                keys[0] = low
            _check_order(keys, low, high)
        except ValueError as error:
            raise ValueError(f"page {number}: {error}") from error
        if is_leaf:
            entries += len(keys)
            for first, length in links:
                pages.take_value(first, length)
        else:
            ends = [*keys[1:], high]
            waiting += [(child, level + 1, low, high) for (child, _), low, high in zip(links, keys, ends, strict=True)][::-1]
    if entries != tree.entries:
        raise ValueError(f"{tree.name} database: has {entries:,} entries, its meta page says {tree.entries:,}")


def _read_nodes(page: bytes, is_leaf: bool) -> tuple[list[bytes], list[tuple[int, int]]]:
    """The keys on a page, and where its nodes lead: a branch's to (page, 0), a leaf's large values to (first page, length)."""
    keys: list[bytes] = []
    links: list[tuple[int, int]] = []
    spans: list[tuple[int, int]] = []
    for offset in _read_offsets(page, fewest=1 if is_leaf else 2):
        number, flags, key_bytes = _NODE.unpack_from(page, offset)
        if key_bytes > _LONGEST_KEY or (key_bytes == 0 and (is_leaf or keys)):
            raise ValueError(f"the node at {offset} has a key of {key_bytes} bytes, expected 1 to {_LONGEST_KEY}")
        if is_leaf and flags not in (0, _ON_OVERFLOW_PAGES):
            raise ValueError(f"the node at {offset} has flags {flags:#x}, expected a plain value")
        key_end = offset + _NODE.size + key_bytes
        end = key_end + ((_NUMBER.size if flags else number) if is_leaf else 0)
        if end > len(page):
            raise ValueError(f"the node at {offset} ends at {end}, outside the page")
        keys.append(page[offset + _NODE.size : key_end])
        spans.append((offset, end))
        if not is_leaf:
            links.append((number | flags << 32, 0))
        elif flags:
            links.append((_NUMBER.unpack_from(page, key_end)[0], number))
    spans.sort()
    if any(end > start for (_, end), (start, _) in pairwise(spans)):
        raise ValueError("its nodes overlap")
    return keys, links


def _read_offsets(page: bytes, fewest: int) -> tuple[int, ...]:
    """Where the nodes of a page are; each has room for the fixed part of a node."""
    _, _, lower, upper = _HEADER.unpack_from(page)
    count = (lower - _HEADER.size) // 2
    if lower % 2 or not fewest <= count or not lower <= upper <= len(page):
        raise ValueError(f"has lower {lower} and upper {upper}, expected room for {fewest} or more nodes in {len(page)} bytes")
    offsets: tuple[int, ...] = struct.unpack_from(f"<{count}H", page, _HEADER.size)
    if min(offsets) < upper or max(offsets) > len(page) - _NODE.size or any(offset % 2 for offset in offsets):
        raise ValueError(f"has a node out of place, expected even offsets from {upper} to {len(page) - _NODE.size}")
    return offsets


def _check_order(keys: list[bytes], low: bytes, high: bytes | None) -> None:
    following = keys[1:] if high is None else [*keys[1:], high]
    if keys[0] < low or not all(map(lt, keys, following)):
        raise ValueError("its keys are not in order, or not between those of the page above")


def _as_numbers(keys: list[bytes], is_leaf: bool) -> list[bytes]:
    """Keys of the free database, whose order is that of little-endian numbers, in the form that has this order as bytes."""
    if any(len(key) != _NUMBER.size for key in keys[not is_leaf :]):
        raise ValueError(f"has keys that are not numbers of {_NUMBER.size} bytes")
    return [key[::-1] for key in keys]
