"""Fetch the published archives of UNITER's image-text retrieval, and unpack them.

    bash scripts/download_itm.sh STORAGE [flickr|coco|all] [--mirror URL] [--from DIR] [--jobs N]

STORAGE then has img_db/, txt_db/, pretrained/ and an empty finetune/. What is there already is not asked for again, and what a
call got before it was interrupted is kept for the next.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.download.archive import Damaged, hidden, unpack
from scripts.download.checksums import CHECKSUMS, sha256
from scripts.download.local import LocalFolder
from scripts.download.mirror import ADVICE, Mirror
from scripts.download.partial import Partial
from scripts.download.work import Work, in_units
from utils.errors import InputError, one_line_errors
from utils.signals import StopSignal

ORIGINAL = "https://convaisharables.blob.core.windows.net/uniter"
FLICKR = ("img_db/flickr30k.tar", *(f"txt_db/itm_flickr30k_{split}.db.tar" for split in ("train", "val", "test")))
COCO = (
    *(f"img_db/coco_{part}2014.tar" for part in ("train", "val")),
    *(f"txt_db/itm_coco_{split}.db.tar" for split in ("train", "restval", "val", "test")),
)
CHECKPOINTS = ("pretrained/uniter-base.pt", "pretrained/uniter-large.pt")
CHOICES = {"flickr": FLICKR + CHECKPOINTS, "coco": COCO + CHECKPOINTS, "all": FLICKR + COCO + CHECKPOINTS}


@dataclass(frozen=True)
class Task:
    """A file of the published tree that is not complete: where it comes from, and how many bytes that and unpacking it take."""

    path: str
    source: LocalFolder | Mirror | None  # None: an archive that is there and only has to be unpacked
    to_fetch: int
    to_unpack: int


def unpacked(file: Path) -> Path | None:
    """The folder that an archive holds; ``None`` for a checkpoint."""
    return file.with_suffix("") if file.suffix == ".tar" else None


def is_complete(file: Path) -> bool:
    """Whether nothing is left to do: a checkpoint is there, or what an archive holds."""
    folder = unpacked(file)
    return file.is_file() if folder is None else folder.is_dir() and any(folder.iterdir())


def plan(storage: Path, local: LocalFolder | None, mirror: Mirror | None, path: str) -> Task:
    """What is to be done for a file that one of the sources has, or the storage itself. Raises ``InputError``."""
    final, source = storage / path, None
    folder = unpacked(final)
    if folder:
        shutil.rmtree(hidden(folder), ignore_errors=True)  # of a call that was killed
    if final.is_file():
        size = fetched = final.stat().st_size
    else:
        source = local if local and local.has(path) else mirror
        assert source is not None
        size = source.size(path)
        fetched = source.already(path, Partial(final))
    return Task(path, source, max(0, size - fetched), size if folder else 0)


def check_space(storage: Path, tasks: list[Task]) -> None:
    """Raises ``InputError`` when a file system of the storage has less room than is needed."""
    needed: Counter[int] = Counter()
    folders = {}
    for task in tasks:
        target = Partial(storage / task.path)
        needed[target.device] += task.to_fetch + task.to_unpack
        folders[target.device] = target.final.parent if target.final.parent.is_dir() else storage
    for device, size in needed.items():
        free = shutil.disk_usage(folders[device]).free
        if size > free:
            raise InputError(
                f"{folders[device]}: {in_units(size)} are needed for archives and what they hold, {in_units(free)} are free; "
                f"make room, choose flickr or coco alone, or name another STORAGE"
            )


def carry_out(storage: Path, work: Work, task: Task) -> str:
    """Fetch, verify and unpack a file; returns what was done. Raises ``InputError``."""
    final = storage / task.path
    target, folder = Partial(final), unpacked(final)
    done = []
    with one_line_of_disk(final):
        if task.source:
            final.parent.mkdir(parents=True, exist_ok=True)
            task.source.fetch(task.path, target)
            expected = task.source.checksum(task.path)
            if expected and (actual := sha256(target.path, work.advance)) != expected:
                target.discard()
                raise InputError(
                    f"{task.source.name(task.path)}: its SHA-256 is {actual}, but {CHECKSUMS} says {expected}; "
                    f"what was fetched is removed again, try once more or {ADVICE}"
                )
            target.finish()
            done.append("fetched")
        if folder:
            try:
                unpack(final, folder, work.advance)
            except Damaged as damage:
                if task.source is None:  # somebody else put it there
                    raise InputError(f"{damage}; remove it, and it is fetched") from damage
                final.unlink()
                raise InputError(f"{damage}; it is removed, try once more or {ADVICE}") from damage
            done.append("unpacked")
    return f"{final}: {' and '.join(done)}"


@contextmanager
def one_line_of_disk(path: Path) -> Iterator[None]:
    """Raises ``InputError`` for what a disk does not do in the block, whose subject is ``path``."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; mend that and call again, what was got is kept") from error


@contextmanager
def sole_user(storage: Path) -> Iterator[None]:
    """Make folder ``storage`` unless it is there, and keep other calls out of it during the block.

    Raises ``InputError`` when another call is at work there.
    """
    existed = storage.exists()
    storage.mkdir(parents=True, exist_ok=True)
    path = storage / ".download.lock"
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.stat(path), os.fstat(file.fileno()))
        except (BlockingIOError, FileNotFoundError):  # the latter: the other one was about to end
            held = False
        if not held:
            raise InputError(f"{storage}: another download into it is at work; let it end, or end it")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if not existed:
                with suppress(OSError):  # it holds something by now
                    storage.rmdir()


def mirror_url(text: str) -> str:
    """An option's value that is the address of a web server."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or not text.isprintable() or " " in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not an address that begins with http:// or https://")
    return text


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/download_itm.sh",
        description="Fetch and unpack the published archives of image-text retrieval; what is there already is left alone.",
        allow_abbrev=False,
    )
    parser.add_argument("storage", type=Path, metavar="STORAGE", help="folder for img_db/, txt_db/, pretrained/ and finetune/")
    parser.add_argument("dataset", nargs="?", choices=CHOICES, default="all", help="flickr, coco or all, which is the default")
    parser.add_argument("--mirror", type=mirror_url, metavar="URL", help=f"address above img_db/ and the others ({ORIGINAL})")
    parser.add_argument(
        "--from", dest="folder", type=Path, metavar="DIR", help="folder with files that you have; before --mirror"
    )
    parser.add_argument("--jobs", type=int, default=4, metavar="N", help="files at a time (%(default)s)")
    options = parser.parse_intermixed_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: expected at least 1")
    if options.mirror is None and options.folder is None:
        options.mirror = ORIGINAL
    return options


@one_line_errors
def main(arguments: list[str] | None = None) -> None:
    """Plan, see that there is room, fetch and unpack; what fails does not keep the rest from being done."""
    options = parse_options(arguments)
    storage, wanted = options.storage, CHOICES[options.dataset]
    finetune = storage / "finetune"
    with one_line_of_disk(storage):
        if finetune.is_dir() and all(is_complete(storage / path) and not Partial(storage / path).begun for path in wanted):
            print(f"{storage}: complete")
            return
        with StopSignal(), sole_user(storage), Work(options.jobs) as work:
            download(options, [path for path in wanted if not is_complete(storage / path)], work)
            for path in wanted:
                if is_complete(storage / path):
                    Partial(storage / path).discard()  # of a call that was killed, before someone else put the file there
            if not work.failures:
                finetune.mkdir(exist_ok=True)
    if work.failures:
        sys.exit(2)


def download(options: argparse.Namespace, missing: list[str], work: Work) -> None:
    """Complete the files that are ``missing``, or print why that cannot be done."""
    storage: Path = options.storage
    local = LocalFolder(options.folder, work) if options.folder else None
    mirror = Mirror(options.mirror, work) if options.mirror else None
    if local and not mirror:
        lacking = [path for path in missing if not local.has(path) and not (storage / path).is_file()]
        if lacking:
            work.fail(InputError(f"--from {options.folder}: has no {', '.join(lacking)}; add them, or name a --mirror URL too"))
        missing = [path for path in missing if path not in lacking]
    tasks = sorted(work.run(partial(plan, storage, local, mirror), missing), key=lambda task: -task.to_fetch)
    check_space(storage, tasks)
    work.total = sum(task.to_fetch + task.to_unpack for task in tasks)
    if mirror and any(task.source is mirror for task in tasks):
        mirror.read_checksums()
    for line in work.run(partial(carry_out, storage, work), tasks):
        print(line, flush=True)


if __name__ == "__main__":
    main()
