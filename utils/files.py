"""Open and read files, and write files and folders atomically: a reader sees the old one or the new one, whole."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import reprlib
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from utils.errors import InputError

if TYPE_CHECKING:
    import numpy as np

PARTIAL = ".partial"
LOCK = ".lock"
BUSY = "another run is using this folder; wait for it or choose another"

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


def short_repr(value: Any) -> str:
    """Return ``repr(value)`` for a message, shortened if the value is long or deep."""
    return _SHORT.repr(value)


@contextmanager
def reading(path: str | Path, expected: str = "a file") -> Iterator[BinaryIO]:
    """Open a regular file in binary. Raises ``InputError`` for anything else, such as a pipe, which could block."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            yield file
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror or error})"
        raise InputError(f"{path}: {reason}, expected {expected}") from error


def read_file(path: str | Path, expected: str = "a file", limit: int = 1 << 60) -> bytes:
    """Return the bytes of a file. Raises ``InputError`` as ``reading``, and for more than ``limit`` bytes."""
    with reading(path, expected) as file:
        if (size := os.fstat(file.fileno()).st_size) > limit:
            raise InputError(f"{path}: has {size:,} bytes, expected {expected} of at most {limit:,}")
        return file.read()


def read_text(path: str | Path, expected: str = "a file") -> str:
    """Return the text of a file. Raises ``InputError`` as ``reading``, and for text that is not UTF-8, with its line."""
    data = read_file(path, expected).removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{path}: line {line}: byte 0x{data[error.start]:02x} is not UTF-8, expected text in UTF-8") from error


def read_json(path: str | Path, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Read a JSON file, objects in it by ``pairs``. Raises ``InputError`` if it is missing, cannot be read, or is not JSON."""
    text = read_text(path, "a JSON file")
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error


def read_object(path: str | Path, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> dict[str, Any]:
    """Read a JSON object, as ``read_json``. Raises ``InputError`` also if the file contains anything else."""
    contents = read_json(path, pairs)
    if not isinstance(contents, dict):
        raise InputError(f"{path}: contains a JSON {type(contents).__name__}, expected a JSON object")
    return contents


def make_folder(path: str | Path) -> Path:
    """Make folder ``path`` unless it exists. Raises ``InputError`` if it cannot be made or written to."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"output_dir {str(folder)!r}: cannot be made ({reason})") from error
    if reason := why_not_writable(folder):
        raise InputError(f"output_dir {folder}: {reason}, choose another folder")
    return folder


def why_not_writable(folder: Path) -> str:
    """Return why no file can be made in a folder that exists, "" if one can."""
    if os.access(folder, os.W_OK | os.X_OK):
        return ""
    is_read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
    return "on a read-only file system" if is_read_only else "no permission to write in it"


@contextmanager
def output_folder(path: str | Path) -> Iterator[Path]:
    """Make folder ``path`` as ``make_folder`` does; if the block fails, remove the folder if it is new and still empty."""
    existed = os.path.lexists(path)
    folder = make_folder(path)
    try:
        yield folder
    except BaseException:
        if not existed:
            with suppress(OSError):  # not empty
                folder.rmdir()
        raise


@contextmanager
def exclusive_folder(path: str | Path, new: str = "") -> Iterator[Path]:
    """``output_folder``, for one process at a time. Raises ``InputError`` also if another is in it, or file ``new`` exists."""
    with output_folder(path) as folder:
        name = folder / LOCK
        if os.path.lexists(name) and (name.is_symlink() or not name.is_file()):
            raise InputError(f"{name}: not a regular file; remove it or choose another output_dir")
        try:
            file = open(name, "ab")  # noqa: SIM115 - closed below
        except OSError as error:
            raise InputError(f"{name}: cannot be written ({error.strerror})") from error
        with file:
            lock(file, folder)
            # Whoever held it may have just ended and removed the file, and someone else may have made a new one.
            try:
                is_ours = os.path.samestat(os.stat(name), os.fstat(file.fileno()))
            except FileNotFoundError:
                is_ours = False
            if not is_ours:
                raise InputError(f"{folder}: {BUSY}")
            try:
                if new and os.path.lexists(folder / new):
                    raise InputError(f"{folder / new}: already exists; remove it or choose another output_dir")
                yield folder
            finally:
                with suppress(OSError):
                    name.unlink()


def lock(file: IO[Any], folder: Path) -> None:
    """Lock an open file in ``folder`` until this process ends or closes it; forked children do not hold the lock.

    Raises ``InputError`` if another process holds it.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        held = error.errno in (errno.EACCES, errno.EAGAIN)
        raise InputError(f"{folder}: {BUSY if held else f'cannot be locked ({error.strerror}); use another disk'}") from error


def is_locked(path: Path) -> bool:
    """Return whether another process holds a ``lock`` on the file."""
    try:
        file = open(path, "rb+")  # noqa: SIM115 - closed below
    except OSError:
        return False
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (errno.EACCES, errno.EAGAIN)
    return False


def new_folder(path: str | Path) -> Path:
    """Make folder ``path``. Raises ``InputError`` as ``make_folder`` does, and if it exists and is not empty.

    The ``.lock`` that a killed process leaves does not count.
    """
    folder = make_folder(path)
    if (occupied := next((entry for entry in folder.iterdir() if entry.name != LOCK), None)) is not None:
        raise InputError(f"output_dir {folder}: not empty (it holds {occupied.name}), expected a new or empty folder")
    return folder


@contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a binary file that replaces ``path`` if the block succeeds, and is removed if it fails.

    Raises ``InputError`` if ``path`` is anything but a file, or the file cannot be written.
    """
    path = Path(path)
    if path.name in ("", "..") or (os.path.exists(path) and not os.path.isfile(path)):
        raise InputError(f"{path}: is a folder, a device or a pipe, expected the name of a file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Make a hidden folder that is renamed to ``path`` if the block succeeds, and removed if it fails.

    What a killed process left of it is removed first. Raises ``InputError`` if ``path`` exists, another process is writing it,
    or the file cannot be written.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise InputError(f"{path}: already exists; remove it or choose another output")
    folder = path.with_name(f".{path.name}{PARTIAL}")
    try:
        made = [parent for parent in folder.parents if not parent.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with _open_folder(folder) as descriptor:
            try:  # the lock ends with the descriptor
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                claimed = os.fstat(descriptor).st_ino == os.stat(folder).st_ino
            except (BlockingIOError, FileNotFoundError):
                claimed = False  # locked by another process, or already renamed by it
            if not claimed:
                raise InputError(f"{path}: another process is writing it; wait for it or choose another output")
            try:
                for leftover in folder.iterdir():
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
                yield folder
                sync_folder(folder)
                os.rename(folder, path)
                sync_folder(path.parent)
            finally:
                # After the rename this finds neither the folder nor empty parents.
                shutil.rmtree(folder, ignore_errors=True)
                with suppress(OSError):
                    for parent in made:
                        parent.rmdir()
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
    except InputError as error:  # users know the folder by its later name
        raise InputError(str(error).replace(str(folder), str(path))) from error


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Remove the temporary files in ``folder`` that a killed process left of files whose names begin with ``name``."""
    for leftover in folder.glob(f".{name}*{PARTIAL}"):
        if leftover.is_file():
            leftover.unlink()


def sync_folder(path: Path) -> None:
    """Flush the names in folder ``path`` to disk, without which a power cut may undo a rename."""
    with _open_folder(path) as descriptor:
        os.fsync(descriptor)


@contextmanager
def _open_folder(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
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
    """Return the SHA-256 of a file in hexadecimal. Raises ``InputError`` if it cannot be read."""
    digest = hashlib.sha256()
    with reading(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
