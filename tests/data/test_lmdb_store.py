"""The LMDB store: readers survive forks and damage, and what is written appears complete or not at all."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import pytest

from data.lmdb_store import LmdbReader, LmdbWriter
from utils.errors import InputError

RECORDS = {"__keys__": b"4", "a": b"1", "__not_special": b"2", "_": b"3", "z": b"4", "__version__": b"5"}
NAMES = ["_", "__not_special", "a", "z"]


def write(path: Path, records: dict[str, bytes]) -> None:
    with LmdbWriter(path) as writer:
        for key, value in records.items():
            writer.put(key, value)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    write(tmp_path / "made.db", RECORDS)
    return tmp_path / "made.db"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "made.db.data.mdb: no such file, expected an LMDB database"),
        (lambda file: os.truncate(file, 0), "data.mdb: empty file"),
        (lambda file: os.truncate(file, 100), "data.mdb: cannot be read as LMDB"),
        (lambda file: os.truncate(file, file.stat().st_size - 4096), "data.mdb: truncated"),
        (lambda file: file.write_bytes(b"not a database" * 1000), "data.mdb: cannot be read as LMDB"),
        (lambda file: file.write_bytes(file.read_bytes()[:8192].ljust(file.stat().st_size, b"\0")), "data.mdb: cannot be read"),
    ],
)
def test_damage_is_an_error_before_it_kills(database: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(database / "data.mdb")
    for read in (lambda reader: reader.get("a"), len, lambda reader: reader.absent(["a"])):
        with pytest.raises(InputError, match=message), LmdbReader(database) as reader:
            read(reader)


def test_names_skip_special_records(database: Path) -> None:
    with LmdbReader(database) as reader:
        assert reader.keys() == NAMES
        assert bytes(reader.get("__keys__")) == b"4"
        assert reader.absent(["a", "k", "", "k" * 5000, "\ud800", "z"]) == ["k", "", "k" * 5000, "\ud800"]
        with pytest.raises(InputError, match=r"made\.db: has no record 'k'"):
            reader.get("k")


def test_readers_of_one_path_share_one_environment(database: Path, tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to(database)
    first, second = LmdbReader(database), LmdbReader(tmp_path / "link.db")
    assert first.keys() == second.keys() == NAMES
    first.close()
    first.close()
    assert "a" in second
    second.close()
    lmdb.open(str(database), readonly=True, lock=False).close()  # LMDB would refuse if it were still open
    assert "a" in first


def read_in_child(reader: LmdbReader, results: Any) -> None:
    other = LmdbReader(reader.path)
    values = bytes(reader.get("a")), bytes(other.get("z"))
    reader.close()
    results.put((*values, len(other)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_readers_cross_process_boundaries(database: Path, method: str) -> None:
    reader = LmdbReader(database)
    assert bytes(reader.get("a")) == b"1"
    context = multiprocessing.get_context(method)
    results = context.Queue()
    child = context.Process(target=read_in_child, args=(reader, results))
    child.start()
    assert results.get(timeout=60) == (b"1", b"4", 4)
    child.join(60)
    assert child.exitcode == 0
    assert bytes(reader.get("a")) == b"1"


def test_the_fingerprint_survives_a_move_and_not_a_write(database: Path, tmp_path: Path) -> None:
    before, moved = LmdbReader(database).fingerprint(), database.rename(tmp_path / "moved.db")
    assert LmdbReader(moved).fingerprint() == before
    with lmdb.open(str(moved), lock=False) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"a", b"2")
    assert LmdbReader(moved).fingerprint() != before


def test_writer_grows_its_map_and_keeps_every_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.lmdb_store._FIRST_MAP_BYTES", 64 << 10)
    monkeypatch.setattr("data.lmdb_store._FLUSH_BYTES", 100 << 10)
    values = {f"key {number}": os.urandom(number * 37 % 20000) for number in range(300)}
    write(tmp_path / "db", values)
    with LmdbReader(tmp_path / "db") as reader:
        assert {key: bytes(reader.get(key)) for key in list(reader.keys())} == values
