"""Map picture file names to image names in a database, and find pictures by image name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from utils.errors import InputError, counted
from utils.files import short_repr

_PICTURES = r"\.(jpe?g|png|gif|bmp|webp|tiff?)"
# The endings that names have in annotations, in the ids of a detector's output, and among files of features.
_ENDING = re.compile(rf"({_PICTURES}|\.npz|\.npy)$", re.IGNORECASE)
_DATASETS = ("", "flickr30k", "coco")  # each names the features of a picture in its own way


def picture_stem(filename: str) -> str:
    """Return a picture's name without folders and ending."""
    return _ENDING.sub("", Path(filename).name)


def trailing_number(filename: str) -> int | None:
    """Return the number of at most 18 digits at the end of a picture's name, or None if there is none."""
    stem = picture_stem(filename)
    digits = stem[len(stem.rstrip("0123456789")) :]
    return int(digits) if 0 < len(digits) <= 18 else None


def feature_name(dataset: str, filename: str, folder: str = "") -> str:
    """Return the key of a picture in an image database: as published for Flickr30k and COCO, else the stem + ``.npz``.

    ``folder`` is COCO's ``train2014`` or ``val2014``, used if the file name has neither. Raises ``ValueError``.
    """
    stem, number = picture_stem(filename), trailing_number(filename)
    if not stem:
        raise ValueError(f"file name {short_repr(filename)} names no picture")
    if dataset == "flickr30k":
        if number is None:
            raise ValueError(f"file name {short_repr(filename)} has no number, expected one such as 1000092795.jpg")
        return f"flickr30k_{number:012d}.npz"
    if dataset == "coco":
        part = re.search(r"(train|val)2014", stem) or re.search(r"(train|val)2014", folder)
        if part is None or number is None:
            raise ValueError(
                f"file name {short_repr(filename)} is not COCO's, expected one such as COCO_val2014_000000391895.jpg"
            )
        return f"coco_{part[0]}_{number:012d}.npz"
    return f"{stem}.npz"


def find_pictures(folder: Path, names: Collection[str]) -> dict[str, Path]:
    """Find the pictures of the images ``names`` in ``folder`` and the folders below it; images without a picture are left out.

    Raises ``InputError`` if there is none at all, or if two pictures would be the same image.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected one with pictures")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        for name in _possible_names(path) if re.fullmatch(_PICTURES, path.suffix, re.IGNORECASE) else ():
            if name in names and found.setdefault(name, path) != path:
                raise InputError(
                    f"{found[name]} and {path}: both would be image {name!r}, expected one picture of each; rename one"
                )
    if not found:
        example = min(names)
        raise InputError(f"{folder}: no picture of any of {counted(len(names), 'image')} found; expected one for {example!r}")
    return found


def _possible_names(path: Path) -> Iterator[str]:
    """What image databases may call the features of a picture."""
    for dataset in _DATASETS:
        with suppress(ValueError):  # not a name of this data set
            yield feature_name(dataset, path.name, path.parent.name)
