"""The pictures of images, kept small beside the page."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from evaluation.plots.regions import read_picture
from utils.files import atomic_file

SIDE = 400  # pixels, at most


class Thumbnail(NamedTuple):
    """A small copy: its path from the page, and its size in pixels."""

    source: str
    width: int
    height: int


def save_thumbnails(pictures: dict[str, Path], page: Path) -> dict[str, Thumbnail]:
    """Write small copies of ``pictures`` (image → file) into a folder beside the page, whose folder is ``page``."""
    (page / "images").mkdir()
    thumbnails = {}
    for number, (name, path) in enumerate(sorted(pictures.items())):
        picture = read_picture(path)
        picture.thumbnail((SIDE, SIDE))
        source = f"images/{number}.jpg"  # an image's own name may mean something to a file system or in a URL
        with atomic_file(page / source) as file:
            picture.save(file, "JPEG", quality=82)
        thumbnails[name] = Thumbnail(source, *picture.size)
    return thumbnails
