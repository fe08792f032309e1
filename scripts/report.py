#!/usr/bin/env python
"""Write an HTML page about one or more evaluations of the same texts and images: a folder that opens without a server.

    python scripts/report.py runs/plain/test runs/singular/test --images photos --output report

It has the recalls side by side, the ranks, the scores, and the hardest queries with what the runs answered to them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.startup import one_line_errors
from evaluation.report.page import QUERIES, write_report
from utils.errors import InputError
from utils.signals import StopSignal


@one_line_errors
def main(arguments: list[str] | None = None) -> None:
    """Read the runs, write the page, say where."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "runs", metavar="RUN", type=Path, nargs="+", help="output folder of inf_itm.py; differences are to the first"
    )
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder to write, which must not exist")
    parser.add_argument("--images", metavar="DIR", type=Path, help="folder of pictures, for thumbnails")
    parser.add_argument(
        "--queries", metavar="N", type=int, default=QUERIES, help="hardest queries to show in each direction (%(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.queries < 1:
        raise InputError(f"--queries {options.queries}: expected at least 1")
    with StopSignal():
        write_report(options.runs, options.output, options.images, options.queries)
    print(options.output / "index.html")


if __name__ == "__main__":
    main()
