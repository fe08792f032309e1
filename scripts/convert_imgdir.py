"""Make an image database from a folder with one ``.npz`` of region features an image.

    python scripts/convert_imgdir.py --img_dir features/ --output img_db/flickr30k

The database appears whole or not at all. Files that cannot be used are left out and listed at the end, with exit code 1.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.image_db import BoxRule, ImageDatabaseWriter, pack_image
from data.record import read_npz
from utils.errors import InputError, one_line_errors

MAX_FILE_BYTES = 256 << 20


@dataclass(frozen=True)
class Source:
    """One image to convert: its name in the database, and what loads its arrays in a worker.

    ``load`` returns what ``pack_image`` takes and raises ``ValueError`` or ``OSError``.
    """

    name: str
    load: Callable[[], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Packed:
    """A worker's result: the record and its number of boxes, or why there is none."""

    name: str
    record: bytes = b""
    boxes: int = 0
    error: str = ""


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """``features`` [K, D], ``norm_bb`` [K, 6], ``conf`` [K], perhaps ``soft_labels`` [K, C]; rows past ``nbb`` are padding."""
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise ValueError("is not a regular file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"is larger than {MAX_FILE_BYTES:,} bytes")
    arrays = read_npz(path.read_bytes(), ("features", "norm_bb", "conf", "soft_labels", "nbb"))
    for name in ("features", "norm_bb", "conf"):
        if name not in arrays:
            raise ValueError(f"has no {name}")
    nbb = arrays.pop("nbb", None)
    if nbb is None:
        return arrays
    rows = min(len(array) if array.ndim else 0 for array in arrays.values())
    if nbb.size != 1 or nbb.dtype.kind not in "iu" or not 1 <= nbb.item() <= rows:
        raise ValueError(f"nbb is {nbb.tolist()}, expected a number of boxes from 1 to {rows}")
    return {name: array[: nbb.item()] for name, array in arrays.items()}


def npz_sources(folder: Path) -> list[Source]:
    """The images of a folder of ``.npz`` files, by name; ``InputError`` when there are none."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    paths = sorted(folder.glob("*.npz"))
    if not paths:
        raise InputError(f"{folder}: no .npz file in it")
    return [Source(path.name, partial(load_npz, path)) for path in paths]


def pack(rule: BoxRule | None, compressed: bool, source: Source) -> Packed:
    """Load one image and make its record."""
    try:
        record, boxes = pack_image(**source.load(), rule=rule, compressed=compressed)
        return Packed(source.name, record, boxes)
    except (ValueError, OSError) as error:
        return Packed(source.name, error=str(error))


def pack_all(task: Callable[[Source], Packed], sources: Iterable[Source], nproc: int) -> Iterator[Packed]:
    """Records in the order of ``sources``; workers are never more than a few images ahead of whoever takes the records."""
    if nproc == 1:
        yield from map(task, sources)
        return
    waiting: deque[Future[Packed]] = deque()
    # Spawned, because this process has a database open.
    with ProcessPoolExecutor(nproc, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for source in sources:
                waiting.append(pool.submit(task, source))
                if len(waiting) > 4 * nproc:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise InputError(f"--nproc {nproc}: a worker was killed, perhaps for memory; try fewer") from error


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description="Make an image database from a folder of .npz features.", allow_abbrev=False)
    parser.add_argument("--img_dir", type=Path, required=True, help="folder of .npz, one an image")
    parser.add_argument("--output", type=Path, required=True, help="image database, what --img_db is given later")
    parser.add_argument("--conf_th", type=float, default=0.2, help="keep boxes above it; -1 keeps --num_bb (%(default)s)")
    parser.add_argument("--max_bb", type=int, default=100, help="keep at most so many boxes of an image (%(default)s)")
    parser.add_argument("--min_bb", type=int, default=10, help="keep at least so many boxes of an image (%(default)s)")
    parser.add_argument("--num_bb", type=int, default=36, help="keep so many with --conf_th -1 (%(default)s)")
    parser.add_argument("--keep_all", action="store_true", help="keep every box, for filtering when the database is read")
    parser.add_argument("--compress", action="store_true", help="compressed records, for reading with --compressed_db")
    parser.add_argument("--nproc", type=int, default=os.cpu_count() or 1, help="worker processes (%(default)s)")
    options = parser.parse_args(arguments)
    if options.nproc < 1:
        parser.error(f"--nproc {options.nproc}: expected at least 1")
    return options


@one_line_errors
def main(arguments: list[str] | None = None) -> None:
    """Convert every file, then list those that could not be."""
    options = parse_options(arguments)
    sources = npz_sources(options.img_dir)
    failures: list[Packed] = []
    writer = ImageDatabaseWriter(
        options.output,
        conf_th=options.conf_th,
        max_bb=options.max_bb,
        min_bb=options.min_bb,
        num_bb=options.num_bb,
        compressed=options.compress,
        keep_all=options.keep_all,
    )
    images = boxes = 0
    with writer as database:
        task = partial(pack, database.rule, database.compressed)
        for packed in tqdm(
            pack_all(task, sources, options.nproc), total=len(sources), desc=options.output.name, unit=" images", disable=None
        ):
            if packed.error:
                failures.append(packed)
                continue
            database.put_packed(packed.name, packed.record, packed.boxes)
            images, boxes = images + 1, boxes + packed.boxes
        if not images:
            first = failures[0]
            raise InputError(f"{options.img_dir}: no file can be used; {first.name}: {first.error}")
    print(f"{database.lmdb_path}: {images:,} images, {boxes / images:.1f} boxes each")
    if failures:
        print(f"{len(failures)} of {len(sources)} files could not be used and are not in the database:", file=sys.stderr)
        for failure in failures:
            print(f"  {options.img_dir / failure.name}: {failure.error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
