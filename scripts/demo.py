"""Run the demo on drawn scenes: make the data, train from random negatives, fine-tune without and with IAIS, evaluate, report.

    python scripts/demo.py --seed 1

The scenes are drawings of coloured shapes; recalls on them say nothing about Flickr30k or COCO. Finished steps are kept:
rerunning resumes an interrupted demo, or prints the table again.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.startup import one_line_errors
from examples.scenes.demo import run_demo
from utils.files import exclusive_folder
from utils.provenance import ROOT
from utils.signals import StopSignal


@one_line_errors
def main(arguments: list[str] | None = None) -> None:
    """Parse the options and run the demo."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--seed", type=int, default=42, help="random seed of weights and sampling; the scenes are always the same (%(default)s)"
    )
    options = parser.parse_args(arguments)
    os.chdir(ROOT)
    with StopSignal(), exclusive_folder("demo"):
        run_demo(options.seed)


if __name__ == "__main__":
    main()
