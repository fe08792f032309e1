"""How an image database calls the images of a detector's output."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

from data.picture_names import feature_name, picture_stem, trailing_number
from data.sources.captions import all_captions, read_annotations
from utils.files import short_repr

Naming = Callable[[str], str]  # from what the detector's output calls an image; raises ``ValueError``


def naming(prefix: str | None, annotations: Path | None) -> Naming:
    """By annotations' pictures, by ``prefix`` and the id's number, or with neither by the id itself.

    Raises ``InputError`` for annotations that cannot be read.
    """
    if annotations is not None:
        return _as_annotated(annotations)
    return partial(feature_name, "") if prefix is None else partial(_numbered, prefix)


def _numbered(prefix: str, image_id: str) -> str:
    number = trailing_number(image_id)
    if number is None:
        raise ValueError(f"its id {short_repr(image_id)} has no number, which --prefix needs")
    return f"{prefix}{number:012d}.npz"


def _as_annotated(annotations: Path) -> Naming:
    by_stem: dict[str, set[str]] = defaultdict(set)
    by_number: dict[int | None, set[str]] = defaultdict(set)
    for caption in all_captions(annotations, read_annotations(annotations)):
        by_stem[picture_stem(caption.filename)].add(caption.image)
        by_number[trailing_number(caption.filename)].add(caption.image)

    def name(image_id: str) -> str:
        stem = picture_stem(image_id)
        found = by_stem.get(stem, set())
        # Of bare numbers only: cat_1 must not become dog_1.
        if not found and stem.isascii() and stem.isdecimal():
            found = by_number.get(trailing_number(stem), set())
        if len(found) != 1:
            raise ValueError(f"{annotations.name} names {'several such pictures' if found else 'no such picture'}")
        return next(iter(found))

    return name
