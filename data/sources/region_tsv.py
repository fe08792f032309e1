"""TSV files with a row an image, as bottom-up-attention, py-bottom-up-attention (airsplay) and VinVL write them.

| columns | of |
|---|---|
| ``image_id image_w image_h num_boxes boxes features`` | bottom-up-attention; no confidences |
| ``img_id img_h img_w objects_id objects_conf attrs_id attrs_conf num_boxes boxes features`` | py-bottom-up-attention |
| ``key {"objects": [{"rect", "conf", "feature"}, …]}`` | VinVL; the pictures' sizes are in another TSV |

Boxes are in pixels; arrays are the base64 of little-endian numbers of 32 bits (``objects_id`` and ``attrs_id``, of 64, are not
looked at).
"""

from __future__ import annotations

import base64
import binascii
import codecs
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.sources.region_source import Arrays, Source, as_shares
from utils.errors import InputError
from utils.files import short_repr

MAX_ROW_BYTES = 16 << 20  # a hundred boxes of 2,048 numbers take 1.1 MB

Sizes = dict[str, tuple[int, int]]

_BUTD = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")
_AIRSPLAY = (
    "img_id", "img_h", "img_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf", "num_boxes", "boxes", "features",
)  # fmt: skip
_VINVL = ("key", "objects")
KINDS = {len(columns): columns for columns in (_BUTD, _AIRSPLAY, _VINVL)}


def kind_of(path: Path) -> tuple[str, ...]:
    """The columns of a TSV, by the number of them in its first row. Raises ``InputError``."""
    with _open(path) as file:
        columns = file.readline(MAX_ROW_BYTES).count(b"\t") + 1
    if columns not in KINDS:
        raise InputError(f"{path}: its first row has {columns} columns, expected {' or '.join(map(str, sorted(KINDS)))}")
    return KINDS[columns]


def has_confidences(kind: tuple[str, ...]) -> bool:
    """Whether rows of this kind say how sure the detector was."""
    return kind != _BUTD


def is_vinvl(kind: tuple[str, ...]) -> bool:
    """Whether rows are VinVL's, which need the pictures' sizes."""
    return kind == _VINVL


def sources_of(path: Path, kind: tuple[str, ...], sizes: Sizes) -> Iterator[Source]:
    """The images of a TSV, row by row; a file is never held as a whole. Raises ``InputError`` when it cannot be read."""
    for number, row in _rows(path):
        name = row[: row.find(b"\t")].decode("utf-8", "replace") if b"\t" in row else ""
        yield Source(name, f"{path} row {number} ({short_repr(name)})", partial(load_row, row, kind, sizes.get(name)))


def _rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """Rows that are not empty, with their numbers from 1; of one that is too long, so much that this can be seen."""
    with _open(path) as file:
        number = 0
        try:
            while row := file.readline(MAX_ROW_BYTES + 1):
                number += 1
                rest = row
                while len(rest) > MAX_ROW_BYTES and not rest.endswith(b"\n"):
                    rest = file.readline(MAX_ROW_BYTES + 1)
                if row.strip():
                    yield number, row.removeprefix(codecs.BOM_UTF8) if number == 1 else row
        except OSError as error:
            raise InputError(f"{path}: cannot be read after row {number} ({error.strerror})") from error


def _open(path: Path) -> BinaryIO:
    if path.exists() and not path.is_file():  # a pipe can be read once only, and its first row is looked at before
        raise InputError(f"{path}: is not a regular file")
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def load_row(row: bytes, kind: tuple[str, ...], size: tuple[int, int] | None) -> Arrays:
    """One image of a TSV; ``size``, width and height in pixels, of those rows that do not say it."""
    if len(row) > MAX_ROW_BYTES:
        raise ValueError(f"is longer than {MAX_ROW_BYTES:,} bytes")
    values = row.rstrip(b"\r\n").split(b"\t")
    if len(values) != len(kind):
        raise ValueError(f"has {len(values)} columns, the first row has {len(kind)}")
    fields = dict(zip(kind, values, strict=True))
    return _from_vinvl(fields["objects"], size) if is_vinvl(kind) else _from_butd(fields)


def _from_butd(fields: dict[str, bytes]) -> Arrays:
    count = _whole(fields, "num_boxes")
    picture = "image" if "image_w" in fields else "img"
    width, height = _whole(fields, f"{picture}_w"), _whole(fields, f"{picture}_h")
    arrays = {"features": _floats(fields, "features", (count, -1))}
    if "objects_conf" in fields:
        arrays["conf"] = _floats(fields, "objects_conf", (count,))
    return {**arrays, "norm_bb": as_shares(_floats(fields, "boxes", (count, 4)), width, height)}


def _whole(fields: dict[str, bytes], name: str) -> int:
    try:
        number = float(fields[name])  # some writers put 640.0
    except ValueError:
        number = 0.0
    if not (number.is_integer() and 1 <= number < 2**31):
        raise ValueError(f"{name} is {short_repr(fields[name].decode('utf-8', 'replace'))}, expected a whole number above 0")
    return int(number)


def _floats(fields: dict[str, Any], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers in base64 of field ``name``."""
    try:
        data = base64.b64decode(fields[name], validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise ValueError(f"{name}: is not base64 ({error})") from error
    try:
        return np.frombuffer(data, "<f4").reshape(shape)
    except ValueError as error:
        expected = " x ".join("D" if size == -1 else f"{size}" for size in shape)
        raise ValueError(f"{name}: holds {len(data):,} bytes, expected {expected} numbers of 4") from error


def _from_vinvl(text: bytes, size: tuple[int, int] | None) -> Arrays:
    try:
        contents = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its second column is not JSON ({error})") from error
    objects = contents.get("objects") if isinstance(contents, dict) else contents
    if not isinstance(objects, list) or not objects:
        raise ValueError("has no list of objects")
    if size is None:
        raise ValueError("its picture's size is not in the file of --sizes")
    for number, found in enumerate(objects):
        if not isinstance(found, dict) or not {"rect", "conf", "feature"} <= set(found):
            raise ValueError(f"object {number}: has no rect, conf and feature")
    try:
        boxes, conf = (np.array([found[name] for found in objects], np.float64) for name in ("rect", "conf"))
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"a rect or conf is not made of numbers ({error})") from error
    features = [_floats(found, "feature", (-1,)) for found in objects]
    if len({len(feature) for feature in features}) != 1:
        raise ValueError("its objects' features are of several lengths")
    return {"features": np.stack(features), "conf": conf, "norm_bb": as_shares(boxes, *size)}


def read_sizes(path: Path) -> Sizes:
    """Width and height of pictures from VinVL's ``hw.tsv``: key, tab, ``[{"height": 480, "width": 640}]`` or ``480 640``."""
    sizes: Sizes = {}
    for number, row in _rows(path):
        key, tab, text = row.partition(b"\t")
        try:
            if match := re.fullmatch(rb"\s*(\d{1,9})\s+(\d{1,9})\s*", text):
                height, width = map(int, match.groups())
            else:
                value = json.loads(text) if tab else None
                (value,) = value if isinstance(value, list) else (value,)
                width, height = value["width"], value["height"]
            if not all(type(side) is int and side > 0 for side in (width, height)):
                raise ValueError
            sizes[key.decode()] = (width, height)
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise InputError(f'{path} row {number}: expected key, tab, [{{"height": 480, "width": 640}}] or 480 640') from error
    return sizes
