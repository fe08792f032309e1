"""Text databases and the LMDB store under them: what is written is read, and everything wrong is one line that names it."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import lz4.frame
import msgpack
import numpy as np
import pytest

from data.lmdb_store import LmdbReader, LmdbWriter
from data.text_db import TextDatabase, TextDatabaseWriter
from tests.conftest import GOLDEN
from utils.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
META = {"CLS": 101, "SEP": 102, "MASK": 103, "UNK": 100, "v_range": [106, 28996], "toker": "bert-base-cased"}
SIDECARS = ("meta.json", "id2len.json", "txt2img.json", "img2txts.json")


def make_database(path: Path) -> Path:
    with TextDatabaseWriter(path, META) as writer:
        writer.put("10", [7, 8, 9], "b.npz", raw="x y z", toked_caption=["x", "y", "z"])
        writer.put("9", [106], "a.npz", raw="é")
        writer.put("2", np.array([5, 28995]), "b.npz")
    return path


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return make_database(tmp_path / "itm_made_test.db")


def rewrite(path: Path, key: str, value: bytes) -> None:
    """Put a record of any kind into a finished database."""
    with lmdb.open(str(path), map_size=1 << 24, lock=False) as environment, environment.begin(write=True) as transaction:
        transaction.put(key.encode(), value)


def packed(fields: Any, **options: Any) -> bytes:
    return lz4.frame.compress(msgpack.packb(fields, **options))


def test_golden_database_reads_whole() -> None:
    path = GOLDEN.text_db
    database = TextDatabase(path)
    assert list(database.ids) == list(json.loads((path / "id2len.json").read_text()))
    assert len(database) == len(database.ids) > 0
    for place, text_id in enumerate(database.ids):
        text = database[text_id]
        assert text.input_ids.dtype == np.int64
        assert text.input_ids.shape == (database.lengths[place],)
        assert text.id == text_id
        assert text.image == database.images[database.image_of[place]]
    database.close()


def test_what_is_written_is_read(database: Path) -> None:
    texts = TextDatabase(database)
    assert list(texts.ids) == ["10", "9", "2"]
    assert texts.lengths.tolist() == [3, 1, 2]
    assert list(texts.images) == ["b.npz", "a.npz"]
    assert texts.image_of.tolist() == [0, 1, 0]
    assert (texts.cls_id, texts.sep_id, texts.vocab_size, texts.path) == (101, 102, 28996, database)
    assert texts["10"].input_ids.tolist() == [7, 8, 9]
    assert texts["10"].extra == {"raw": "x y z", "toked_caption": ["x", "y", "z"]}
    assert texts["9"].extra["raw"] == "é"
    assert texts["2"].image == "b.npz"
    assert texts["2"].extra == {}
    assert sorted(file.name for file in database.iterdir()) == sorted([*SIDECARS, "data.mdb"])
    texts.close()


def test_records_of_old_writers_and_bytes_keys(database: Path) -> None:
    fields = {"input_ids": [1, 2], "img_fname": "a.npz", "raw": "é", "box": (1, 2)}
    texts = TextDatabase(database)
    rewrite(database, "9", packed(fields, use_bin_type=False))
    assert texts["9"].input_ids.tolist() == [1, 2]
    assert texts["9"].extra == {"raw": "é", "box": [1, 2]}
    texts.close()
    rewrite(database, "9", packed({key.encode(): value for key, value in fields.items()} | {b"img_fname": b"a.npz", 3: 4}))
    assert texts["9"].extra == {"raw": "é", "box": [1, 2], 3: 4}
    texts.close()


@pytest.mark.parametrize("name", SIDECARS)
def test_missing_and_malformed_sidecars_are_named(database: Path, name: str) -> None:
    (database / name).write_text("{")
    with pytest.raises(InputError, match=name):
        TextDatabase(database)
    (database / name).write_text("[1]")
    with pytest.raises(InputError, match=f"{name}: expected a JSON object"):
        TextDatabase(database)
    (database / name).unlink()
    with pytest.raises(InputError, match=f"{name}: no such file"):
        TextDatabase(database)


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("meta.json", {"v_range": [1]}, "v_range is"),
        ("meta.json", {"CLS": "101"}, "CLS is '101'"),
        ("meta.json", {"SEP": 28996}, "SEP is 28996"),
        ("id2len.json", {"77": 3}, "txt2img.json: has no text '77'"),
        ("id2len.json", {"9": "1"}, "'9' has '1'"),
        ("txt2img.json", {"9": 4}, "'9' has 4"),
        ("txt2img.json", {"9": "b.npz"}, "img2txts.json: lists text '9' for 'a.npz'"),
        ("img2txts.json", {"a.npz": []}, "does not list text '9'"),
        ("img2txts.json", {"c.npz": ["11"]}, "lists text '11'"),
        ("img2txts.json", {"a.npz": "9"}, "'a.npz' has '9'"),
    ],
)
def test_contradictions_between_sidecars(database: Path, name: str, edit: dict[str, Any], message: str) -> None:
    file = database / name
    file.write_text(json.dumps(json.loads(file.read_text()) | edit))
    with pytest.raises(InputError, match=message):
        TextDatabase(database)


def test_empty_split_and_missing_folder(database: Path) -> None:
    (database / "id2len.json").write_text("{}")
    with pytest.raises(InputError, match="empty split"):
        TextDatabase(database)
    with pytest.raises(InputError, match=r"nowhere.db: no such text database"):
        TextDatabase(database.with_name("nowhere.db"))


GOOD = {"input_ids": [1, 2], "img_fname": "a.npz"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"", "cut short"),
        (b"junk junk", "not an lz4 frame"),
        (packed(GOOD)[:-3], "cut short"),
        (packed(GOOD) + b"x", "1 bytes after the end"),
        (lz4.frame.compress(bytes(17 << 20)), "over 16,777,216 bytes"),
        (lz4.frame.compress(b"\xc1"), "not a msgpack record"),
        (lz4.frame.compress(msgpack.packb(GOOD)[:-2]), "not a msgpack record"),
        (lz4.frame.compress(b"\x91" * 5000), "not a msgpack record"),
        (packed([1]), "expected a map"),
        (packed(GOOD | {"input_ids": []}), "input_ids is missing, empty"),
        (packed({"img_fname": "a.npz"}), "input_ids is missing"),
        (packed(GOOD | {"input_ids": "12"}), "not a list of integers"),
        (packed(GOOD | {"input_ids": [1.0]}), "not a list of integers"),
        (packed(GOOD | {"input_ids": [1, True]}), "not a list of integers"),
        (packed(GOOD | {"input_ids": [[1]]}), "not a list of integers"),
        (packed(GOOD | {"input_ids": [-1, 2]}), "word piece -1 is outside"),
        (packed(GOOD | {"input_ids": [1, 28996]}), "word piece 28996 is outside the vocabulary of 28996"),
        (packed(GOOD | {"input_ids": [1 << 63]}), "is outside the vocabulary"),
        (packed({"input_ids": [1]}), "img_fname is None, txt2img.json says 'a.npz'"),
        (packed(GOOD | {"img_fname": "b.npz"}), "img_fname is 'b.npz'"),
    ],
)
def test_bad_records_are_named(database: Path, value: bytes, message: str) -> None:
    rewrite(database, "9", value)
    with TextDatabase(database)._store, pytest.raises(InputError, match=message) as caught:
        TextDatabase(database)["9"]
    assert f"{database}: text '9'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_text_is_named(database: Path) -> None:
    with pytest.raises(InputError, match=r"itm_made_test.db: has no record '123'"):
        TextDatabase(database)["123"]


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 4096)


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (Path.unlink, "no data.mdb"),
    (lambda file: os.truncate(file, 0), "data.mdb: empty file"),
    (lambda file: os.truncate(file, 100), "data.mdb: cannot be read as LMDB"),
    (lambda file: os.truncate(file, 4096), "data.mdb: cannot be read as LMDB"),
    (lambda file: os.truncate(file, 8192), "data.mdb: truncated"),
    (truncate, "data.mdb: truncated"),
    (lambda file: file.write_bytes(b"not a database" * 1000) and None, "data.mdb: cannot be read as LMDB"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_lmdb_is_refused_before_it_kills(database: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(database / "data.mdb")
    with pytest.raises(InputError, match=message):
        TextDatabase(database)["9"]
    with pytest.raises(InputError, match=message):
        LmdbReader(database).close() or len(LmdbReader(database))


def test_zeroed_pages_are_an_error(database: Path) -> None:
    file = database / "data.mdb"
    size = file.stat().st_size
    os.truncate(file, 8192)
    os.truncate(file, size)
    with pytest.raises(InputError, match=r"data\.mdb: cannot be read"):
        TextDatabase(database)["9"]


def test_readers_of_one_path_share_one_environment(database: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.db"
    link.symlink_to(database)
    first, second = LmdbReader(database), LmdbReader(link)
    assert sorted(first.keys()) == sorted(second.keys()) == ["10", "2", "9"]
    first.close()
    first.close()
    assert "9" in second
    second.close()
    lmdb.open(str(database), readonly=True, lock=False).close()
    with first as reader:
        assert len(reader) == 3


def _read_in_child(reader: LmdbReader, results: Any) -> None:
    other = LmdbReader(reader.path)
    results.put((bytes(reader.get("9")), bytes(other.get("10")), os.getpid()))
    reader.close()
    results.put(len(other))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_readers_cross_process_boundaries(database: Path, method: str) -> None:
    reader = LmdbReader(database)
    expected = bytes(reader.get("9")), bytes(reader.get("10"))
    context = multiprocessing.get_context(method)
    results = context.Queue()
    child = context.Process(target=_read_in_child, args=(reader, results))
    child.start()
    *values, pid = results.get(timeout=60)
    assert tuple(values) == expected
    assert pid != os.getpid()
    assert results.get(timeout=60) == 3
    child.join(60)
    assert child.exitcode == 0
    assert bytes(reader.get("9")) == expected[0]
    copy = pickle.loads(pickle.dumps(reader))
    assert bytes(copy.get("9")) == expected[0]
    copy.close()
    reader.close()


def test_keys_and_length_skip_special_records(tmp_path: Path) -> None:
    with LmdbWriter(tmp_path / "db") as writer:
        for key in ("__keys__", "a", "__not_special", "_", "z", "__version__"):
            writer.put(key, b"1")
    with LmdbReader(tmp_path / "db") as reader:
        assert set(reader.keys()) == {"a", "__not_special", "_", "z"}
        assert len(reader) == 4
        assert "__keys__" in reader
        assert "k" not in reader
        assert "" not in reader
        assert "k" * 5000 not in reader


def test_writer_grows_its_map_and_keeps_every_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.lmdb_store._FIRST_MAP_BYTES", 64 << 10)
    monkeypatch.setattr("data.lmdb_store._FLUSH_BYTES", 100 << 10)
    values = {f"key {number}": os.urandom(number * 37 % 20000) for number in range(300)}
    with LmdbWriter(tmp_path / "db") as writer:
        for key, value in values.items():
            writer.put(key, value)
    with LmdbReader(tmp_path / "db") as reader:
        assert {key: bytes(reader.get(key)) for key in list(reader.keys())} == values


def put_twice(writer: Any, *value: Any) -> None:
    writer.put("1", *value)
    writer.put("1", *value)


def interrupted() -> Iterator[int]:
    yield 1
    raise KeyboardInterrupt


def test_writer_refuses_and_leaves_nothing(tmp_path: Path) -> None:
    make_database(tmp_path / "a.db")
    with pytest.raises(InputError, match=r"a.db: already exists"), TextDatabaseWriter(tmp_path / "a.db", META):
        pass
    with pytest.raises(InputError, match="text id '1' occurs twice"), TextDatabaseWriter(tmp_path / "b.db", META) as writer:
        put_twice(writer, [1], "a.npz")
    with pytest.raises(InputError, match=r"b.db: empty split"), TextDatabaseWriter(tmp_path / "b.db", META):
        pass
    with pytest.raises(InputError, match="key '1' occurs twice"), LmdbWriter(tmp_path / "b.db") as store:
        put_twice(store, b"")
    with pytest.raises(InputError, match="has 600 bytes, expected 1 to 511"), LmdbWriter(tmp_path / "b.db") as store:
        store.put("k" * 600, b"")
    with pytest.raises(InputError, match="has no word pieces"), TextDatabaseWriter(tmp_path / "b.db", META) as writer:
        writer.put("1", [], "a.npz")
    with pytest.raises(KeyboardInterrupt), TextDatabaseWriter(tmp_path / "b.db", META) as writer:
        writer.put("1", interrupted(), "a.npz")
    with pytest.raises(TypeError), TextDatabaseWriter(tmp_path / "b.db", META | {"CLS": object()}) as writer:
        writer.put("1", [1], "a.npz")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.db"]


def test_killed_writer_leaves_no_database(tmp_path: Path) -> None:
    program = (
        "import sys, time; from data.lmdb_store import LmdbWriter\n"
        "with LmdbWriter(sys.argv[1]) as writer:\n"
        "    writer.put('a', b'1'); writer._flush(); print('ready', flush=True); time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "db")], cwd=ROOT, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    child.send_signal(signal.SIGKILL)
    child.wait(60)
    child.stdout.close()
    assert not (tmp_path / "db").exists()
    assert all(entry.name.startswith(".") for entry in tmp_path.iterdir())
    make_database(tmp_path / "db")
    assert len(TextDatabase(tmp_path / "db")) == 3
