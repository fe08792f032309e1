"""Check and unpack a tar archive of one folder in one go."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

from scripts.download.partial import BLOCK, sync
from utils.errors import InputError

KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
}


class Damaged(InputError):
    """An archive is cut off, is no archive, or holds what it should not."""


def hidden(folder: Path) -> Path:
    """Where ``folder`` is until it is complete."""
    return folder.with_name(f".{folder.name}.partial")


def unpack(archive: Path, folder: Path, advance: Callable[[int], None]) -> None:
    """Unpack an archive whose members are all below a top folder of the name of ``folder``, which appears whole or not at all.

    Every member is read to its end, and the mark of the archive's end has to be there. ``advance`` is called with the number of
    bytes that were unpacked. Raises ``Damaged``.
    """
    building = hidden(folder)
    building.mkdir()
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                _unpack_member(archive, tar, member, building, folder.name, advance)
            end = tar.offset  # tarfile takes any header that it cannot read for the end
        with open(archive, "rb") as file:
            file.seek(end)
            if file.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
                raise Damaged(f"{archive}: cut off or damaged at byte {end:,}, expected a member or the archive's end")
        if not any(building.iterdir()):
            raise Damaged(f"{archive}: holds no file of {folder.name}/")
        for path, _, _ in os.walk(building):
            sync(Path(path))
        os.rename(building, folder)
        sync(folder.parent)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        if isinstance(error, Damaged):
            raise
        raise Damaged(f"{archive}: not a tar archive, or a damaged one ({error})") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _unpack_member(
    archive: Path, tar: tarfile.TarFile, member: tarfile.TarInfo, building: Path, top: str, advance: Callable[[int], None]
) -> None:
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    if member.size < 0:
        raise Damaged(f"{archive}: member {member.name!r} has {member.size} bytes")
    if member.name.startswith("/") or ".." in parts:
        raise Damaged(f"{archive}: member {member.name!r} leads out of the archive's folder")
    if not member.isreg() and not member.isdir():
        raise Damaged(f"{archive}: member {member.name!r} is {KINDS.get(member.type, 'of an unknown kind')}, expected files")
    if parts[:1] not in ([], [top]) or (member.isreg() and len(parts) < 2):
        raise Damaged(f"{archive}: member {member.name!r} is not below {top}/")
    path = building.joinpath(*parts[1:])
    try:
        if member.isdir():
            path.mkdir(parents=True, exist_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        file = tar.extractfile(member)
        assert file is not None
        with file, open(path, "xb") as copy:
            while block := file.read(BLOCK):
                copy.write(block)
                advance(len(block))
            copy.flush()
            os.fsync(copy.fileno())
    except (FileExistsError, NotADirectoryError) as error:
        raise Damaged(f"{archive}: member {member.name!r} occurs twice") from error
