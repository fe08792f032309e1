"""Image databases: the three layouts, records of any writer, and what readers and writers refuse."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lmdb
import msgpack
import msgpack_numpy
import numpy as np
import pytest

from data.boxes import BoxRule
from data.image_db import Image, ImageDatabase, ImageDatabaseWriter
from data.lmdb_store import LmdbReader, LmdbWriter
from data.records import write_msgpack
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
    assert (image.features.dtype, image.boxes.dtype) == (np.float16, np.float32)


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
        assert len(image.boxes) == counts[name]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("conf_th", "keep_all", "folder", "counts"),
    [
        (0.2, False, FOLDER, COUNTS),
        (0, False, "feat_th0.0_max6_min2", "nbb_th0.0_max6_min2.json"),
        (-1, False, "feat_numbb4", ""),
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
        assert_image(database[name], *expected(name, rule))
        assert database[name].name == name
    assert database.absent([*IMAGES, "other.npz"]) == ["other.npz"]
    with pytest.raises(InputError, match=r"has no record 'other\.npz'"):
        database["other.npz"]
    if counts:
        rows = {name: len(arrays["conf"] if keep_all else expected(name, rule)[0]) for name, arrays in IMAGES.items()}
        assert json.loads((tmp_path / counts).read_text()) == rows


def test_arguments_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="path is 5, expected the folder of an image database"):
        ImageDatabase(5)  # type: ignore[arg-type]
    write(tmp_path)
    with pytest.raises(InputError, match="image 5: expected the name of an image"):
        ImageDatabase(tmp_path, RULE)[5]  # type: ignore[index]
    assert 5 not in ImageDatabase(tmp_path, RULE)  # type: ignore[operator]


def test_the_filtered_database_is_preferred_to_all(tmp_path: Path) -> None:
    for rule, folder in ((None, "all"), (RULE, FOLDER)):
        write(tmp_path, rule)
        described = {"path": str(tmp_path / folder), "images": len(IMAGES), "conf_th": 0.2, **SIZES}
        assert ImageDatabase(tmp_path, RULE).describe() == described


def test_real_msgpack_numpy_reads_what_is_written(tmp_path: Path) -> None:
    write(tmp_path)
    with LmdbReader(tmp_path / FOLDER) as store:
        assert json.loads(bytes(store.get("__keys__"))) == list(IMAGES)
        records = {name: bytes(store.get(name)) for name in IMAGES}
    for name, record in records.items():
        dump = msgpack_numpy.unpackb(record, raw=False)
        assert record == msgpack_numpy.packb(dump, use_bin_type=True)
        assert {key: array.dtype for key, array in dump.items()} == dict.fromkeys(IMAGES[name], np.float16)
        assert (np.diff(dump["conf"]) <= 0).all()


def test_more_boxes_promised_than_stored(tmp_path: Path) -> None:
    """The published converter writes min_bb into the JSON even if the detector found fewer boxes."""
    write(tmp_path)
    many, one, *_ = IMAGES
    (tmp_path / COUNTS).write_text(json.dumps({one: 10, many: 3}))
    assert [len(ImageDatabase(tmp_path, RULE)[name].boxes) for name in (many, one)] == [3, 1]


@pytest.mark.parametrize(
    ("path", "conf_th", "counts", "message"),
    [
        (".", 0.3, None, f"looked for feat_th0.3_max6_min2 and all; the folder has {FOLDER}, nbb_"),
        (".", -1, None, f"feat_numbb4 and all; .*; --conf_th 0.2 --max_bb 6 --min_bb 2 --no-compressed_db reads {FOLDER}"),
        (FOLDER, 0.2, None, f"{FOLDER} and all; the folder has data.mdb"),
        (".", 0.2, "{", f"{COUNTS}: not JSON"),
        (".", 0.2, "[]", f"{COUNTS}: .*expected a JSON object"),
        (".", 0.2, '{"a": 0}', f"{COUNTS}: 'a' has 0"),
        (".", 0.2, "{}", f"image '{NAME}': {COUNTS} does not name it"),
    ],
)
def test_databases_that_do_not_fit(tmp_path: Path, path: str, conf_th: float, counts: str | None, message: str) -> None:
    write(tmp_path)
    if counts:
        (tmp_path / COUNTS).write_text(counts)
    with pytest.raises(InputError, match=message):
        ImageDatabase(tmp_path / path, BoxRule(conf_th, **SIZES))[NAME]
    with pytest.raises(InputError, match=f"looked for {FOLDER}_compressed and all_compressed"):
        ImageDatabase(tmp_path, RULE, compressed=True)


@pytest.mark.parametrize("listed", [b"[", b"{}", b"[1]", None])
def test_bad_list_of_names(tmp_path: Path, listed: bytes | None) -> None:
    write(tmp_path)
    with lmdb.open(str(tmp_path / FOLDER), lock=False) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"__keys__", listed) if listed else transaction.delete(b"__keys__")
    with nullcontext() if listed is None else pytest.raises(InputError, match="__keys__ is not"):
        assert ImageDatabase(tmp_path, RULE).names() == sorted(IMAGES)


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (["a.npz", "a.npz"], {}, "image 'a.npz' occurs twice"),
        (["n" * 512], {}, "has a name of 512 bytes, expected 1 to 511"),
        (["__keys__"], {}, "image '__keys__' has a reserved name"),
        ([], {}, "there is no image"),
        (["x"], {"conf": np.array([0.5, np.nan, 1, 1])}, "image 'x': conf has numbers that are not finite"),
        (["x"], {"conf": np.array([0.5, 0, 1, 2])}, "image 'x': conf goes from 0 to 2, expected confidences from 0 to 1"),
        (["x"], {"features": np.full((4, 12), 1e6)}, "image 'x': features has numbers too large for half precision"),
        (["x"], {"soft_labels": np.zeros((3, 5))}, "image 'x': soft_labels has shape"),
        (["x"], {"conf": None}, "image 'x': has no confidences"),
    ],
)
def test_writer_refuses_and_leaves_nothing(tmp_path: Path, names: list[str], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message), ImageDatabaseWriter(tmp_path, None) as writer:
        [writer.put(name, **{**regions(4), **changes}) for name in names]
    assert list(tmp_path.iterdir()) == []


def test_count_follows_the_definition() -> None:
    rule, half = BoxRule(conf_th=0.3, max_bb=5, min_bb=2), np.float16(0.3)  # rounded up, to above 0.3
    for conf, count in (([0.9], 1), ([0.1] * 3, 2), ([0.9, 0.8, 0.7, 0.2], 3), ([0.9] * 9, 5), ([0.9, 0.9, half, half], 2)):
        assert rule.count(np.array(conf, np.float16)) == count


def test_the_worked_example_of_the_documentation(tmp_path: Path) -> None:
    box = np.array([[160 / 640, 60 / 480, 480 / 640, 240 / 480, 320 / 640, 180 / 480]], np.float32)
    with ImageDatabaseWriter(tmp_path) as writer:
        writer.put("a.npz", np.ones((1, 3), np.float32), box, np.ones(1, np.float32))
    numbers = ImageDatabase(tmp_path)["a.npz"].boxes[0].tolist()
    row = "| " + " | ".join(f"{number:g}" for number in numbers) + " |"
    assert row in (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    assert numbers[6] == 0.1875


HALVES = {name: array.astype(np.float16) for name, array in regions(4, 3).items()}
BY_COLUMN = {name: np.asfortranarray(array) for name, array in HALVES.items()}


def read_record(path: Path, record: bytes, folder: str = FOLDER) -> Image:
    """Read a record of any kind as the one image of a database."""
    with LmdbWriter(path / folder) as writer:
        writer.put(NAME, record)
    (path / COUNTS).write_text(json.dumps({NAME: 4}))
    return ImageDatabase(path, RULE, compressed=folder.endswith("_compressed"))[NAME]


def npz(save: Any = np.savez, **arrays: Any) -> bytes:
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "record",
    [
        msgpack_numpy.packb(HALVES, use_bin_type=False),
        msgpack_numpy.packb({key.encode(): array for key, array in HALVES.items()}),
        msgpack_numpy.packb({**HALVES, "width": 640, 7: [1], "names": np.array([{}, None])}),
        msgpack_numpy.packb(BY_COLUMN),
        msgpack_numpy.packb({key: array.astype(">f4") for key, array in HALVES.items()}),
        write_msgpack(HALVES).replace(b"\xc4\x04kind\xc4\x00", b"\xc4\x04kinb\xc4\x00"),
        msgpack.packb({k: {"nd": True, "type": b"<f2", "shape": a.shape, "data": a.tobytes()} for k, a in HALVES.items()}),
        # The published program's files hold one more array, which it did not mean to save.
        npz(np.savez, **BY_COLUMN, flag=np.array(True), objects=np.array([{}, None])),
        npz(np.savez_compressed, **BY_COLUMN, flag=np.array(True), objects=np.array([{}, None])),
    ],
)
def test_records_of_other_writers(tmp_path: Path, record: bytes) -> None:
    image = read_record(tmp_path, record, FOLDER + "_compressed" * record.startswith(b"PK"))
    np.testing.assert_array_equal(image.features, HALVES["features"])
    np.testing.assert_array_equal(image.boxes[:, :6], HALVES["norm_bb"].astype(np.float32))
    assert image.features.dtype.isnative


def field(**changes: Any) -> bytes:
    """A record with changes in the encoding of its features."""
    array = HALVES["features"]
    fields = {"nd": True, "type": "<f2", "kind": b"", "shape": list(array.shape), "data": array.tobytes(), **changes}
    return msgpack_numpy.packb({**HALVES, "features": fields})


def altered(**changes: np.ndarray) -> bytes:
    return write_msgpack({**HALVES, **changes})


def without(name: str) -> dict[str, np.ndarray]:
    return {key: array for key, array in HALVES.items() if key != name}


CORRUPT_MSGPACK = [
    (b"", "not a msgpack record"),
    (altered()[:-10], "not a msgpack record"),
    (altered() + b"x", "not a msgpack record"),
    (npz(**HALVES), "is a msgpack int|not a msgpack record"),
    (msgpack.packb([1]), "expected a map"),
    (msgpack.packb({"features": 1}), "features: is not an array"),
    (field(kind=b"V", type=[["a", "<f2"]]), "features: .*would need pickle"),
    (field(type="|O"), "type '|O'.*never read"),
    (field(type="<f2,<f2"), "expected plain numbers"),
    (field(type="nonsense"), "unknown type 'nonsense'"),
    (field(type=7), "not a plain array"),
    (field(type="<i2"), "features has type int16"),
    (field(data=None), "not a plain array"),
    (field(shape=[4, 13]), "features: holds 96 bytes"),
    (field(shape=[4, -12]), "impossible shape"),
    (field(shape=[4, 12.0]), "impossible shape"),
    (field(shape=[0, 12], data=b""), r"features has shape \[0, 12\]"),
    (write_msgpack(without("features")), "has no features"),
    (altered(norm_bb=HALVES["norm_bb"][:3]), "norm_bb has shape .*features has 4 rows"),
    (altered(norm_bb=HALVES["norm_bb"][:, :4]), "norm_bb has 4 columns, expected 6"),
    (altered(norm_bb=HALVES["norm_bb"] * np.inf), "norm_bb has numbers that are not finite"),
    (altered(features=np.full((4, 12), np.nan, np.float16)), "features has numbers that are not finite"),
]


def npz_with_header(header: bytes, data: bytes, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """An archive whose features have the given npy header."""
    buffer = io.BytesIO(npz(**without("features")))
    with zipfile.ZipFile(buffer, "a", method) as archive:
        archive.writestr("features.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data)
    return buffer.getvalue()


HEADER = b"{'descr': '<f2', 'fortran_order': False, 'shape': (%d, 12)}\n"
CORRUPT_NPZ = [
    (b"PK\x03\x04 and so on", "not an .npz"),
    (altered(), "not an .npz"),
    (npz(**HALVES)[:-30], "not an .npz"),
    (npz(**{**HALVES, "features": np.zeros(4, [("a", "<f2")])}), "features: .*expected plain numbers"),
    (npz(np.savez_compressed, **{**HALVES, "features": np.zeros((40 << 20, 1), np.float16)}), "takes 83,886,.* at most"),
    (npz_with_header(HEADER % 99999999999, b""), "features: holds 0 bytes"),
    (npz_with_header(b"nonsense\n", b""), "features: has no readable npy header"),
    (npz_with_header(b"{}", b"", zipfile.ZIP_LZMA), "compressed in an unknown way"),
    (npz(**without("norm_bb")), "has no norm_bb"),
]
UNFILTERED = [(write_msgpack(without("conf")), "has no conf"), (altered(conf=np.ones(3, np.float16)), "conf has shape")]


@pytest.mark.parametrize(
    ("folder", "record", "message"),
    [
        (folder, *case)
        for folder, cases in ((FOLDER, CORRUPT_MSGPACK), (f"{FOLDER}_compressed", CORRUPT_NPZ), ("all", UNFILTERED))
        for case in cases
    ],
)
def test_corrupt_records_are_named(tmp_path: Path, folder: str, record: bytes, message: str) -> None:
    with pytest.raises(InputError, match=f"{folder}: image '{NAME}': .*({message})"):
        read_record(tmp_path, record, folder)
