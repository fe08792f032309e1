"""Image databases: the three layouts, names, box counts, and what their writer refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lmdb
import msgpack_numpy
import numpy as np
import pytest

from data.boxes import BoxRule
from data.image_db import Image, ImageDatabase, ImageDatabaseWriter, encode_image
from data.lmdb_store import LmdbReader
from tests.conftest import GOLDEN
from utils.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"max_bb": 6, "min_bb": 2, "num_bb": 4}
RULE = BoxRule(0.2, **SIZES)
FOLDER, COUNTS = "feat_th0.2_max6_min2", "nbb_th0.2_max6_min2.json"


def regions(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Regions of an image in random order."""
    random = np.random.default_rng(seed)
    shapes = {"features": (rows, 12), "norm_bb": (rows, 6), "conf": (rows,), "soft_labels": (rows, 5)}
    return {name: random.random(shape).astype(np.float32) for name, shape in shapes.items()}


IMAGES = {f"made_{number:012d}.npz": regions(rows, number) for number, rows in enumerate([9, 1, 3, 6, 7, 2])}
NAME = next(iter(IMAGES))


def write(path: Path, rule: BoxRule | None = RULE, *, compressed: bool = False) -> None:
    with ImageDatabaseWriter(path, rule, compressed=compressed) as writer:
        for name, arrays in IMAGES.items():
            writer.put(name, **arrays)


def expected(name: str, rule: BoxRule) -> tuple[np.ndarray, np.ndarray]:
    """Features and boxes by the definition, one box at a time."""
    arrays = IMAGES[name]
    order = sorted(range(len(arrays["conf"])), key=lambda row: -arrays["conf"][row])
    confident = sum(1 for row in order if arrays["conf"][row] > rule.conf_th)
    order = order[: rule.num_bb if rule.conf_th == -1 else min(max(confident, rule.min_bb), rule.max_bb)]
    six = [arrays["norm_bb"][row].astype(np.float16).astype(np.float32) for row in order]
    return arrays["features"][order].astype(np.float16), np.array([[*box, box[4] * box[5]] for box in six], np.float32)


def assert_image(image: Image, features: np.ndarray, boxes: np.ndarray) -> None:
    np.testing.assert_array_equal(image.features, features)
    np.testing.assert_array_equal(image.boxes, boxes)
    assert image.boxes.dtype == np.float32


def test_golden_database_reads_whole() -> None:
    path = GOLDEN.image_db
    database = ImageDatabase(path)
    counts = json.loads(next(path.glob("nbb_th0.2_*.json")).read_text())
    assert sorted(database.names()) == sorted(counts)
    assert len(database) == len(counts)
    with LmdbReader(database._store.path) as store:
        records = {name: msgpack_numpy.unpackb(bytes(store.get(name))) for name in counts}
    for name, record in records.items():
        image = database[name]
        six = record["norm_bb"].astype(np.float32)
        assert_image(image, record["features"], np.column_stack([six, six[:, 4] * six[:, 5]]))
        assert (image.features.dtype, len(image.boxes)) == (np.float16, counts[name])


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("conf_th", "keep_all", "folder", "counts"),
    [
        (0.2, False, "feat_th0.2_max6_min2", "nbb_th0.2_max6_min2.json"),
        (0, False, "feat_th0.0_max6_min2", "nbb_th0.0_max6_min2.json"),
        (-1, False, "feat_numbb4", ""),
        (0.2, True, "all", "nbb.json"),
        (0.5, True, "all", "nbb.json"),
        (-1.0, True, "all", "nbb.json"),
    ],
)
def test_what_is_written_is_read_in_every_layout(
    tmp_path: Path, compressed: bool, conf_th: float, keep_all: bool, folder: str, counts: str
) -> None:
    rule = BoxRule(conf_th, **SIZES)
    write(tmp_path, None if keep_all else rule, compressed=compressed)
    assert {entry.name for entry in tmp_path.iterdir()} == {folder + compressed * "_compressed", counts} - {""}
    database = ImageDatabase(tmp_path, rule, compressed=compressed)
    assert database.names() == list(IMAGES)
    assert len(database) == len(IMAGES)
    for name in IMAGES:
        image = database[name]
        assert_image(image, *expected(name, rule))
        assert (image.name, image.features.dtype) == (name, np.float16)
        assert name in database
    assert "other.npz" not in database
    with pytest.raises(InputError, match=r"has no record 'other\.npz'"):
        database["other.npz"]
    database.close()
    assert_image(image, *expected(image.name, rule))
    if counts:
        rows = {name: len(arrays["conf"] if keep_all else expected(name, rule)[0]) for name, arrays in IMAGES.items()}
        assert json.loads((tmp_path / counts).read_text()) == rows


def test_the_filtered_database_is_preferred_to_all(tmp_path: Path) -> None:
    write(tmp_path, None)
    everything = ImageDatabase(tmp_path, RULE)
    assert everything.describe()["path"] == str(tmp_path / "all")
    write(tmp_path)
    database = ImageDatabase(tmp_path, RULE)
    assert database.describe() == {"path": str(tmp_path / FOLDER), "images": len(IMAGES), "conf_th": 0.2, **SIZES}
    for name in IMAGES:
        assert_image(database[name], everything[name].features, everything[name].boxes)


def test_real_msgpack_numpy_reads_what_is_written(tmp_path: Path) -> None:
    write(tmp_path)
    with LmdbReader(tmp_path / FOLDER) as store:
        assert json.loads(bytes(store.get("__keys__"))) == list(IMAGES)
        records = {name: bytes(store.get(name)) for name in IMAGES}
    for name, record in records.items():
        dump = msgpack_numpy.unpackb(record, raw=False)
        assert record == msgpack_numpy.packb(dump, use_bin_type=True)
        assert {key: array.dtype for key, array in dump.items()} == dict.fromkeys(IMAGES[name], np.float16)
        np.testing.assert_array_equal(dump["features"], expected(name, RULE)[0])
        assert (np.diff(dump["conf"]) <= 0).all()


def test_more_boxes_promised_than_stored(tmp_path: Path) -> None:
    """The published converter writes min_bb into the JSON even if the detector found fewer boxes."""
    write(tmp_path)
    counts = json.loads((tmp_path / COUNTS).read_text())
    names = list(IMAGES)
    (tmp_path / COUNTS).write_text(json.dumps(counts | {names[1]: 10, names[0]: 3}))
    database = ImageDatabase(tmp_path, RULE)
    assert [len(database[name].boxes) for name in names[:2]] == [3, 1]


@pytest.mark.parametrize(
    ("path", "options", "counts", "message"),
    [
        (".", {"conf_th": 0.3}, None, f"looked for feat_th0.3_max6_min2 and all; the folder has {FOLDER}, nbb_"),
        (".", {"compressed": True}, None, f"{FOLDER}_compressed and all_compressed"),
        (".", {"conf_th": -1}, None, "feat_numbb4 and all"),
        (FOLDER, {}, None, f"{FOLDER} and all; the folder has data.mdb"),
        ("nowhere", {}, None, "nowhere: no such image database.*does not exist"),
        (".", {}, "{", f"{COUNTS}: not JSON"),
        (".", {}, "[]", f"{COUNTS}: .*expected a JSON object"),
        (".", {}, '{"a": 0}', f"{COUNTS}: 'a' has 0"),
        (".", {}, "{}", f"image '{NAME}': {COUNTS} does not name it"),
        (".", {}, "", f"{COUNTS}: no such file"),
    ],
)
def test_databases_that_do_not_fit(
    tmp_path: Path, path: str, options: dict[str, Any], counts: str | None, message: str
) -> None:
    write(tmp_path)
    if counts is not None:
        (tmp_path / COUNTS).write_text(counts) if counts else (tmp_path / COUNTS).unlink()
    rule = BoxRule(options.get("conf_th", 0.2), **SIZES)
    with pytest.raises(InputError, match=message):
        ImageDatabase(tmp_path / path, rule, compressed=options.get("compressed", False))[NAME]


@pytest.mark.parametrize("listed", [b"[", b"{}", b"[1]", None])
def test_bad_list_of_names(tmp_path: Path, listed: bytes | None) -> None:
    write(tmp_path)
    with lmdb.open(str(tmp_path / FOLDER), lock=False) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"__keys__", listed) if listed else transaction.delete(b"__keys__")
    database = ImageDatabase(tmp_path, RULE)
    if listed is None:
        assert database.names() == sorted(IMAGES)
    else:
        with pytest.raises(InputError, match="__keys__ is not"):
            database.names()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conf": np.array([0.5, np.nan, 1, 1], np.float32)}, "conf has numbers that are not finite"),
        ({"conf": np.array([0.5, 0, 1, 2], np.float32)}, "conf goes from 0 to 2, expected confidences from 0 to 1"),
        ({"features": np.full((4, 12), 1e6, np.float32)}, "features has numbers too large for half precision"),
        ({"soft_labels": np.zeros((3, 5), np.float32)}, "soft_labels has shape"),
        ({"norm_bb": np.zeros((4, 4), np.float32)}, "norm_bb has 4 columns"),
        ({"features": np.zeros((4, 12), np.int64)}, "features has type int64"),
    ],
)
def test_writer_refuses_bad_arrays(tmp_path: Path, changes: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_image(**{**regions(4), **changes}, rule=None, compressed=False)
    with pytest.raises(InputError, match=f"image 'x.npz': {message}"), ImageDatabaseWriter(tmp_path) as writer:
        writer.put("x.npz", **{**regions(4), **changes})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.npz", "a.npz"], "image 'a.npz' occurs twice"),
        (["n" * 512], "has a name of 512 bytes, expected 1 to 511"),
        (["__keys__"], "image '__keys__' has a reserved name"),
        ([], "there is no image"),
    ],
)
def test_writer_refuses_names_and_leaves_nothing(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message), ImageDatabaseWriter(tmp_path) as writer:
        [writer.put(name, **regions(3)) for name in names]
    assert list(tmp_path.iterdir()) == []


def test_writer_keeps_what_is_there(tmp_path: Path) -> None:
    write(tmp_path)
    before = (tmp_path / COUNTS).read_text()
    with pytest.raises(InputError, match=f"{FOLDER}: already exists"):
        write(tmp_path)
    with (
        pytest.raises(InputError, match=f"belongs to {FOLDER}, which has other images"),
        ImageDatabaseWriter(tmp_path, RULE, compressed=True) as writer,
    ):
        writer.put("other.npz", **regions(3))
    assert (tmp_path / COUNTS).read_text() == before
    assert {entry.name for entry in tmp_path.iterdir()} == {FOLDER, COUNTS}


def test_count_follows_the_definition() -> None:
    rule = BoxRule(conf_th=0.3, max_bb=5, min_bb=2)
    half = np.float16(0.3)  # rounded up, so that its exact value is above 0.3
    cases = [([0.9], 1), ([0.1] * 3, 2), ([0.9, 0.8, 0.7, 0.2], 3), ([0.9] * 9, 5), ([0.9, 0.9, half, half], 2)]
    assert [rule.count(np.array(conf, np.float16)) for conf, _ in cases] == [count for _, count in cases]
    with pytest.raises(InputError, match="expected 1 <= min_bb <= max_bb"):
        BoxRule(min_bb=9, max_bb=8)


def test_the_worked_example_of_the_documentation(tmp_path: Path) -> None:
    box = np.array([[160 / 640, 60 / 480, 480 / 640, 240 / 480, 320 / 640, 180 / 480]], np.float32)
    with ImageDatabaseWriter(tmp_path) as writer:
        writer.put("a.npz", np.ones((1, 3), np.float32), box, np.ones(1, np.float32))
    numbers = ImageDatabase(tmp_path)["a.npz"].boxes[0].tolist()
    row = "| " + " | ".join(f"{number:g}" for number in numbers) + " |"
    assert row in (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    assert numbers[6] == 0.1875
