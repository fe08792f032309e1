"""Download and unpack the published archives of UNITER's image-text retrieval.

    bash scripts/download_itm.sh STORAGE [flickr|coco|all] [--mirror URL] [--from DIR] [--jobs N]

STORAGE then has img_db/, txt_db/, pretrained/ and an empty finetune/. Existing files are not requested again, and rerunning
resumes an interrupted download.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.startup import one_line_errors
from data.sources.download import DATASETS, ORIGINAL, download
from utils.signals import StopSignal


@one_line_errors
def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and complete what is missing."""
    parser = argparse.ArgumentParser(
        prog="scripts/download_itm.sh",
        description="Download and unpack the published archives of image-text retrieval; existing files are not touched.",
        allow_abbrev=False,
    )
    parser.add_argument("storage", type=Path, metavar="STORAGE", help="folder for img_db/, txt_db/, pretrained/ and finetune/")
    parser.add_argument("dataset", nargs="?", choices=DATASETS, default="all", help="flickr, coco or all (default: all)")
    parser.add_argument("--mirror", metavar="URL", help=f"URL above img_db/ and the others ({ORIGINAL})")
    parser.add_argument("--from", dest="folder", type=Path, metavar="DIR", help="folder of files to use before the mirror's")
    parser.add_argument("--jobs", type=int, default=4, metavar="N", help="files at a time (default: %(default)s)")
    options = parser.parse_intermixed_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: expected at least 1")
    if options.mirror and not re.fullmatch(r"https?://[^/\s]\S*", options.mirror):
        parser.error(f"--mirror {options.mirror!r}: expected an address that begins with http:// or https://")
    mirror = options.mirror or ("" if options.folder else ORIGINAL)
    with StopSignal():
        download(options.storage, DATASETS[options.dataset], mirror.rstrip("/"), options.folder, options.jobs)


if __name__ == "__main__":
    main()
