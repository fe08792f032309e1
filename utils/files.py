"""Read JSON, and write files so that a reader sees the old one or the new one, whole."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import reprlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from utils.errors import InputError

if TYPE_CHECKING:
    import numpy as np

PARTIAL = ".partial"

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


def short_repr(value: Any) -> str:
    """What a file holds, as a message has it: like ``repr``, but of a long or deep value only the beginning."""
    return _SHORT.repr(value)


def read_json(path: str | Path) -> Any:
    """What a JSON file holds. Raises ``InputError`` when it is missing, cannot be read, or is not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file, expected JSON") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error


def make_folder(path: str | Path) -> Path:
    """Make folder ``path`` unless it is there. Raises ``InputError`` when it cannot be made or written to."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"output_dir {str(folder)!r}: cannot be made ({reason})") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"output_dir {folder}: cannot be written to, expected a folder of one's own")
    return folder


@contextmanager
def output_folder(path: str | Path) -> Iterator[Path]:
    """``make_folder``, for a block whose failure takes the folder away again if it is new and still empty."""
    existed = os.path.lexists(path)
    folder = make_folder(path)
    try:
        yield folder
    except BaseException:
        if not existed:
            with suppress(OSError):  # it holds something by now
                folder.rmdir()
        raise


def new_folder(path: str | Path) -> Path:
    """Make folder ``path``. Raises ``InputError`` as ``make_folder`` does, and when it is there and not empty."""
    folder = make_folder(path)
    occupied = next(folder.iterdir(), None)
    if occupied is not None:
        raise InputError(f"output_dir {folder}: not empty (it holds {occupied.name}), expected a new or empty folder")
    return folder


@contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of ``path`` when the block ends well, and vanishes when it does not."""
    path = Path(path)
    if path.name in ("", "..") or os.path.isdir(path):
        raise InputError(f"{path}: is a folder, expected the name of a file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BrokenPipeError:  # not of a file, but of what the block prints
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        with suppress(OSError):  # where it could not be made, either
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A hidden folder that takes the name ``path`` when the block ends well, and vanishes when it does not.

    What a killed process had begun is removed first. Raises ``InputError`` when ``path`` exists, when another process is
    building it, and when the disk refuses.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise InputError(f"{path}: already exists; remove it or choose another output")
    folder = path.with_name(f".{path.name}{PARTIAL}")
    descriptor = -1
    made: list[Path] = []
    try:
        made = [parent for parent in folder.parents if not parent.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        _claim(descriptor, folder, path)
        try:
            for leftover in folder.iterdir():
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            yield folder
            sync_folder(folder)
            os.rename(folder, path)
            sync_folder(path.parent)
        finally:
            # After the rename there is nothing left under this name, and something in the folders above.
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):
                for parent in made:
                    parent.rmdir()
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error})") from error
    finally:
        if descriptor != -1:
            os.close(descriptor)


def _claim(descriptor: int, folder: Path, path: Path) -> None:
    """Lock the open ``folder`` for this process, until it closes it or ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        claimed = os.fstat(descriptor).st_ino == os.stat(folder).st_ino
    except (BlockingIOError, FileNotFoundError):
        claimed = False  # locked by another process, or already renamed by it
    if not claimed:
        raise InputError(f"{path}: another process is writing it")


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Remove what a killed process had begun to write in ``folder`` under names that begin with ``name``."""
    for leftover in folder.glob(f".{name}*{PARTIAL}"):
        leftover.unlink()


def sync_folder(path: Path) -> None:
    """Wait until the disk knows the names in folder ``path``, without which a renamed file may be gone after a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    """Write ``value`` as JSON, atomically."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=indent) + "\n").encode())


def save_npz(path: str | Path, **arrays: np.ndarray) -> None:
    """Write arrays as ``.npz``, atomically."""
    import numpy as np  # here, because downloads run before anything is installed

    with atomic_file(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def sha256(path: str | Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
