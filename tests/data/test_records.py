"""Records of images: both formats as other programs write them, and refusal of everything unsafe or wrong."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import msgpack
import msgpack_numpy
import numpy as np
import pytest

from data.image_db import Image, ImageDatabase
from data.lmdb_store import LmdbWriter
from data.records import write_msgpack
from tests.data.test_image_db import COUNTS, FOLDER, NAME, RULE, regions
from utils.errors import InputError

HALVES = {name: array.astype(np.float16) for name, array in regions(4, 3).items()}
BY_COLUMN = {name: np.asfortranarray(array) for name, array in HALVES.items()}


def read_record(path: Path, record: bytes, *, compressed: bool = False, filtered: bool = True) -> Image:
    """Read a record of any kind as the one image of a database."""
    with LmdbWriter(path / ((FOLDER if filtered else "all") + compressed * "_compressed")) as writer:
        writer.put(NAME, record)
    (path / COUNTS).write_text(json.dumps({NAME: 4}))
    return ImageDatabase(path, RULE, compressed=compressed)[NAME]


def npz(save: Any = np.savez, **arrays: Any) -> bytes:
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "record",
    [
        msgpack_numpy.packb(HALVES),
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
    image = read_record(tmp_path, record, compressed=record.startswith(b"PK"))
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


class Canary:
    """Unpickling it leaves a trace."""

    def __reduce__(self) -> Any:
        return (os.putenv, ("UNPICKLED", "1"))


OBJECTS = np.array([[Canary()]] * 4)
CORRUPT_MSGPACK = [
    (b"", "not a msgpack record"),
    (b"\xc1", "not a msgpack record"),
    (altered()[:-10], "not a msgpack record"),
    (altered() + b"x", "not a msgpack record"),
    (b"\x91" * 5000, "not a msgpack record"),
    (b"\x81\x80\x01", "not a msgpack record"),
    (npz(**HALVES), "is a msgpack int|not a msgpack record"),
    (msgpack.packb([1]), "expected a map"),
    (msgpack.packb({"features": 1}), "features: is not an array"),
    (msgpack_numpy.packb({**HALVES, "features": OBJECTS}), "features: .*would need pickle"),
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


def npz_with_false_size() -> bytes:
    """An archive whose directory says that features unpack to 200 bytes."""
    data = bytearray(npz(np.savez_compressed, **{**HALVES, "features": np.zeros((4000, 1000), np.float16)}))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        size = archive.getinfo("features.npy").file_size
    start = data.rindex(struct.pack("<I", size))
    data[start : start + 4] = struct.pack("<I", 200)
    return bytes(data)


HEADER = b"{'descr': '<f2', 'fortran_order': False, 'shape': (%d, 12)}\n"
CORRUPT_NPZ = [
    (b"", "not an .npz"),
    (b"PK\x03\x04 and so on", "not an .npz"),
    (altered(), "not an .npz"),
    (npz(**HALVES)[:-30], "not an .npz"),
    (npz(**{**HALVES, "features": OBJECTS}), "features: .*(never read|Object|object)"),
    (npz(**{**HALVES, "features": np.zeros(4, [("a", "<f2")])}), "features: .*expected plain numbers"),
    (npz(np.savez_compressed, **{**HALVES, "features": np.zeros((40 << 20, 1), np.float16)}), "takes 83,886,.* at most"),
    (npz_with_header(HEADER % 99999999999, b""), "features: holds 0 bytes"),
    (npz_with_header(b"nonsense\n", b""), "features: "),
    (npz_with_header(HEADER % 4, bytes(90)), "features: holds 90 bytes"),
    (npz_with_header(b"{}", b"", zipfile.ZIP_LZMA), "compressed in an unknown way"),
    (npz_with_false_size(), "features: "),
    (npz(**without("norm_bb")), "has no norm_bb"),
]


@pytest.mark.parametrize(
    ("compressed", "record", "message"),
    [(False, *case) for case in CORRUPT_MSGPACK] + [(True, *case) for case in CORRUPT_NPZ],
)
def test_corrupt_records_are_named(tmp_path: Path, compressed: bool, record: bytes, message: str) -> None:
    with pytest.raises(InputError, match=f"{FOLDER}{compressed * '_compressed'}: image '{NAME}': .*({message})"):
        read_record(tmp_path, record, compressed=compressed)
    assert "UNPICKLED" not in os.environ


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (write_msgpack(without("conf")), "has no conf"),
        (altered(conf=np.ones((4, 1), np.float16)), "conf has shape"),
        (altered(conf=np.ones(3, np.float16)), "conf has shape"),
    ],
)
def test_filtering_on_reading_needs_confidences(tmp_path: Path, record: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_record(tmp_path, record, filtered=False)
