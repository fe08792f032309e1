"""Text databases: what is written is read, and everything wrong is one line that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import lz4.frame
import msgpack
import numpy as np
import pytest

from data.lmdb_store import LmdbWriter
from data.text_db import TextDatabase, TextDatabaseWriter
from tests.conftest import GOLDEN
from utils.errors import InputError

META = {"CLS": 101, "SEP": 102, "MASK": 103, "UNK": 100, "v_range": [106, 28996], "toker": "bert-base-cased"}
SIDECARS = ("meta.json", "id2len.json", "txt2img.json", "img2txts.json")
GOOD = {"input_ids": [1, 2], "img_fname": "a.npz"}


@pytest.fixture
def database(tmp_path: Path) -> Path:
    with TextDatabaseWriter(tmp_path / "made.db", META) as writer:
        writer.put("10", [7, 8, 9], "b.npz", raw="x y z", toked_caption=["x", "y", "z"])
        writer.put("9", [106], "a.npz", raw="é")
        writer.put("2", np.array([5, 28995]), "b.npz")
    return tmp_path / "made.db"


def packed(fields: Any, **options: Any) -> bytes:
    return lz4.frame.compress(msgpack.packb(fields, **options))


def with_record(database: Path, record: bytes) -> TextDatabase:
    """The database with ``record`` for text 9 and nothing else."""
    (database / "data.mdb").unlink()
    with LmdbWriter(database.with_name("store")) as writer:
        writer.put("9", record)
    (database.with_name("store") / "data.mdb").rename(database / "data.mdb")
    return TextDatabase(database)


def test_golden_database_reads_whole() -> None:
    database = TextDatabase(GOLDEN.text_db)
    assert database.ids == list(json.loads((GOLDEN.text_db / "id2len.json").read_text()))
    assert not database.absent()
    for text_id, length, image in zip(database.ids, database.lengths, database.image_of, strict=True):
        text = database[text_id]
        assert (text.id, text.image, text.input_ids.dtype) == (text_id, database.images[image], np.int64)
        assert text.input_ids.shape == (length,)


def test_what_is_written_is_read(database: Path) -> None:
    texts = TextDatabase(database)
    assert (texts.ids, texts.images) == (["10", "9", "2"], ["b.npz", "a.npz"])
    assert (texts.lengths.tolist(), texts.image_of.tolist()) == ([3, 1, 2], [0, 1, 0])
    assert (texts.cls_id, texts.sep_id, texts.vocab_size, texts.path) == (101, 102, 28996, database)
    assert texts["10"].input_ids.tolist() == [7, 8, 9]
    assert texts["10"].extra == {"raw": "x y z", "toked_caption": ["x", "y", "z"]}
    assert (texts["9"].caption, texts["2"].caption, texts["2"].extra) == ("é", None, {})
    assert {file.name for file in database.iterdir()} == {*SIDECARS, "data.mdb"}
    with pytest.raises(InputError, match=r"made\.db: has no record '123'"):
        texts["123"]


OLD = {**GOOD, "raw": "é", "box": (1, 2)}


@pytest.mark.parametrize(
    ("record", "extra"),
    [
        (packed(OLD, use_bin_type=False), {"raw": "é", "box": [1, 2]}),
        (packed({key.encode(): value for key, value in OLD.items()} | {b"img_fname": b"a.npz", 3: 4}), {3: 4}),
    ],
)
def test_records_of_old_writers_and_bytes_keys(database: Path, record: bytes, extra: dict[Any, Any]) -> None:
    text = with_record(database, record)["9"]
    assert text.input_ids.tolist() == [1, 2]
    assert text.extra == {"raw": "é", "box": [1, 2], **extra}


@pytest.mark.parametrize("name", SIDECARS)
def test_missing_and_malformed_sidecars_are_named(database: Path, name: str) -> None:
    for contents, message in (("{", "not JSON"), ("[1]", "contains a JSON list, expected"), (None, "no such file")):
        (database / name).write_text(contents) if contents else (database / name).unlink()
        with pytest.raises(InputError, match=f"{name}: {message}"):
            TextDatabase(database)
    with pytest.raises(InputError, match=r"nowhere\.db: no such folder; expected a text database"):
        TextDatabase(database.with_name("nowhere.db"))


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("meta.json", {"v_range": [1]}, "v_range is"),
        ("meta.json", {"CLS": "101"}, "CLS is '101'"),
        ("meta.json", {"SEP": 28996}, "SEP is 28996, expected a word-piece id from 0 to 28995"),
        ("id2len.json", {"77": 3}, "txt2img.json: lacks text '77'"),
        ("id2len.json", {"9": "1"}, "'9' has '1'"),
        ("txt2img.json", {"9": 4}, "'9' has 4"),
        ("txt2img.json", {"9": "b.npz"}, "img2txts.json: lists text '9' for image 'a.npz', but txt2img.json has 'b.npz'"),
        ("img2txts.json", {"a.npz": []}, "img2txts.json: lacks text '9'"),
        ("img2txts.json", {"a.npz": "9"}, "'a.npz' has '9'"),
    ],
)
def test_contradictions_between_sidecars(database: Path, name: str, edit: dict[str, Any], message: str) -> None:
    file = database / name
    file.write_text(json.dumps(json.loads(file.read_text()) | edit))
    with pytest.raises(InputError, match=message):
        TextDatabase(database)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"junk junk", "not an lz4 frame"),
        (packed(GOOD)[:-3], "cut short"),
        (packed(GOOD) + b"x", "1 byte after the end"),
        (lz4.frame.compress(bytes(17 << 20)), "over 16,777,216 bytes"),
        (lz4.frame.compress(msgpack.packb(GOOD)[:-2]), "not a msgpack record"),
        (packed([1]), "expected a map"),
        (packed(GOOD | {"input_ids": []}), "input_ids is missing, empty"),
        (packed(GOOD | {"input_ids": "12"}), "not a list of integers"),
        (packed(GOOD | {"input_ids": [1, True]}), "not a list of integers"),
        (packed(GOOD | {"input_ids": [-1, 2]}), "word piece -1 is outside"),
        (packed(GOOD | {"input_ids": [1, 28996]}), "word piece 28996 is outside the vocabulary of 28996"),
        (packed({"input_ids": [1]}), "img_fname is None, txt2img.json says 'a.npz'"),
        (packed(GOOD | {"img_fname": "b.npz"}), "img_fname is 'b.npz'"),
    ],
)
def test_bad_records_are_named(database: Path, record: bytes, message: str) -> None:
    with pytest.raises(InputError, match=rf"^{database}: text '9': .*{message}[^\n]*$"):
        with_record(database, record)["9"]


INTERRUPTED = MagicMock(__iter__=MagicMock(side_effect=KeyboardInterrupt))


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ([], InputError, r"b\.db: empty split"),
        ([("1", [1] * 4097, "a.npz")], InputError, "has 4,097 word pieces, expected at most 4,096"),
        ([("k" * 512, [1], "a.npz")], InputError, "text id .* has a name of 512 bytes, expected 1 to 511"),
        ([("1", [1], "__keys__")], InputError, "image '__keys__' has a reserved name"),
        ([("1", [1], "a.npz", object())], TypeError, None),
        ([("1", [1], "a.npz"), ("2", INTERRUPTED, "a.npz")], KeyboardInterrupt, None),
    ],
)
def test_writer_refuses_and_leaves_nothing(tmp_path: Path, texts: Any, error: type[Exception], message: str | None) -> None:
    with pytest.raises(error, match=message), TextDatabaseWriter(tmp_path / "b.db", META) as writer:
        [writer.put(text_id, ids, image, raw=raw) for text_id, ids, image, *raw in texts]
    with pytest.raises(TypeError), TextDatabaseWriter(tmp_path / "b.db", META | {"CLS": object()}) as writer:
        writer.put("1", [1], "a.npz")
    assert not list(tmp_path.iterdir())


def test_writer_replaces_nothing(database: Path) -> None:
    with pytest.raises(InputError, match=r"made\.db: already exists"), TextDatabaseWriter(database, META):
        pass
