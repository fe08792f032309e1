"""Image databases: the three layouts, both record formats, numbers of boxes, and refusal of everything unsafe or wrong."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import lmdb
import msgpack
import msgpack_numpy
import numpy as np
import pytest

from data.boxes import BoxRule
from data.image_db import ImageDatabase, ImageDatabaseWriter, encode_image
from data.lmdb_store import LmdbReader
from data.records import read_msgpack, read_npz, write_msgpack
from tests.conftest import GOLDEN
from utils.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
RULE = {"conf_th": 0.2, "max_bb": 6, "min_bb": 2, "num_bb": 4}


def regions(rows: int, seed: int = 0, width: int = 12) -> dict[str, np.ndarray]:
    """Regions of an image in no order."""
    random = np.random.default_rng(seed)
    return {
        "features": random.standard_normal((rows, width)).astype(np.float32),
        "norm_bb": random.random((rows, 6)).astype(np.float32),
        "conf": random.random(rows).astype(np.float32),
        "soft_labels": random.random((rows, 5)).astype(np.float32),
    }


IMAGES = {f"made_{number:012d}.npz": regions(rows, number) for number, rows in enumerate([9, 1, 3, 6, 7, 2])}


def write(path: Path, *, keep_all: bool = False, compressed: bool = False, **options: Any) -> Path:
    with ImageDatabaseWriter(path, None if keep_all else BoxRule(**{**RULE, **options}), compressed=compressed) as writer:
        for name, arrays in IMAGES.items():
            writer.put(name, **arrays)
    return path


def expected(name: str, rule: BoxRule) -> tuple[np.ndarray, np.ndarray]:
    """Features and boxes by the definition, a box at a time."""
    arrays = IMAGES[name]
    order = sorted(range(len(arrays["conf"])), key=lambda row: -arrays["conf"][row])
    sure = sum(1 for row in order if arrays["conf"][row] > rule.conf_th)
    number = rule.num_bb if rule.conf_th == -1 else min(max(sure, rule.min_bb), rule.max_bb)
    order = order[:number]
    six = [arrays["norm_bb"][row].astype(np.float16).astype(np.float32) for row in order]
    return arrays["features"][order].astype(np.float16), np.array([[*box, box[4] * box[5]] for box in six], np.float32)


def replace(path: Path, name: str, value: bytes) -> None:
    """Put a record of any kind into a finished database."""
    with lmdb.open(str(path), map_size=1 << 26, lock=False) as environment, environment.begin(write=True) as transaction:
        transaction.put(name.encode(), value)


def test_golden_database_reads_whole() -> None:
    path = GOLDEN.image_db
    database = ImageDatabase(path)
    numbers = json.loads(next(path.glob("nbb_th0.2_*.json")).read_text())
    assert sorted(database.names()) == sorted(numbers)
    assert len(database) == len(numbers)
    database.close()
    with lmdb.open(str(database._store.path), readonly=True, lock=False) as environment, environment.begin() as transaction:
        records = {name: msgpack_numpy.unpackb(transaction.get(name.encode())) for name in numbers}
    for name, record in records.items():
        image = database[name]
        np.testing.assert_array_equal(image.features, record["features"])
        np.testing.assert_array_equal(image.boxes[:, :6], record["norm_bb"].astype(np.float32))
        assert image.features.dtype == np.float16
        assert len(image.boxes) == numbers[name]
        w, h = image.boxes[:, 4], image.boxes[:, 5]
        np.testing.assert_array_equal(image.boxes[:, 6], w * h)
    database.close()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("conf_th", "keep_all"), [(0.2, False), (0.2, True), (-1, False), (-1.0, True), (0.5, True), (0.0, False)]
)
def test_what_is_written_is_read_in_every_layout(tmp_path: Path, compressed: bool, conf_th: float, keep_all: bool) -> None:
    write(tmp_path / "set", compressed=compressed, conf_th=conf_th, keep_all=keep_all)
    with_rule = {**RULE, "conf_th": conf_th}
    database = ImageDatabase(tmp_path / "set", BoxRule(**with_rule), compressed=compressed)
    assert database.names() == list(IMAGES)
    assert len(database) == len(IMAGES)
    for name in IMAGES:
        image = database[name]
        features, boxes = expected(name, BoxRule(**with_rule))
        np.testing.assert_array_equal(image.features, features)
        np.testing.assert_array_equal(image.boxes, boxes)
        assert (image.name, image.features.dtype, image.boxes.dtype) == (name, np.float16, np.float32)
        assert name in database
    assert "other.npz" not in database
    with pytest.raises(InputError, match=r"has no record 'other\.npz'"):
        database["other.npz"]
    database.close()


def test_names_on_disk_are_the_published_ones(tmp_path: Path) -> None:
    write(tmp_path)
    write(tmp_path, compressed=True)
    write(tmp_path, conf_th=-1)
    write(tmp_path, conf_th=-1.0, compressed=True)
    write(tmp_path, keep_all=True)
    write(tmp_path, keep_all=True, compressed=True)
    write(tmp_path, conf_th=0, max_bb=100, min_bb=10)
    assert {entry.name for entry in tmp_path.iterdir()} == {
        "feat_th0.2_max6_min2",
        "feat_th0.2_max6_min2_compressed",
        "nbb_th0.2_max6_min2.json",
        "feat_numbb4",
        "feat_numbb4_compressed",
        "all",
        "all_compressed",
        "nbb.json",
        "feat_th0.0_max100_min10",
        "nbb_th0.0_max100_min10.json",
    }
    assert json.loads((tmp_path / "nbb.json").read_text()) == {name: len(arrays["conf"]) for name, arrays in IMAGES.items()}
    assert BoxRule().folder == "feat_th0.2_max100_min10"


def test_the_filtered_database_is_preferred_to_all(tmp_path: Path) -> None:
    write(tmp_path, keep_all=True)
    all_database = ImageDatabase(tmp_path, BoxRule(**RULE))
    assert all_database.describe()["path"] == str(tmp_path / "all")
    write(tmp_path)
    database = ImageDatabase(tmp_path, BoxRule(**RULE))
    assert database.describe() == {"path": str(tmp_path / "feat_th0.2_max6_min2"), "images": len(IMAGES), **RULE}
    for name in IMAGES:
        np.testing.assert_array_equal(database[name].features, all_database[name].features)
        np.testing.assert_array_equal(database[name].boxes, all_database[name].boxes)
    all_database.close()
    database.close()


def test_real_msgpack_numpy_reads_what_is_written(tmp_path: Path) -> None:
    write(tmp_path)
    with LmdbReader(tmp_path / "feat_th0.2_max6_min2") as store:
        assert json.loads(bytes(store.get("__keys__"))) == list(IMAGES)
        for name in IMAGES:
            record = bytes(store.get(name))
            dump = msgpack_numpy.unpackb(record, raw=False)
            features, boxes = expected(name, BoxRule(**RULE))
            assert set(dump) == {"features", "norm_bb", "conf", "soft_labels"}
            assert all(array.dtype == np.float16 for array in dump.values())
            np.testing.assert_array_equal(dump["features"], features)
            np.testing.assert_array_equal(dump["norm_bb"].astype(np.float32), boxes[:, :6])
            assert (np.diff(dump["conf"]) <= 0).all()
            assert record == msgpack_numpy.packb(dump, use_bin_type=True)


def halves(rows: int = 4) -> dict[str, np.ndarray]:
    return {name: array.astype(np.float16) for name, array in regions(rows, 3).items()}


@pytest.mark.parametrize(
    "encode",
    [
        msgpack_numpy.packb,
        lambda arrays: msgpack_numpy.packb(arrays, use_bin_type=False),
        lambda arrays: msgpack_numpy.packb({key.encode(): array for key, array in arrays.items()}),
        lambda arrays: msgpack_numpy.packb({**arrays, "width": 640, 7: [1], "names": np.array([{}, None])}),
        lambda arrays: msgpack_numpy.packb({key: np.asfortranarray(array) for key, array in arrays.items()}),
        lambda arrays: msgpack_numpy.packb({key: array.astype(">f4") for key, array in arrays.items()}),
        lambda arrays: write_msgpack(arrays).replace(b"\xc4\x04kind\xc4\x00", b"\xc4\x04kinb\xc4\x00"),
        lambda arrays: msgpack.packb(
            {key: {"nd": True, "type": b"<f2", "shape": array.shape, "data": array.tobytes()} for key, array in arrays.items()}
        ),
    ],
)
def test_msgpack_records_of_other_writers(tmp_path: Path, encode: Any) -> None:
    write(tmp_path)
    name, arrays = next(iter(IMAGES)), halves()
    replace(tmp_path / "feat_th0.2_max6_min2", name, encode(arrays))
    database = ImageDatabase(tmp_path, BoxRule(**RULE))
    image = database[name]
    np.testing.assert_array_equal(image.features, arrays["features"])
    np.testing.assert_array_equal(image.boxes[:, :6], arrays["norm_bb"].astype(np.float32))
    assert image.features.dtype.isnative
    database.close()


def npz(save: Any = np.savez, **arrays: Any) -> bytes:
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_records_of_other_writers(tmp_path: Path, save: Any) -> None:
    write(tmp_path, compressed=True)
    name, arrays = next(iter(IMAGES)), halves()
    by_column = {key: np.asfortranarray(array) for key, array in arrays.items()}
    # The published program's files hold one more array, which it did not mean to save.
    record = npz(save, **by_column, flag=np.array(True), objects=np.array([{}, None]))
    replace(tmp_path / "feat_th0.2_max6_min2_compressed", name, record)
    database = ImageDatabase(tmp_path, BoxRule(**RULE), compressed=True)
    np.testing.assert_array_equal(database[name].features, arrays["features"])
    np.testing.assert_array_equal(database[name].boxes[:, :6], arrays["norm_bb"].astype(np.float32))
    database.close()


def test_more_boxes_promised_than_stored(tmp_path: Path) -> None:
    """The published converter writes min_bb into the JSON also where the detector found fewer."""
    write(tmp_path)
    file = tmp_path / "nbb_th0.2_max6_min2.json"
    numbers = json.loads(file.read_text())
    names = list(IMAGES)
    file.write_text(json.dumps(numbers | {names[1]: 10, names[0]: 3}))
    database = ImageDatabase(tmp_path, BoxRule(**RULE))
    assert len(database[names[1]].boxes) == 1
    assert len(database[names[0]].boxes) == 3
    database.close()


def test_missing_databases_and_sidecars(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"feat_th0.2_max100_min10 and all; the folder is empty"):
        ImageDatabase(tmp_path)
    with pytest.raises(InputError, match=r"nowhere: no such image database.*does not exist"):
        ImageDatabase(tmp_path / "nowhere")
    write(tmp_path)
    with pytest.raises(InputError, match=r"looked for feat_th0.3_max6_min2 and all; the folder has feat_th0.2_max6_min2, nbb_"):
        ImageDatabase(tmp_path, BoxRule(**{**RULE, "conf_th": 0.3}))
    with pytest.raises(InputError, match=r"feat_th0.2_max6_min2_compressed and all_compressed"):
        ImageDatabase(tmp_path, BoxRule(**RULE), compressed=True)
    with pytest.raises(InputError, match="feat_numbb4 and all"):
        ImageDatabase(tmp_path, BoxRule(**{**RULE, "conf_th": -1}))
    file = tmp_path / "nbb_th0.2_max6_min2.json"
    for contents, message in [("{", "not JSON"), ("[]", "expected a JSON object"), ('{"a": 0}', "'a' has 0")]:
        file.write_text(contents)
        with pytest.raises(InputError, match=f"{file.name}: {message}"):
            ImageDatabase(tmp_path, BoxRule(**RULE))
    file.write_text("{}")
    name = next(iter(IMAGES))
    with pytest.raises(InputError, match=f"image '{name}': nbb_th0.2_max6_min2.json does not name it"):
        ImageDatabase(tmp_path, BoxRule(**RULE))[name]
    file.unlink()
    with pytest.raises(InputError, match=f"{file.name}: no such file"):
        ImageDatabase(tmp_path, BoxRule(**RULE))
    with pytest.raises(InputError, match="expected 1 <= min_bb <= max_bb"):
        ImageDatabase(tmp_path, BoxRule(min_bb=9, max_bb=8))


def test_bad_list_of_names(tmp_path: Path) -> None:
    write(tmp_path)
    store = tmp_path / "feat_th0.2_max6_min2"
    for value in (b"[", b"{}", b"[1]"):
        replace(store, "__keys__", value)
        database = ImageDatabase(tmp_path, BoxRule(**RULE))
        with pytest.raises(InputError, match="__keys__ is not"):
            database.names()
        database.close()
    with lmdb.open(str(store), map_size=1 << 26, lock=False) as environment, environment.begin(write=True) as transaction:
        transaction.delete(b"__keys__")
    database = ImageDatabase(tmp_path, BoxRule(**RULE))
    assert sorted(database.names()) == sorted(IMAGES)
    database.close()


def field(**changes: Any) -> bytes:
    """A record whose features are written by hand."""
    array = halves()["features"]
    fields = {"nd": True, "type": "<f2", "kind": b"", "shape": list(array.shape), "data": array.tobytes(), **changes}
    rest = {name: array for name, array in halves().items() if name != "features"}
    return msgpack_numpy.packb({"features": fields, **rest})


class Canary:
    """Unpickling it leaves a trace."""

    def __reduce__(self) -> Any:
        return (os.putenv, ("UNPICKLED", "1"))


def without(name: str) -> dict[str, np.ndarray]:
    return {key: array for key, array in halves().items() if key != name}


CORRUPT_MSGPACK = [
    (b"", "not a msgpack record"),
    (b"\xc1", "not a msgpack record"),
    (write_msgpack(halves())[:-10], "not a msgpack record"),
    (write_msgpack(halves()) + b"x", "not a msgpack record"),
    (b"\x91" * 5000, "not a msgpack record"),
    (b"\x81\x80\x01", "not a msgpack record"),
    (npz(**halves()), "is a msgpack int|not a msgpack record"),
    (msgpack.packb([1]), "expected a map"),
    (msgpack.packb({"features": 1}), "features: is not an array"),
    (msgpack_numpy.packb({**halves(), "features": np.array([[Canary()]] * 4)}), "features: .*would need pickle"),
    (field(kind=b"O", data=b"cos\nsystem\n"), "features: .*would need pickle"),
    (field(kind=b"V", type=[["a", "<f2"]]), "features: .*would need pickle"),
    (field(type="|O"), "type '|O'.*never read"),
    (field(type="<f2,<f2"), "expected plain numbers"),
    (field(type="nonsense"), "unknown type 'nonsense'"),
    (field(type="<c8"), "expected plain numbers"),
    (field(type=7), "not a plain array"),
    (field(type="<i2"), "features has type int16"),
    (field(shape=[4, 13]), "features: holds 96 bytes"),
    (field(shape=[4, -12]), "impossible shape"),
    (field(shape=[4, 12.0]), "impossible shape"),
    (field(shape=[1 << 40, 1 << 40]), "features: holds 96 bytes"),
    (field(shape=[48]), r"features has shape \[48\]"),
    (field(shape=[48, 1]), "norm_bb has shape .*features has 48 rows"),
    (field(data="text"), "features: holds 4 bytes"),
    (field(data=None), "not a plain array"),
    (field(shape=[0, 12], data=b""), r"features has shape \[0, 12\]"),
    (field(shape=[], data=b"ab"), r"features has shape \[\]"),
    (write_msgpack(without("features")), "has no features"),
    (write_msgpack(without("norm_bb")), "has no norm_bb"),
    (write_msgpack({**halves(), "norm_bb": halves(3)["norm_bb"]}), "norm_bb has shape .*features has 4 rows"),
    (write_msgpack({**halves(), "norm_bb": halves()["norm_bb"][:, :4]}), "norm_bb has 4 columns, expected 6"),
    (write_msgpack({**halves(), "norm_bb": halves()["norm_bb"] * np.inf}), "norm_bb has numbers that are not finite"),
    (write_msgpack({**halves(), "features": np.full((4, 12), np.nan, np.float16)}), "features has numbers that are not finite"),
]


@pytest.mark.parametrize(("record", "message"), CORRUPT_MSGPACK)
def test_corrupt_msgpack_records_are_named(tmp_path: Path, record: bytes, message: str) -> None:
    write(tmp_path)
    name = next(iter(IMAGES))
    replace(tmp_path / "feat_th0.2_max6_min2", name, record)
    database = ImageDatabase(tmp_path, BoxRule(**RULE))
    with pytest.raises(InputError, match=message) as caught:
        database[name]
    assert f"feat_th0.2_max6_min2: image {name!r}: " in str(caught.value)
    database.close()
    assert "UNPICKLED" not in os.environ


@pytest.mark.parametrize(
    ("conf", "message"),
    [(None, "has no conf"), (np.ones((4, 1), np.float16), "conf has shape"), (np.ones(3, np.float16), "conf has shape")],
)
def test_filtering_on_reading_needs_confidences(tmp_path: Path, conf: np.ndarray | None, message: str) -> None:
    write(tmp_path, keep_all=True)
    name = next(iter(IMAGES))
    replace(tmp_path / "all", name, write_msgpack(without("conf") | ({} if conf is None else {"conf": conf})))
    database = ImageDatabase(tmp_path, BoxRule(**RULE))
    with pytest.raises(InputError, match=message):
        database[name]
    database.close()


def npz_of_headers(header: bytes, data: bytes, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """An archive whose features have the npy header given."""
    buffer = io.BytesIO(npz(**without("features")))
    with zipfile.ZipFile(buffer, "a", method) as archive:
        archive.writestr("features.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data)
    return buffer.getvalue()


def lying_size() -> bytes:
    """An archive in which the directory says features unpack to 200 bytes."""
    data = bytearray(npz(np.savez_compressed, **{**halves(), "features": np.zeros((4000, 1000), np.float16)}))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        size = archive.getinfo("features.npy").file_size
    start = data.rindex(struct.pack("<I", size))
    data[start : start + 4] = struct.pack("<I", 200)
    return bytes(data)


CORRUPT_NPZ = [
    (b"", "not an .npz"),
    (b"PK\x03\x04 and so on", "not an .npz"),
    (write_msgpack(halves()), "not an .npz"),
    (npz(**halves())[:-30], "not an .npz"),
    (npz(**{**halves(), "features": np.array([[Canary()]] * 4)}), "features: .*(never read|Object|object)"),
    (npz(**{**halves(), "features": np.zeros(4, [("a", "<f2")])}), "features: .*expected plain numbers"),
    (npz(np.savez_compressed, **{**halves(), "features": np.zeros((40 << 20, 1), np.float16)}), "takes 83,886,.* at most"),
    (npz_of_headers(b"{'descr': '<f2', 'fortran_order': False, 'shape': (99999999999, 12)}\n", b""), "features: holds 0 bytes"),
    (npz_of_headers(b"nonsense\n", b""), "features: "),
    (npz_of_headers(b"{'descr': '<f2', 'fortran_order': False, 'shape': (4, 12)}\n", bytes(90)), "features: holds 90 bytes"),
    (npz_of_headers(b"{}", b"", zipfile.ZIP_LZMA), "compressed in an unknown way"),
    (lying_size(), "features: "),
    (npz(**without("norm_bb")), "has no norm_bb"),
]


@pytest.mark.parametrize(("record", "message"), CORRUPT_NPZ)
def test_corrupt_npz_records_are_named(tmp_path: Path, record: bytes, message: str) -> None:
    write(tmp_path, compressed=True)
    name = next(iter(IMAGES))
    replace(tmp_path / "feat_th0.2_max6_min2_compressed", name, record)
    database = ImageDatabase(tmp_path, BoxRule(**RULE), compressed=True)
    with pytest.raises(InputError, match=message) as caught:
        database[name]
    assert f"feat_th0.2_max6_min2_compressed: image {name!r}: " in str(caught.value)
    database.close()
    assert "UNPICKLED" not in os.environ


def test_flipped_bytes_are_values_or_value_errors() -> None:
    """Whatever the bytes, a reader answers with arrays or with a ValueError, which the database turns into one line."""
    random = np.random.default_rng(5)
    arrays = halves()
    for read, record in ((read_msgpack, write_msgpack(arrays)), (read_npz, npz(np.savez_compressed, **arrays))):
        refused = 0
        for _ in range(1500):
            flipped = bytearray(record)
            for position in random.integers(0, len(record), random.integers(1, 4)):
                flipped[position] = random.integers(0, 256)
            try:
                read(bytes(flipped), ("features", "norm_bb", "conf"))
            except ValueError:
                refused += 1
        assert refused > 50


def test_arrays_outlive_the_database(tmp_path: Path) -> None:
    write(tmp_path)
    database = ImageDatabase(tmp_path, BoxRule(**RULE))
    name = next(iter(IMAGES))
    image = database[name]
    database.close()
    features, boxes = expected(name, BoxRule(**RULE))
    np.testing.assert_array_equal(image.features, features)
    np.testing.assert_array_equal(image.boxes, boxes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conf": np.array([0.5, np.nan, 1, 1], np.float32)}, "conf has numbers that are not finite"),
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


def put_twice(writer: ImageDatabaseWriter) -> None:
    writer.put("a.npz", **regions(3))
    writer.put("a.npz", **regions(3))


def test_writer_refuses_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"image 'a.npz' occurs twice"), ImageDatabaseWriter(tmp_path) as writer:
        put_twice(writer)
    with pytest.raises(InputError, match="there is no image"), ImageDatabaseWriter(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
    write(tmp_path)
    with pytest.raises(InputError, match=r"feat_th0.2_max6_min2: already exists"):
        write(tmp_path)
    before = (tmp_path / "nbb_th0.2_max6_min2.json").read_text()
    with (
        pytest.raises(InputError, match=r"belongs to feat_th0.2_max6_min2, which has other images"),
        ImageDatabaseWriter(tmp_path, BoxRule(**RULE), compressed=True) as writer,
    ):
        writer.put("other.npz", **regions(3))
    assert (tmp_path / "nbb_th0.2_max6_min2.json").read_text() == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"feat_th0.2_max6_min2", "nbb_th0.2_max6_min2.json"}


def test_count_follows_the_definition() -> None:
    rule = BoxRule(conf_th=0.3, max_bb=5, min_bb=2)
    half = np.float16(0.3)
    for conf, number in [
        ([0.9], 1),
        ([0.1, 0.1, 0.1], 2),
        ([0.9, 0.8, 0.7, 0.2], 3),
        ([0.9] * 9, 5),
        # A half that 0.3 rounds to is not above 0.3, though its exact value is.
        ([0.9, 0.9, half, half], 2),
    ]:
        assert rule.count(np.array(conf, np.float16)) == number


def test_the_worked_example_of_the_documentation(tmp_path: Path) -> None:
    box = np.array([[160 / 640, 60 / 480, 480 / 640, 240 / 480, 320 / 640, 180 / 480]], np.float32)
    with ImageDatabaseWriter(tmp_path) as writer:
        writer.put("a.npz", np.ones((1, 3), np.float32), box, np.ones(1, np.float32))
    database = ImageDatabase(tmp_path)
    numbers = database["a.npz"].boxes[0].tolist()
    database.close()
    row = "| " + " | ".join(f"{number:g}" for number in numbers) + " |"
    assert row in (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    assert numbers[6] == 0.1875
