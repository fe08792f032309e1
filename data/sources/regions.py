"""Convert the output of any region detector into an image database; ``region_files`` and ``region_tsv`` read the formats.

Legend: K boxes per image, D features per box.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.boxes import Layout
from data.checks import wrong_sizes
from data.image_db import ImageDatabaseWriter, encode_image
from data.lmdb_store import check_name
from data.picture_names import feature_name, picture_stem, trailing_number
from data.sources.captions import all_captions
from utils.files import short_repr
from utils.parallel import in_order

_TOLERANCE = 1.0  # pixels by which a box may leave its image: some detectors number the last column w, others w - 1

Arrays = dict[str, np.ndarray]
Naming = Callable[[str], str]  # from an image's id in the detector's output to its name in the database; raises ValueError


@dataclass(frozen=True)
class Source:
    """One image of a detector's output.

    Attributes:
        id: what the detector's output calls it.
        place: file and row, for messages.
        load: returns features (K, D), norm_bb (K, 6) and, if the detector wrote them, conf (K,) and soft_labels (K, classes);
            called in a worker. Raises ``ValueError`` or ``OSError``.
    """

    id: str
    place: str
    load: Callable[[], Arrays]


def _encode(layout: Layout, named: tuple[str, Source]) -> tuple[str, str, tuple[bytes, int, int] | str]:
    """Name and place of an image, and its record with the numbers of boxes and of features per box, or why there is none."""
    name, source = named
    try:
        check_name(name)
        arrays = source.load()
        record, boxes = encode_image(**arrays, rule=layout.rule, compressed=layout.compressed)
        return name, source.place, (record, boxes, arrays["features"].shape[1])
    except (ValueError, OSError) as error:
        return name, source.place, str(error).removeprefix(f"{source.place}: ")


@dataclass
class Conversion:
    """How many images and boxes have been written, and place and reason of each image that could not be used."""

    images: int = 0
    boxes: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)

    def run(
        self, sources: Iterable[Source], name_of: Naming, database: ImageDatabaseWriter, nproc: int, total: int | None
    ) -> None:
        """Encode the images, ``total`` of them if known, in ``nproc`` worker processes and write them in their order."""
        width = None
        results = in_order(partial(_encode, database.layout), self._named(sources, name_of), nproc)
        for name, place, encoded in tqdm(results, total=total, desc=database.path.name, unit=" images", disable=None):
            if isinstance(encoded, str):
                self.failures.append((place, encoded))
                continue
            record, boxes, features = encoded
            width = width or features
            if name in database:
                self.failures.append((place, f"image {short_repr(name)} occurs twice; the first one is kept"))
            elif features != width:
                self.failures.append((place, f"has {features} features per box, expected {width} as in the first image"))
            else:
                database.put_encoded(name, record, boxes)
                self.images, self.boxes = self.images + 1, self.boxes + boxes

    def _named(self, sources: Iterable[Source], name_of: Naming) -> Iterator[tuple[str, Source]]:
        for source in sources:
            try:
                yield name_of(source.id), source
            except ValueError as error:
                self.failures.append((source.place, str(error)))


def naming(prefix: str | None, annotations: Path | None) -> Naming:
    """Name images as the text databases of ``annotations`` do, by ``prefix`` and number, or by default after their ids.

    Raises ``InputError`` for annotations that cannot be read.
    """
    if annotations is None:
        return partial(feature_name, "") if prefix is None else partial(_numbered, prefix)
    images_of: dict[str | int | None, set[str]] = defaultdict(set)
    for caption in all_captions(annotations):
        for key in (picture_stem(caption.filename), trailing_number(caption.filename)):
            images_of[key].add(caption.image)

    def name(image_id: str) -> str:
        stem = picture_stem(image_id)
        # Only an id that is nothing but a number may match by number: cat_1 must not become dog_1.
        number = trailing_number(stem) if stem.isascii() and stem.isdecimal() else None
        key = number if number is not None and stem not in images_of else stem
        if len(images_of.get(key, ())) != 1:
            wrong = "several such pictures" if key in images_of else "no such picture"
            raise ValueError(f"{annotations.name} names {wrong}")
        return next(iter(images_of[key]))

    return name


def _numbered(prefix: str, image_id: str) -> str:
    number = trailing_number(image_id)
    if number is None:
        raise ValueError(f"its id {short_repr(image_id)} has no number, which --prefix needs")
    return f"{prefix}{number:012d}.npz"


def _pixels(side: Any) -> float:
    """A side that a detector's file states; NaN for anything that is not a number."""
    value = side.item() if isinstance(side, np.ndarray) and side.size == 1 else side
    try:
        return float(value) if isinstance(value, (int, float)) else np.nan
    except OverflowError:
        return np.nan


def normalise_boxes(boxes: np.ndarray, width: Any, height: Any) -> np.ndarray:
    """Divide boxes ``x1 y1 x2 y2`` (K, 4) in pixels by the image's sides and append ``w h``: (K, 6) from 0 to 1.

    Raises ``ValueError`` for an image without a size and for a box that leaves it or has its corners swapped.
    """
    size = np.array([_pixels(width), _pixels(height)])
    if not (np.isfinite(size) & (size > 0)).all():
        raise ValueError(f"the picture is {short_repr(width)} wide and {short_repr(height)} high, expected numbers of pixels")
    if boxes.ndim != 2 or boxes.shape[1] != 4 or boxes.dtype.kind not in "fiu":
        raise ValueError(f"boxes have shape {list(boxes.shape)} and type {boxes.dtype}, expected numbers x1 y1 x2 y2 per box")
    corners = boxes.astype(np.float64).reshape(-1, 2, 2)  # (boxes, corners, axes)
    inside = ((corners >= -_TOLERANCE) & (corners <= size + _TOLERANCE)).all(axis=(1, 2))
    sound = inside & (corners[:, 0] <= corners[:, 1]).all(axis=1)
    if not sound.all():
        number = int(sound.argmin())
        wrong = "has x2 < x1 or y2 < y1 in" if (corners[number, 0] > corners[number, 1]).any() else "leaves"
        picture = f"the picture, which is {size[0]:g} wide and {size[1]:g} high"
        raise ValueError(f"box {number}, {boxes[number].tolist()}, {wrong} {picture}")
    normalised = (corners / size).clip(0, 1)
    return np.concatenate([normalised.reshape(-1, 4), normalised[:, 1] - normalised[:, 0]], axis=1)


def check_normalised(norm_bb: np.ndarray) -> None:
    """Raise ``ValueError`` unless boxes ``x1 y1 x2 y2 w h`` (K, 6) lie between 0 and 1, with a tolerance of 0.01."""
    corners = norm_bb[:, :4]
    sound = ((corners > -0.01) & (corners < 1.01)).all(axis=1) & (corners[:, :2] <= corners[:, 2:4]).all(axis=1)
    if not sound.all():
        number = int(sound.argmin())
        raise ValueError(f"box {number} is {corners[number].tolist()}, expected x1 <= x2 and y1 <= y2 from 0 to 1")
    stored = norm_bb.astype(np.float16).astype(np.float32)  # as inspect_db will see them
    if (wrong := wrong_sizes(stored)).any():
        number = int(wrong.argmax())
        raise ValueError(f"box {number} is {norm_bb[number].tolist()}, columns 5 and 6 must be x2 - x1 and y2 - y1")
