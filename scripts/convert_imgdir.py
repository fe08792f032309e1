"""Make an image database from region features in any supported detector format.

    python scripts/convert_imgdir.py --img_dir features/ --output img_db/flickr30k
    python scripts/convert_imgdir.py --tsv karpathy_val_resnet101_faster_rcnn_genome.tsv.0 … --prefix coco_val2014_ --output …

The database appears only when it is complete. Images that cannot be used are left out and listed at the end, with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.startup import one_line_errors
from data.boxes import BoxRule
from data.image_db import ImageDatabaseWriter
from data.sources import region_files, region_tsv
from data.sources.regions import Conversion, Source, naming
from utils.errors import InputError, counted
from utils.parallel import add_nproc
from utils.provenance import made_by
from utils.signals import StopSignal


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Make an image database from region features.", allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--img_dir", type=Path, help="folder with an .npz (UNITER, MILVLG) or a pair of .npy (MMF) per image")
    source.add_argument("--tsv", type=Path, nargs="+", help="TSV files of bottom-up-attention, py-bottom-up-attention or VinVL")
    parser.add_argument("--sizes", type=Path, help="for VinVL's TSV: its hw.tsv with the heights and widths of the pictures")
    names = parser.add_mutually_exclusive_group()
    names.add_argument("--prefix", help="name images by it and their number: flickr30k_, coco_train2014_, coco_val2014_")
    names.add_argument("--annotations", type=Path, help="name images as the text databases made from these annotations do")
    parser.add_argument("--output", type=Path, required=True, help="image database to make, later the value of --img_db")
    for rule in fields(BoxRule):
        words = f"{rule.metadata['help']} (%(default)s)"
        parser.add_argument(f"--{rule.name}", type=type(rule.default), default=rule.default, help=words)
    parser.add_argument("--keep_all", action="store_true", help="keep every box, to be filtered when the database is read")
    parser.add_argument("--compress", action="store_true", help="compress records, to be read with --compressed_db")
    add_nproc(parser)
    return parser.parse_args(arguments)


def open_sources(options: argparse.Namespace) -> tuple[Iterable[Source], int | None]:
    """The images to convert, and their number if known. Raises ``InputError``."""
    tables = [(path, region_tsv.kind_of(path)) for path in options.tsv or ()]
    kinds = {kind for _, kind in tables}
    if (region_tsv.VINVL in kinds) != (options.sizes is not None):
        raise InputError("--sizes: required for VinVL's TSV, whose boxes are in pixels, and for no other; expected its hw.tsv")
    if options.img_dir is not None:
        images = region_files.sources_of(options.img_dir)
        if any(image.id.endswith(".npy") for image in images):
            warn_of_detector("MMF")
        return images, len(images)
    if options.keep_all and region_tsv.BUTD in kinds:
        raise InputError("--keep_all: bottom-up-attention's TSV has no confidences to filter by when the database is read")
    if options.sizes:
        warn_of_detector("VinVL")
    sizes = region_tsv.read_sizes(options.sizes) if options.sizes else {}
    return chain.from_iterable(region_tsv.sources_of(path, kind, sizes) for path, kind in tables), None


def warn_of_detector(name: str) -> None:
    """Warn on stderr that the published weights do not fit these features."""
    print(
        f"warning: UNITER's weights were trained on other features than {name}'s; the model must be retrained", file=sys.stderr
    )


@one_line_errors
def main(arguments: list[str] | None = None) -> None:
    """Convert every image, then list those that could not be used."""
    options = parse_options(arguments)
    name_of = naming(options.prefix, options.annotations)
    sources, total = open_sources(options)
    rule = None if options.keep_all else BoxRule(**{rule.name: getattr(options, rule.name) for rule in fields(BoxRule)})
    writer = ImageDatabaseWriter(options.output, rule, compressed=options.compress)
    conversion = Conversion()
    try:
        with StopSignal(), writer as database:
            conversion.run(sources, name_of, database, options.nproc, total)
            if not conversion.images:
                raise InputError(f"{database.lmdb_path}: not made, no image can be used")
            database.made = provenance(options, conversion)
    finally:  # also if the conversion is interrupted
        list_failures(conversion)
    images = counted(conversion.images, "image")
    print(f"{writer.lmdb_path}: {images}, {conversion.boxes / conversion.images:.1f} boxes per image")
    if conversion.failures:
        sys.exit(1)


def list_failures(conversion: Conversion) -> None:
    """Print on stderr the images that could not be used."""
    failures = conversion.failures
    if failures:
        seen = conversion.images + len(failures)
        print(f"{len(failures)} of {counted(seen, 'image')} could not be used, left out:", file=sys.stderr)
    for place, reason in failures:
        print(f"  {place}: {reason}", file=sys.stderr)


def provenance(options: argparse.Namespace, conversion: Conversion) -> dict[str, Any]:
    """The contents of ``made_<folder>.json``."""
    given = json.loads(json.dumps({key: value for key, value in vars(options).items() if value is not None}, default=str))
    left_out = [": ".join(failure) for failure in conversion.failures]
    return {"made_by": made_by(__file__), "options": given, "images": conversion.images, "left_out": left_out}


if __name__ == "__main__":
    main()
