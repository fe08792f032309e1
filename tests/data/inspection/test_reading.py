"""Damaged LMDB pages end a child process, not the inspection, and the record at which it ended is named."""

from __future__ import annotations

import os
import re
import signal
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.boxes import BoxRule
from data.image_db import ImageDatabaseWriter
from data.inspection import reading
from data.inspection.reading import UNREADABLE, Reading, read_names
from data.inspection.report import Faults, Summary, bins
from data.lmdb_store import LmdbReader, LmdbWriter
from tests.data.inspection.databases import FOLDER, RULE, inspect, regions, write_pair

PAGE, ENTRIES = 4096, 16 + 104  # where a meta page says how many records there are


def change_pages(file: Path, change: Callable[[bytearray], None]) -> None:
    """Change the bytes of every page that is neither a meta page nor the rest of a long value."""
    data = bytearray(file.read_bytes())
    for start in range(2 * PAGE, len(data), PAGE):
        page = data[start : start + PAGE]
        if page[10] in (1, 2):  # a branch or a leaf
            change(page)
            data[start : start + PAGE] = page
    file.write_bytes(data)


def wrong_kind(page: bytearray) -> None:
    page[10:12] = b"\xff\xff"


def swap_first_two(page: bytearray) -> None:
    page[16:18], page[18:20] = page[18:20], page[16:18]


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (wrong_kind, r"data\.mdb: (at the list of records, the process that read it ended with SIG|cannot be read)"),
        (swap_first_two, r"data\.mdb: its pages are damaged, names are not in order"),
    ],
)
def test_pages_that_cannot_be_listed(tmp_path: Path, damage: Callable[[bytearray], None], line: str) -> None:
    pair = write_pair(tmp_path)
    change_pages(pair / "texts.db/data.mdb", damage)
    seen = inspect(pair / "texts.db", pair / "images")
    assert seen.faults == {UNREADABLE: 1}
    assert re.search(line, seen.list)
    assert re.search("texts +cannot be read\n", seen.output)
    assert re.search(r"texts +12 of 12 texts \(100.00%\) with an image", seen.output)


def test_a_wrong_number_of_records(tmp_path: Path) -> None:
    file = write_pair(tmp_path) / "texts.db/data.mdb"
    data = bytearray(file.read_bytes())
    for meta in (0, PAGE):
        if data[meta + ENTRIES] == 12:
            data[meta + ENTRIES] = 13
    file.write_bytes(data)
    faults = Faults()
    assert read_names(file.parent, faults) == (None, None)
    (line,) = faults.examples[UNREADABLE]
    assert line.startswith(f"{file}: its pages are damaged, they list 12 of 13 records")


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_record_that_kills_its_reader_is_named(tmp_path: Path, nproc: int) -> None:
    with ImageDatabaseWriter(tmp_path, BoxRule(**RULE)) as writer:
        for number in range(70):
            writer.put(f"{number:03d}.npz", **{**regions(4, number), "features": np.ones((4, 1024))})
    file = tmp_path / FOLDER / "data.mdb"
    # A value that claims two gigabytes: who reads it leaves the file.
    with LmdbReader(tmp_path / FOLDER) as store:
        node = struct.pack("<IHH", len(store.get("040.npz")), 1, 7) + b"040.npz"
    data = file.read_bytes()
    assert node in data
    file.write_bytes(data.replace(node, struct.pack("<I", 2**31 - 1) + node[4:]))
    seen = inspect(tmp_path, "--nproc", nproc)
    assert seen.faults == {UNREADABLE: 1}
    reason = "the process that read it ended with SIGBUS; probably its pages are damaged; 38 records were not checked"
    assert f"{file}: at record '040.npz', {reason}\n" in seen.list
    assert re.search(r"images +70\n", seen.output)
    assert re.search(r"boxes +4 per image\n", seen.output)


@pytest.mark.parametrize(
    ("misbehave", "fault"),
    [
        (lambda: time.sleep(60), "made no progress in 0.5 seconds; probably its pages are damaged"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "ended with SIGKILL; probably memory is short, try a smaller --nproc"),
        (lambda: 1 // 0, "failed with exit code 1; see its traceback"),
    ],
)
def test_a_reader_that_does_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, misbehave: Callable[[], Any], fault: str
) -> None:
    pair = write_pair(tmp_path)
    monkeypatch.setattr(reading, "PATIENCE", 0.5)

    def check(store: LmdbReader, records: Any) -> Summary:
        summary = Summary()
        for (name,) in records:
            summary.counts["read"] += len(store.get(name)) > 0
            if name == "3":
                misbehave()
        return summary

    started = time.monotonic()
    seen = Reading(None, 1).check(pair / "texts.db", check, [(str(number),) for number in range(12)], 2)
    assert time.monotonic() - started < 20
    assert seen.counts["read"] == 2
    (line,) = seen.faults.examples[UNREADABLE]
    reason = f"at record '3', the process that read it {fault}; 10 records were not checked"
    assert line == f"{pair / 'texts.db/data.mdb'}: {reason}"


def test_names_of_many_records(tmp_path: Path) -> None:
    names = [f"{number:0{8 + number % 40}d}" for number in range(25_000)]
    with LmdbWriter(tmp_path / "db") as writer:
        for name in names:
            writer.put(name, b"x")
        writer.put("__keys__", b"[]")
    faults = Faults()
    assert read_names(tmp_path / "db", faults) == (sorted(names), b"[]")
    assert not faults


@pytest.mark.parametrize(
    ("counts", "edges", "totals"),
    [
        ({7: 2}, [7, 8], [2]),
        ({3: 1, 5: 4}, [3, 4, 5, 6], [1, 0, 4]),
        (dict.fromkeys(range(10, 101), 2), range(10, 106, 5), [10] * 18 + [2]),
    ],
)
def test_bins(counts: dict[int, int], edges: Sequence[int], totals: list[int]) -> None:
    assert [array.tolist() for array in bins(counts)] == [list(edges), totals]
