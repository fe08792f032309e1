"""Make an image database from region features, in any of the forms that detectors write them.

    python scripts/convert_imgdir.py --img_dir features/ --output img_db/flickr30k
    python scripts/convert_imgdir.py --tsv karpathy_val_resnet101_faster_rcnn_genome.tsv.0 … --prefix coco_val2014_ --output …

The database appears whole or not at all. Images that cannot be used are left out and listed at the end, with exit code 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.boxes import BoxRule, Layout
from data.image_db import ImageDatabaseWriter, encode_image
from data.lmdb_store import check_name
from data.sources import region_files, region_tsv
from data.sources.region_names import Naming, naming
from data.sources.region_source import Source
from utils.errors import InputError, one_line_errors
from utils.files import short_repr
from utils.parallel import add_nproc, in_order
from utils.provenance import made_by
from utils.signals import Stop

OTHER_DETECTOR = "warning: UNITER's weights were trained on other features than {}'s; expect to train from these anew"


@dataclass(frozen=True)
class Packed:
    """A worker's result: the record, its number of boxes and numbers per feature, or why there is none."""

    name: str
    place: str
    record: bytes = b""
    boxes: int = 0
    width: int = 0
    error: str = ""


def pack(layout: Layout, named: tuple[str, Source]) -> Packed:
    """Load one image and make its record."""
    name, source = named
    try:
        check_name(name)
        arrays = source.load()
        record, boxes = encode_image(**arrays, rule=layout.rule, compressed=layout.compressed)
        return Packed(name, source.place, record, boxes, arrays["features"].shape[1])
    except (ValueError, OSError) as error:
        return Packed(name, source.place, error=str(error))


def with_names(sources: Iterable[Source], name_of: Naming, failures: list[tuple[str, str]]) -> Iterator[tuple[str, Source]]:
    """The sources that have a name, with it; the others become failures."""
    for source in sources:
        try:
            yield name_of(source.id), source
        except ValueError as error:
            failures.append((source.place, str(error)))


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description="Make an image database from region features.", allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--img_dir", type=Path, help="folder of .npz (UNITER, MILVLG) or .npy pairs (MMF), one an image")
    source.add_argument("--tsv", type=Path, nargs="+", help="TSV files of bottom-up-attention, py-bottom-up-attention or VinVL")
    parser.add_argument("--sizes", type=Path, help="for VinVL's TSV: its hw.tsv, the pictures' heights and widths")
    names = parser.add_mutually_exclusive_group()
    names.add_argument("--prefix", help="name images by it and their number: flickr30k_, coco_train2014_, coco_val2014_")
    names.add_argument("--annotations", type=Path, help="name images as the text databases of these annotations do")
    parser.add_argument("--output", type=Path, required=True, help="image database, what --img_db is given later")
    parser.add_argument("--conf_th", type=float, default=0.2, help="keep boxes above it; -1 keeps --num_bb (%(default)s)")
    parser.add_argument("--max_bb", type=int, default=100, help="keep at most so many boxes of an image (%(default)s)")
    parser.add_argument("--min_bb", type=int, default=10, help="keep at least so many boxes of an image (%(default)s)")
    parser.add_argument("--num_bb", type=int, default=36, help="keep so many with --conf_th -1 (%(default)s)")
    parser.add_argument("--keep_all", action="store_true", help="keep every box, for filtering when the database is read")
    parser.add_argument("--compress", action="store_true", help="compressed records, for reading with --compressed_db")
    add_nproc(parser)
    return parser.parse_args(arguments)


def open_sources(options: argparse.Namespace) -> tuple[Iterable[Source], int | None]:
    """The images to convert, and how many where that is known. Raises ``InputError``."""
    tables = [(path, region_tsv.kind_of(path)) for path in options.tsv or ()]
    vinvl = any(region_tsv.is_vinvl(kind) for _, kind in tables)
    if vinvl != (options.sizes is not None):
        raise InputError("--sizes: VinVL's hw.tsv, needed for its rows, whose boxes are in pixels, and for no others")
    if options.img_dir is not None:
        images = region_files.sources_of(options.img_dir)
        if region_files.is_mmf(images):
            print(OTHER_DETECTOR.format("MMF"), file=sys.stderr)
        return images, len(images)
    if options.keep_all and not all(region_tsv.has_confidences(kind) for _, kind in tables):
        raise InputError("--keep_all: bottom-up-attention's TSV has no confidences to filter by when the database is read")
    if vinvl:
        print(OTHER_DETECTOR.format("VinVL"), file=sys.stderr)
    sizes = region_tsv.read_sizes(options.sizes) if options.sizes else {}
    return chain.from_iterable(region_tsv.sources_of(path, kind, sizes) for path, kind in tables), None


@one_line_errors
def main(arguments: list[str] | None = None) -> None:
    """Convert every image, then list those that could not be."""
    options = parse_options(arguments)
    name_of = naming(options.prefix, options.annotations)
    sources, total = open_sources(options)
    failures: list[tuple[str, str]] = []
    writer = ImageDatabaseWriter(
        options.output,
        None if options.keep_all else BoxRule(options.conf_th, options.max_bb, options.min_bb, options.num_bb),
        compressed=options.compress,
    )
    images = boxes = width = 0
    try:
        with Stop(), writer as database:
            results = in_order(partial(pack, database.layout), with_names(sources, name_of, failures), options.nproc)
            for packed in tqdm(results, total=total, desc=options.output.name, unit=" images", disable=None):
                width = width or packed.width
                if packed.error:
                    failures.append((packed.place, packed.error))
                elif packed.name in database:
                    failures.append((packed.place, f"image {short_repr(packed.name)} is there already, the first one is kept"))
                elif packed.width != width:
                    failures.append((packed.place, f"features have {packed.width} numbers, those before {width}"))
                else:
                    database.put_encoded(packed.name, packed.record, packed.boxes)
                    images, boxes = images + 1, boxes + packed.boxes
            if not images:
                raise InputError(f"{database.lmdb_path}: not made, no image can be used")
            database.made = note(options, images, failures)
    finally:
        list_failures(failures, images)
    print(f"{database.lmdb_path}: {images:,} images, {boxes / images:.1f} boxes each")
    if failures:
        sys.exit(1)


def list_failures(failures: list[tuple[str, str]], images: int) -> None:
    """Print what could not be used, also of a conversion that did not come to its end."""
    if failures:
        found = images + len(failures)
        print(f"{len(failures)} of {found} images could not be used and are left out:", file=sys.stderr)
    for place, reason in failures:
        print(f"  {place}: {reason}", file=sys.stderr)


def note(options: argparse.Namespace, images: int, failures: list[tuple[str, str]]) -> dict[str, Any]:
    """Where a database comes from, in JSON's types."""
    given = {key: list(map(str, value)) if isinstance(value, list) else value for key, value in vars(options).items()}
    given = {key: str(value) if isinstance(value, Path) else value for key, value in given.items() if value is not None}
    return {
        "made_by": made_by(__file__),
        "options": given,
        "images": images,
        "left_out": [": ".join(failure) for failure in failures],
    }


if __name__ == "__main__":
    main()
