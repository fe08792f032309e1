"""Show and check a text or an image database; given one of each, also check that they match.

    python scripts/inspect_db.py itm_flickr30k_test.db img_db/flickr30k --plot flickr30k.png

Ends with a list of what is wrong and exit code 1, or with exit code 0.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.startup import one_line_errors
from data.inspection.images import compare, inspect_images, lmdb_folders
from data.inspection.reading import Reading
from data.inspection.report import Report
from data.inspection.screen import draw, draw_faults, save_plot
from data.inspection.texts import inspect_texts, is_text_database
from utils.errors import InputError
from utils.files import atomic_file
from utils.parallel import add_nproc


def folders_of(paths: list[Path]) -> tuple[list[Path], list[Path]]:
    """Sort one or two ``paths`` into the text database and the LMDB folders of the image database."""
    try:
        texts = [path for path in paths if is_text_database(path)]
        images = [lmdb_folders(path) for path in paths if path not in texts]
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from error
    if len(paths) == 2 and len(texts) != 1:
        kind = "text" if texts else "image"
        raise InputError(f"{paths[0]} and {paths[1]}: two {kind} databases, expected a text and an image database")
    return texts, images[0] if images else []


def inspect(texts: list[Path], images: list[Path], reading: Reading) -> Iterator[Report]:
    """Report on every database, then on how the images of each fit the texts."""
    image_of, names = {}, {}
    for folder in texts:
        report, image_of[folder] = inspect_texts(folder, reading)
        yield report
    for folder in images:
        report, names[folder] = inspect_images(folder, reading)
        yield report
    for (text_folder, wanted), (image_folder, present) in product(image_of.items(), names.items()):
        if wanted is not None and present is not None:
            yield compare(text_folder, wanted, image_folder, present)


@one_line_errors
def main(arguments: list[str] | None = None) -> None:
    """Inspect, print each report when it is ready, then list what is wrong."""
    parser = argparse.ArgumentParser(
        description="Show what is in a database and check it; with a text and an image database, also whether they fit.",
        allow_abbrev=False,
    )
    parser.add_argument("database", metavar="DB", type=Path, help="text database, image database or one LMDB folder of it")
    parser.add_argument("other", metavar="DB", type=Path, nargs="?", help="the image database of the texts, or vice versa")
    parser.add_argument("--sample", type=int, metavar="N", help="read only N records of each database, drawn at random")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the histograms and the ranges of values")
    add_nproc(parser)
    options = parser.parse_args(arguments)
    if options.sample is not None and options.sample < 1:
        raise InputError(f"--sample {options.sample}: expected at least 1")
    if options.plot is not None and options.plot.suffix.lower() != ".png":
        raise InputError(f"--plot {options.plot}: expected a file name that ends in .png")
    given = [path for path in (options.database, options.other) if path is not None]
    # The name of an image database's folder has a meaning, and "." has none.
    texts, images = folders_of([path if path.name not in ("", "..") else path.resolve() for path in given])
    # Opened first: hours of reading should not end in a plot that cannot be written.
    with atomic_file(options.plot) if options.plot else nullcontext() as file:
        reports = []
        for report in inspect(texts, images, Reading(options.sample, options.nproc)):
            print("\n".join(draw(report)), flush=True)
            reports.append(report)
        if file is not None:
            save_plot(reports, file)
    print("\n".join(draw_faults(reports)))
    if any(report.faults for report in reports):
        sys.exit(1)


if __name__ == "__main__":
    main()
