"""What the files of a database must hold: its readers, its writers and ``inspect_db`` share these checks.

Shapes: K boxes per image.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.errors import InputError, counted
from utils.files import read_object, short_repr

# The largest rounding error of a number up to 1 in half precision, and of x2 - x1 - w when all three are rounded.
HALF_STEP = float(np.finfo(np.float16).eps)
_DIMENSIONS = {"features": 2, "norm_bb": 2, "conf": 1}


class Expected(NamedTuple):
    """What every value of a JSON object is, in words and as a predicate."""

    meaning: str
    fits: Callable[[Any], bool]


def is_text_list(value: Any) -> bool:
    """Whether a value from JSON or msgpack is a list of strings."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


LENGTHS = Expected("a number of word pieces", lambda value: type(value) is int and 0 <= value < 2**31)
BOX_COUNTS = Expected("a number of boxes", lambda value: type(value) is int and value >= 1)
IMAGE_NAMES = Expected("the name of an image", lambda value: isinstance(value, str))
TEXT_IDS = Expected("a list of text ids", is_text_list)


def read_map(file: Path | str, expected: Expected) -> dict[str, Any]:
    """Read a JSON object. Raises ``InputError`` for anything else and for a value that is not what is ``expected``."""
    contents = read_object(file)
    for key, value in contents.items():
        if not expected.fits(value):
            raise InputError(f"{file}: {short_repr(key)} has {short_repr(value)}, expected {expected.meaning}")
    return contents


def vocabulary_faults(meta: Mapping[str, Any], special: Collection[str]) -> Iterator[str]:
    """Yield what is wrong with the vocabulary of a ``meta.json``, which must have an id for each of the ``special`` tokens."""
    size, v_range = 2**63, meta.get("v_range")
    if isinstance(v_range, list) and len(v_range) == 2 and all(type(n) is int for n in v_range) and v_range[1] > 0:
        size = v_range[1]
    else:
        yield f"v_range is {short_repr(v_range)}, expected [first ordinary word piece, size of the vocabulary]"
    for token in special:
        if type(meta.get(token)) is not int or not 0 <= meta[token] < size:
            yield f"{token} is {short_repr(meta.get(token))}, expected a word-piece id from 0 to {size - 1}"


def check_vocabularies(
    metas: Mapping[Any, Mapping[str, Any]], checkpoint: str | Path | None = None, train_config: str | Path | None = None
) -> None:
    """Raise ``InputError`` if the ``meta.json`` of some sources, or of the training of a model, differ in vocabulary.

    The training is that of ``checkpoint`` if its log is still there, and that of ``train_config``, its ``log/hps.json``. Names
    are compared only if a checksum is missing.
    """
    logs = [Path(checkpoint).absolute().parent.parent / "log"] if checkpoint else []
    logs += [Path(train_config).absolute().parent] if train_config else []
    files = [log / "vocabulary.json" for log in logs]
    known: dict[Any, Mapping[str, Any]] = {file: read_object(file) for file in files if file.exists()}
    for (origin, first), (source, meta) in combinations((known | dict(metas)).items(), 2):
        shared = meta.keys() & first.keys()
        contents = "vocab_sha256" if "vocab_sha256" in shared else "toker"
        for key in ("CLS", "SEP", "MASK", "UNK", contents):
            if key in shared and meta[key] != first[key]:
                wrong = f"{key} is {short_repr(meta[key])}, in {origin} it is {short_repr(first[key])}"
                raise InputError(f"{source}: {wrong}; expected the same vocabulary")


def take_text(fields: dict[str, Any], vocab_size: int) -> tuple[np.ndarray, Any]:
    """Remove ``input_ids``, as int64 [words], and ``img_fname`` from the map of a text. Raises ``ValueError`` if malformed."""
    ids = fields.pop("input_ids", None)
    if not isinstance(ids, list) or not ids or not all(type(number) is int for number in ids):
        raise ValueError("input_ids is missing, empty or not a list of integers")
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise ValueError(f"word piece {wrong} is outside the vocabulary of {vocab_size}")
    image = fields.pop("img_fname", None)
    return np.array(ids, dtype=np.int64), image.decode() if isinstance(image, bytes) else image


def check_regions(arrays: Mapping[str, np.ndarray], required: Collection[str] = ("features", "norm_bb")) -> None:
    """Raise ``ValueError`` unless the arrays are floating-point, finite and of one row per box, with at least one box.

    ``features`` [K, D] and ``norm_bb`` [K, 6] must be there, like all that are ``required``; ``conf`` is [K].
    """
    for name in required:
        if name not in arrays:
            raise ValueError(f"has no {name}")
    rows = arrays["features"].shape[:1]
    for name, array in arrays.items():
        dimensions = _DIMENSIONS.get(name, array.ndim)
        if array.dtype.kind != "f":
            raise ValueError(f"{name} has type {array.dtype}, expected floating-point numbers")
        if array.ndim != dimensions or 0 in array.shape:
            raise ValueError(f"{name} has shape {list(array.shape)}, expected {counted(dimensions, 'dimension')}, none of 0")
        if array.shape[:1] != rows:
            raise ValueError(f"{name} has shape {list(array.shape)}, features has {counted(rows[0], 'row')}")
        if not all_finite(array):
            raise ValueError(f"{name} has numbers that are not finite")
    if arrays["norm_bb"].shape[1] != 6:
        raise ValueError(f"norm_bb has {counted(arrays['norm_bb'].shape[1], 'column')}, expected 6: x1 y1 x2 y2 w h")


def wrong_sizes(norm_bb: np.ndarray) -> np.ndarray:
    """Return which boxes ``x1 y1 x2 y2 w h`` (K, 6) have other w h than x2 - x1 and y2 - y1, beyond half precision: (K,)."""
    return (np.abs(norm_bb[:, 2:4] - norm_bb[:, :2] - norm_bb[:, 4:]) > HALF_STEP).any(axis=1)


def all_finite(array: np.ndarray) -> bool:
    """Whether a floating-point array has neither NaN nor infinity."""
    if array.dtype == np.float16:
        # Both have all bits of the exponent set; twelve times as fast as NumPy's own test of float16.
        return not ((array.view(np.uint16) & 0x7C00) == 0x7C00).any()
    return bool(np.isfinite(array).all())
