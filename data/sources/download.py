"""Complete a copy of the published archives: download, verify and unpack them.

It runs before anything is installed, so nothing that it imports may need a package.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path, PurePosixPath

from data.sources.mirror import ADVICE, BLOCK, Mirror, Partial
from data.sources.threads import Pool, Reader
from utils.errors import InputError
from utils.files import PARTIAL, building, sha256, sync_folder

ORIGINAL = "https://convaisharables.blob.core.windows.net/uniter"
_FLICKR = ("img_db/flickr30k.tar", *(f"txt_db/itm_flickr30k_{split}.db.tar" for split in ("train", "val", "test")))
_COCO = (
    *(f"img_db/coco_{part}2014.tar" for part in ("train", "val")),
    *(f"txt_db/itm_coco_{split}.db.tar" for split in ("train", "restval", "val", "test")),
)
_CHECKPOINTS = ("pretrained/uniter-base.pt", "pretrained/uniter-large.pt")
DATASETS = {"flickr": _FLICKR + _CHECKPOINTS, "coco": _COCO + _CHECKPOINTS, "all": _FLICKR + _COCO + _CHECKPOINTS}

CHECKSUMS, MAX_CHECKSUMS = "SHA256SUMS", 1 << 20  # bytes


class Damaged(InputError):
    """An archive is truncated, is no tar archive, or holds what it must not."""


class Entry:
    """A file of the published tree, and what is left to do for it."""

    def __init__(self, storage: Path, path: str) -> None:
        self.path = path
        self.final = storage / path
        self.folder = self.final.with_suffix("") if path.endswith(".tar") else None  # what the archive holds
        self.partial = Partial(self.final)
        self.disk = self.final.parent if self.final.parent.is_dir() else storage  # the former may link to another disk
        self.original: Path | None = None  # the file of the user that it is a copy of
        self.checksum: str | None = None
        self.to_fetch = self.to_unpack = 0  # bytes

    @property
    def is_complete(self) -> bool:
        """Whether a checkpoint is there, or what an archive holds."""
        return self.final.is_file() if self.folder is None else self.folder.is_dir() and any(self.folder.iterdir())

    def plan(self, folder: Path | None, mirror: Mirror | None) -> Entry:
        """Find out what is left to do. Raises ``InputError`` if the file is nowhere."""
        if self.folder:
            shutil.rmtree(self.folder.with_name(f".{self.folder.name}{PARTIAL}"), ignore_errors=True)  # of a killed call
        places = (folder / self.path, folder / self.final.name) if folder else ()
        if self.final.is_file():
            size = self.final.stat().st_size
        elif original := next((place for place in places if place.is_file()), None):
            self.original, size = original, original.stat().st_size
            if original.stat().st_dev != self.disk.stat().st_dev:  # otherwise it is linked
                self.to_fetch = size
        elif mirror:
            size = mirror.size(self.path)
            self.to_fetch = max(0, size - self.partial.received()[0])
        else:
            raise InputError(f"--from {folder}: has no {self.path}; add it, or name a --mirror URL too")
        self.to_unpack = size if self.folder else 0
        return self

    def complete(self, mirror: Mirror | None, pool: Pool) -> str:
        """Do what is left to do; return a line about it. Raises ``InputError``."""
        done = []
        with _disk_errors(self.final):
            if not self.final.is_file():
                self._fetch(mirror, pool)
                done.append("fetched")
            if self.folder:
                try:
                    unpack(self.final, self.folder, pool)
                except Damaged as damage:
                    if not done:
                        raise InputError(f"{damage}; remove it to have it downloaded") from damage
                    self.final.unlink()
                    raise InputError(f"{damage}; it was removed, rerun or {ADVICE}") from damage
                done.append("unpacked")
        return f"{self.final}: {' and '.join(done)}"

    def _fetch(self, mirror: Mirror | None, pool: Pool) -> None:
        self.final.parent.mkdir(parents=True, exist_ok=True)
        if self.original:
            self.partial.discard()
            try:
                os.link(self.original.resolve(), self.partial.path)  # of a symbolic link what it leads to
            except OSError:
                with Reader(self.original, pool) as original, open(self.partial.path, "xb") as copy:
                    shutil.copyfileobj(original, copy, BLOCK)
        elif mirror:
            mirror.fetch(self.path, self.partial)
        if self.checksum and (actual := sha256(self.partial.path)) != self.checksum:
            self.partial.discard()
            raise InputError(
                f"{self.original or (mirror and mirror.name(self.path))}: its SHA-256 is {actual}, but {CHECKSUMS} says "
                f"{self.checksum}; what was fetched is removed, rerun or {ADVICE}"
            )
        pool.advance(0)  # nothing may appear once the program is ending
        sync_folder(self.partial.path)
        os.replace(self.partial.path, self.final)
        sync_folder(self.final.parent)
        self.partial.discard()


def download(
    storage: Path, paths: Sequence[str], mirror_url: str | None, folder: Path | None, jobs: int
) -> Iterator[str | InputError]:
    """Complete the files ``paths`` of the published tree in ``storage``, ``jobs`` at a time.

    Files come from ``folder`` if it has them, otherwise from the mirror. Yields a line per completed file and an error per file
    that could not be completed; closing the generator stops the work. Raises ``InputError`` if nothing can be started.
    """
    if not hasattr(tarfile, "data_filter"):
        raise InputError(
            f"Python {platform.python_version()} cannot unpack archives safely; install 3.10.12, 3.11.4 or newer, "
            f"or set PYTHON=<path of one>"
        )
    entries = [Entry(storage, path) for path in paths]
    finetune = storage / "finetune"
    with _disk_errors(storage):
        if finetune.is_dir() and all(entry.is_complete and not entry.partial.exists for entry in entries):
            yield f"{storage}: complete"
            return
        if folder and not folder.is_dir():
            raise InputError(f"--from {folder}: no such folder")
        with _locked(storage), closing(Pool(jobs)) as pool:
            mirror = Mirror(mirror_url, pool.advance, pool.pause) if mirror_url else None
            for entry in entries:
                if entry.is_complete or entry.final.is_file():
                    entry.partial.discard()
            missing = [entry for entry in entries if not entry.is_complete]
            outcomes = list(pool.map(lambda entry: entry.plan(folder, mirror), missing))
            yield from (outcome for outcome in outcomes if isinstance(outcome, InputError))
            planned = [outcome for outcome in outcomes if isinstance(outcome, Entry)]
            _check_space(planned)
            _set_checksums([entry for entry in planned if not entry.final.is_file()], folder, mirror)
            pool.total = sum(entry.to_fetch + entry.to_unpack for entry in planned)
            planned.sort(key=lambda entry: -entry.to_fetch)
            yield from pool.map(lambda entry: entry.complete(mirror, pool), planned)
            if all(entry.is_complete for entry in entries):
                finetune.mkdir(exist_ok=True)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        name, reason = error.filename or path, error.strerror or error
        raise InputError(f"{name}: {reason}; fix this and rerun, partial downloads are kept") from error


@contextmanager
def _locked(storage: Path) -> Iterator[None]:
    """Create folder ``storage`` if needed and lock it; remove it again if it is new and still empty."""
    existed = storage.exists()
    storage.mkdir(parents=True, exist_ok=True)
    path = storage / ".download.lock"  # a file, because network file systems do not lock folders across machines
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = os.path.samestat(os.stat(path), os.fstat(file.fileno()))
        except (BlockingIOError, FileNotFoundError):  # the latter if its owner has just removed it
            locked = False
        if not locked:
            raise InputError(f"{storage}: another download into this folder is running; wait for it or stop it")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if not existed:
                with suppress(OSError):  # not empty
                    storage.rmdir()


def _check_space(entries: Sequence[Entry]) -> None:
    for device in {entry.disk.stat().st_dev for entry in entries}:
        there = [entry for entry in entries if entry.disk.stat().st_dev == device]
        needed = sum(entry.to_fetch + entry.to_unpack for entry in there) / 1e9
        free = shutil.disk_usage(there[0].disk).free / 1e9
        if needed > free:
            raise InputError(
                f"{there[0].disk}: archives and what they hold need {needed:,.1f} GB, but only {free:,.1f} GB are free; "
                f"make room, choose flickr or coco alone, or name another STORAGE"
            )


def _set_checksums(entries: Sequence[Entry], folder: Path | None, mirror: Mirror | None) -> None:
    """Look up files to fetch in the list of their source, if it has one."""
    listed = folder / CHECKSUMS if folder else None
    local = _parse_checksums(listed, listed.read_bytes()) if listed and listed.is_file() else {}
    remote = {}
    if mirror and not all(entry.original for entry in entries):
        remote = _parse_checksums(mirror.name(CHECKSUMS), mirror.contents(CHECKSUMS, MAX_CHECKSUMS))
    for entry in entries:
        entry.checksum = local.get(entry.path, local.get(entry.final.name)) if entry.original else remote.get(entry.path)


def _parse_checksums(name: str | Path, contents: bytes) -> dict[str, str]:
    """Return {path: hexadecimal SHA-256} from a list as ``sha256sum`` writes it."""
    checksums = {}
    for number, line in enumerate(contents.decode("utf-8", "replace").splitlines(), start=1):
        match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)", line)
        if match is None:
            raise InputError(f"{name}: line {number} is not a SHA-256 and a path, expected the output of sha256sum")
        checksums[match[2]] = match[1].lower()
    return checksums


def unpack(archive: Path, folder: Path, pool: Pool) -> None:
    """Unpack an archive of one top folder, called like ``folder``, which appears whole or not at all. Raises ``Damaged``."""

    def only_files(member: tarfile.TarInfo, destination: str) -> tarfile.TarInfo:
        parts = PurePosixPath(member.name).parts
        if not (member.isdir() or (member.isreg() and member.size >= 0)):
            raise Damaged(f"{archive}: member {member.name!r} is neither a file nor a folder")
        if parts[:1] not in ((), (folder.name,)):
            raise Damaged(f"{archive}: member {member.name!r} is not below {folder.name}/")
        return tarfile.data_filter(member.replace(name="/".join(parts[1:]) or ".", deep=False), destination)

    with suppress(OSError):
        folder.rmdir()  # an empty one
    with building(folder) as hidden:
        try:
            with Reader(archive, pool) as file, tarfile.TarFile(fileobj=file, copybufsize=BLOCK) as tar:
                tar.extractall(hidden, filter=only_files)
                file.seek(tar.offset)  # tarfile takes a damaged header for the end
                if file.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
                    raise Damaged(f"{archive}: truncated, or damaged at byte {tar.offset:,}")
        except Damaged:
            raise
        except (tarfile.TarError, ValueError, OverflowError, FileExistsError, IsADirectoryError, NotADirectoryError) as error:
            raise Damaged(f"{archive}: damaged, or not a tar archive ({error})") from error
        if not any(hidden.iterdir()):
            raise Damaged(f"{archive}: holds no file of {folder.name}/")
        for path in hidden.rglob("*"):
            sync_folder(path)
