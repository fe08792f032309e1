"""How an image database calls the images of a detector's output."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

from scripts.annotations import all_captions, feature_name, picture_stem, read_annotations

Naming = Callable[[str], str]  # from what the detector's output calls an image; raises ``ValueError``


def naming(prefix: str | None, annotations: Path | None) -> Naming:
    """By annotations' pictures, by ``prefix`` and the id's number, or with neither by the id itself.

    Raises ``InputError`` for annotations that cannot be read.
    """
    if annotations is not None:
        return _as_annotated(annotations)
    return partial(feature_name, "") if prefix is None else partial(_numbered, prefix)


def _number(stem: str) -> int | None:
    digits = re.search(r"(\d+)$", stem)
    return int(digits[1][-18:]) if digits else None


def _numbered(prefix: str, image_id: str) -> str:
    number = _number(picture_stem(image_id))
    if number is None:
        raise ValueError(f"its id {image_id!r} has no number, which --prefix needs")
    return f"{prefix}{number:012d}.npz"


def _as_annotated(annotations: Path) -> Naming:
    by_stem: dict[str, str] = {}
    by_number: dict[int | None, set[str]] = defaultdict(set)
    for caption in all_captions(annotations, read_annotations(annotations)):
        stem = picture_stem(caption.filename)
        by_stem[stem] = caption.image
        by_number[_number(stem)].add(caption.image)

    def name(image_id: str) -> str:
        stem = picture_stem(image_id)
        number = _number(stem)
        found = {by_stem[stem]} if stem in by_stem else by_number.get(number, set()) if number is not None else set()
        if len(found) != 1:
            raise ValueError(f"{annotations.name} names {'several such pictures' if found else 'no such picture'}")
        return next(iter(found))

    return name
