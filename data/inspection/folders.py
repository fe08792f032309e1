"""Which databases a folder holds."""

from __future__ import annotations

import re
from pathlib import Path

from data.boxes import parse_layout
from data.image_db import contents_of
from data.inspection.texts import SIDECARS
from utils.errors import InputError


def is_text_database(path: Path) -> bool:
    """Whether a folder has any of the files that a text database has beside its records."""
    return any((path / name).is_file() for name in SIDECARS)


def lmdb_folders(path: Path) -> list[Path]:
    """The LMDB folders of an image database, or ``path`` itself if it is one; ``InputError`` when there is none."""
    if (path / "data.mdb").is_file():
        parse_layout(path.name)
        return [path]
    folders = []
    if path.is_dir():
        folders = sorted(
            entry for entry in path.iterdir() if entry.is_dir() and re.match(r"feat_|all(_compressed)?$", entry.name)
        )
    if not folders:
        raise InputError(f"{path}: neither a text database nor an image database; {contents_of(path)}")
    return folders
