"""A file on its way, hidden beside the place where it will be."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

BLOCK = 1 << 20  # bytes read at a time; between two, a thread looks whether it is to end


@dataclass(frozen=True)
class Version:
    """What tells one version of a file on a server from another: its size, and its strong ETag or its date (or "")."""

    size: int
    validator: str


class Partial:
    """What has been got of the file ``final``: ``.<name>.partial``, and what the server said of it in a note beside that.

    Without a note nothing is ever added to the file, which may be a hard link to a file of the user's.
    """

    def __init__(self, final: Path) -> None:
        self.final = final
        self.path = final.with_name(f".{final.name}.partial")
        self._note = final.with_name(f".{final.name}.partial.json")

    @property
    def version(self) -> Version | None:
        """Which version of the file there is a part of; ``None`` when there is none that one can go on with."""
        try:
            return Version(**json.loads(self._note.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    @property
    def length(self) -> int:
        """How many bytes there are that one can go on with."""
        return self.path.stat().st_size if self.version and self.path.exists() else 0

    @property
    def begun(self) -> bool:
        """Whether there is anything of it."""
        return self.path.exists() or self._note.exists()

    @property
    def device(self) -> int:
        """The file system that it will be on; folders of the published tree may be links to other disks."""
        folder = self.final.parent
        return (folder if folder.is_dir() else folder.parent).stat().st_dev

    def discard(self) -> None:
        """Remove what there is, the note first."""
        self._note.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def begin(self, version: Version) -> None:
        """Make an empty file; what there was has to be discarded before."""
        self.path.touch(exist_ok=False)
        self._note.write_text(json.dumps(asdict(version)) + "\n")

    def finish(self) -> None:
        """The file takes its place."""
        sync(self.path)
        os.replace(self.path, self.final)
        sync(self.final.parent)
        self.discard()


def sync(path: Path) -> None:
    """Wait until the disk has the contents of a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
