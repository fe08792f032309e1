"""Files that the user has already."""

from __future__ import annotations

import os
from pathlib import Path

from scripts.download.checksums import CHECKSUMS, parse_checksums
from scripts.download.partial import BLOCK, Partial
from scripts.download.work import Work
from utils.errors import InputError


class LocalFolder:
    """Files laid out like the published tree, or all in one folder; a source as ``Mirror`` is."""

    def __init__(self, folder: Path, work: Work) -> None:
        """Raises ``InputError`` when there is no such folder, or its list of checksums is none."""
        try:
            os.scandir(folder).close()
        except OSError as error:
            raise InputError(f"--from {folder}: cannot be read ({error.strerror}), expected a folder") from error
        self._folder = folder
        self._work = work
        listed = folder / CHECKSUMS
        self._checksums = parse_checksums(str(listed), listed.read_bytes()) if listed.is_file() else {}

    def has(self, path: str) -> bool:
        """Whether a file of the published tree is there."""
        return self._place(path).is_file()

    def name(self, path: str) -> str:
        return str(self._place(path))

    def size(self, path: str) -> int:
        return self._place(path).stat().st_size

    def already(self, path: str, partial: Partial) -> int:
        """How many bytes of a file take no more room: all where it can be linked."""
        file = self._place(path).stat()
        return file.st_size if file.st_dev == partial.device else 0

    def checksum(self, path: str) -> str | None:
        return self._checksums.get(path) or self._checksums.get(Path(path).name)

    def fetch(self, path: str, partial: Partial) -> None:
        """Hard-link a file, or copy it where that cannot be done."""
        file = self._place(path).resolve()  # not a symbolic link to it
        partial.discard()
        try:
            os.link(file, partial.path)
        except OSError:
            with open(file, "rb") as original, open(partial.path, "xb") as copy:
                while block := original.read(BLOCK):
                    copy.write(block)
                    self._work.advance(len(block))

    def _place(self, path: str) -> Path:
        nested, flat = self._folder / path, self._folder / Path(path).name
        return flat if flat.is_file() and not nested.is_file() else nested
