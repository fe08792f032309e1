"""Draw the scenes dataset: pictures of simple shapes with captions, features, phrase boxes and twin pairs.

    python scripts/make_scenes.py --output DIR [--seed 0] [--train 2000 --val 100 --test 200] [--twins 0.1] [--workers N]
    python scripts/make_scenes.py --output DIR --twins 1 --relations 5 --items 2 3     (mostly relations)

The scenes are drawn by this program. They make the whole pipeline run on a bare machine within minutes, on files in the formats
of real sources; results on them say nothing about Flickr30k, COCO or any other collection of photographs.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils.startup import one_line_errors

# The matrices are small: a thread pool in each worker process would cost far more than it saves.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from examples.scenes.captions import CAPTIONS, NUMBERS
from examples.scenes.dataset import SPLITS, Recipe, make_scenes
from utils.errors import InputError
from utils.parallel import cores


@one_line_errors
def main(arguments: list[str] | None = None) -> None:
    """Parse and check the options, then draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="folder to create; must not exist yet")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    for split, count in zip(SPLITS, (2000, 100, 200), strict=True):
        parser.add_argument(f"--{split}", type=int, default=count, help=f"images in the {split} split (default {count})")
    parser.add_argument("--twins", type=float, default=0.1, help="share of images in twin pairs (default 0.1)")
    parser.add_argument(
        "--items", type=int, nargs=2, default=(3, 6), metavar=("MIN", "MAX"), help="items per scene (default 3 6)"
    )
    parser.add_argument("--relations", type=int, default=2, help="captions per image, of 5, that relate two items (default 2)")
    parser.add_argument("--workers", type=int, default=cores(), help="processes (default: all cores)")
    options = parser.parse_args(arguments)
    for name in (*SPLITS, "workers"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} {getattr(options, name)}: expected at least 1")
    if options.seed < 0:
        raise InputError(f"--seed {options.seed}: expected at least 0")
    if not 0 <= options.twins <= 1:
        raise InputError(f"--twins {options.twins}: expected a share between 0 and 1")
    if not 2 <= options.relations <= CAPTIONS:
        raise InputError(f"--relations {options.relations}: expected 2 to {CAPTIONS}")
    fewest, most = options.items
    least = 2 if options.relations == CAPTIONS else 3  # the other captions mention three items
    if not least <= fewest <= most <= max(NUMBERS):
        raise InputError(f"--items {fewest} {most}: expected two numbers from {least} to {max(NUMBERS)}, the smaller first")
    recipe = Recipe(options.seed, options.twins, (fewest, most), options.relations)
    make_scenes(options.output, {split: getattr(options, split) for split in SPLITS}, recipe, options.workers)
    print(f"wrote {options.output} (drawn scenes: results on them say nothing about Flickr30k or COCO)")


if __name__ == "__main__":
    main()
