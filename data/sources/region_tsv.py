"""Read TSV files with one image per row, as bottom-up-attention, py-bottom-up-attention (airsplay) and VinVL write them.

| columns | written by |
|---|---|
| ``image_id image_w image_h num_boxes boxes features`` | bottom-up-attention; has no confidences |
| ``img_id img_h img_w objects_id objects_conf attrs_id attrs_conf num_boxes boxes features`` | py-bottom-up-attention |
| ``key {"objects": [{"rect", "conf", "feature"}, …]}`` | VinVL; image sizes are in another TSV |

Boxes are in pixels. Arrays are base64 of little-endian 32-bit floats, except ``objects_id`` and ``attrs_id``, not read here.
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
from typing import Any

import numpy as np

from data.sources.regions import Arrays, Source, normalise_boxes
from utils.errors import InputError, counted
from utils.files import reading, short_repr

MAX_ROW_BYTES = 16 << 20  # 100 boxes of 2,048 features take 1.1 MB

BUTD = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")
AIRSPLAY = (
    "img_id", "img_h", "img_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf", "num_boxes", "boxes", "features",
)  # fmt: skip
VINVL = ("key", "objects")
KINDS = {len(columns): columns for columns in (BUTD, AIRSPLAY, VINVL)}

Sizes = dict[str, tuple[int, int]]  # width and height of each image in pixels


def kind_of(path: Path) -> tuple[str, ...]:
    """The columns of a TSV, recognised by their number in the first row. Raises ``InputError``."""
    _, first = next(_rows(path), (0, b""))
    if not first:
        raise InputError(f"{path}: has no row, expected one per image")
    if (columns := first.count(b"\t") + 1) not in KINDS:
        expected = " or ".join(map(str, sorted(KINDS)))
        raise InputError(f"{path}: its first row has {counted(columns, 'column')}, expected {expected}, separated by tabs")
    return KINDS[columns]


def sources_of(path: Path, kind: tuple[str, ...], sizes: Sizes) -> Iterator[Source]:
    """The images of a TSV, read row by row. Raises ``InputError`` if it cannot be read."""
    for number, row in _rows(path):
        name = row[: row.find(b"\t")].decode("utf-8", "replace") if b"\t" in row else ""
        yield Source(name, f"{path} row {number} ({short_repr(name)})", partial(load_row, row, kind, sizes.get(name)))


def _rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """Rows that are not empty, numbered from 1; of a row that is too long only the beginning, which load_row refuses."""
    with reading(path) as file:
        number = 0
        while row := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            rest = row
            while len(rest) > MAX_ROW_BYTES and not rest.endswith(b"\n"):
                rest = file.readline(MAX_ROW_BYTES + 1)
            if row.strip():
                yield number, row.removeprefix(codecs.BOM_UTF8) if number == 1 else row


def load_row(row: bytes, kind: tuple[str, ...], size: tuple[int, int] | None) -> Arrays:
    """Read one image; ``size`` is its width and height in pixels, which VinVL's rows lack. Raises ``ValueError``."""
    if len(row) > MAX_ROW_BYTES:
        raise ValueError(f"is longer than {MAX_ROW_BYTES:,} bytes")
    values = row.rstrip(b"\r\n").split(b"\t")
    if len(values) != len(kind):
        raise ValueError(f"has {counted(len(values), 'column')}, expected {len(kind)} as in the first row")
    fields = dict(zip(kind, values, strict=True))
    return _from_vinvl(fields["objects"], size) if kind == VINVL else _from_butd(fields)


def _from_butd(fields: dict[str, bytes]) -> Arrays:
    """A row of bottom-up-attention or, with confidences, of py-bottom-up-attention."""
    count = _whole(fields, "num_boxes")
    width, height = (_whole(fields, f"{'image' if 'image_w' in fields else 'img'}_{side}") for side in "wh")
    arrays = {"features": _floats(fields, "features", (count, -1))}
    if "objects_conf" in fields:
        arrays["conf"] = _floats(fields, "objects_conf", (count,))
    return {**arrays, "norm_bb": normalise_boxes(_floats(fields, "boxes", (count, 4)), width, height)}


def _whole(fields: dict[str, bytes], name: str) -> int:
    try:
        number = float(fields[name])  # some writers put 640.0
    except ValueError:
        number = 0.0
    if not (number.is_integer() and 1 <= number < 2**31):
        raise ValueError(f"{name} is {short_repr(fields[name].decode('utf-8', 'replace'))}, expected a whole number above 0")
    return int(number)


def _floats(fields: dict[str, Any], name: str, shape: tuple[int, ...]) -> np.ndarray:
    try:
        data = base64.b64decode(fields[name], validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise ValueError(f"{name}: is not base64 ({error})") from error
    try:
        return np.frombuffer(data, "<f4").reshape(shape)
    except ValueError as error:
        expected = " x ".join("D" if size == -1 else f"{size}" for size in shape)
        raise ValueError(f"{name}: has {counted(len(data), 'byte')}, expected {expected} numbers of 4 bytes") from error


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
        raise ValueError("its objects' features have different lengths")
    return {"features": np.stack(features), "conf": conf, "norm_bb": normalise_boxes(boxes, *size)}


def read_sizes(path: Path) -> Sizes:
    """Read VinVL's ``hw.tsv``: key, tab, ``[{"height": 480, "width": 640}]`` or ``480 640``. Raises ``InputError``."""
    sizes: Sizes = {}
    for number, row in _rows(path):
        key, _, text = row.partition(b"\t")
        try:
            if match := re.fullmatch(rb"\s*(\d{1,9})\s+(\d{1,9})\s*", text):
                height, width = map(int, match.groups())
            else:
                value: Any = json.loads(text)
                (value,) = value if isinstance(value, list) else (value,)
                width, height = value["width"], value["height"]
            if not all(type(side) is int and side > 0 for side in (width, height)):
                raise ValueError
            sizes[key.decode()] = (width, height)
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise InputError(f'{path} row {number}: expected key, tab, [{{"height": 480, "width": 640}}] or 480 640') from error
    return sizes
