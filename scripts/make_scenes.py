"""Draws the scenes dataset: pictures of simple shapes with captions, features, phrase boxes and twin pairs.

    python scripts/make_scenes.py --output DIR [--seed 0] [--train 2000 --val 100 --test 200] [--twins 0.1] [--workers N]
    python scripts/make_scenes.py --output DIR --twins 1 --relations 5 --items 2 3     (a test of relations and little else)

The scenes are drawn by this program. They make the whole pipeline run on a bare machine, in minutes, on files laid out like
the real ones; results on them say nothing about Flickr30k, COCO or any other collection of photographs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# the matrices are small: a thread pool in each worker process would cost far more than it saves
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from tqdm import tqdm

from examples.scenes.captions import CAPTIONS, NUMBERS
from examples.scenes.write import SPLITS, Job, Recipe, captions_of, plan, scene_of, twins_of, write_image, write_winoground
from utils.errors import InputError, one_line_errors
from utils.files import atomic_folder

README = """\
The scenes dataset: drawn pictures of simple shapes, made by
scripts/make_scenes.py --seed {seed} --twins {twins} --items {items} --relations {relations}.

THESE ARE DRAWN SCENES, NOT PHOTOGRAPHS. Results on them say nothing about Flickr30k, COCO or any other real collection.
They exist so that every program of this repository can be run from end to end on a bare machine.

images/                 {images} pictures ({train} train, {val} val, {test} test)
dataset_scenes.json     five captions an image, in the layout of Karpathy's files
features/               region features of each picture, computed from its pixels by fixed rules (no network, nothing learned)
entities/               phrases and their boxes, in the layout of Flickr30k Entities
twins.json              the twin of each image that has one, as --neighbours of the training takes it
winoground/             {examples} examples from the twins of the test split, in the layout of Winoground

A share of {twins} of the images of each split belongs to twin pairs: same items, same background, two items changed
places. The first {relations} captions of each twin consist of the same words as its twin's and are false of it.

How well the captions can identify their image, known from the drawings themselves: a caption of the test split is true of
{mean:.2f} of the {test} test images on average (median {median:.0f}, at most {most}); of {unique:.1%} of the captions it is
true of one image only. Who reads everything rightly and guesses among what fits reaches a text-to-image R@1 of {ceiling:.1%}.
"""


@one_line_errors
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="folder to make; must not exist yet")
    parser.add_argument("--seed", type=int, default=0)
    for split, count in zip(SPLITS, (2000, 100, 200), strict=True):
        parser.add_argument(f"--{split}", type=int, default=count, help=f"images of the {split} split (default {count})")
    parser.add_argument("--twins", type=float, default=0.1, help="share of images in twin pairs (default 0.1)")
    parser.add_argument(
        "--items", type=int, nargs=2, default=(3, 6), metavar=("MIN", "MAX"), help="items in a scene (default 3 6)"
    )
    parser.add_argument(
        "--relations", type=int, default=2, help="captions of an image, of 5, that relate two items (default 2)"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
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
    least = 2 if options.relations == CAPTIONS else 3  # the other captions speak of three items
    if not least <= fewest <= most <= max(NUMBERS):
        raise InputError(f"--items {fewest} {most}: expected two numbers from {least} to {max(NUMBERS)}, the smaller first")
    recipe = Recipe(options.seed, options.twins, (fewest, most), options.relations)
    make_scenes(options.output, {split: getattr(options, split) for split in SPLITS}, recipe, options.workers)
    print(f"wrote {options.output} (drawn scenes: results on them say nothing about Flickr30k or COCO)")


def make_scenes(output: Path, counts: dict[str, int], recipe: Recipe, workers: int) -> None:
    """Makes the folder ``output``; the files are the same whatever the number of workers.

    Raises:
        InputError: ``output`` exists, or cannot be made.
    """
    jobs = plan(counts, recipe)
    of_split = {split: [job for job in jobs if job.split == split] for split in SPLITS}
    with atomic_folder(output) as root:
        for folder in ("images", "features", "entities/Sentences", "entities/Annotations"):
            (root / folder).mkdir(parents=True)
        work = partial(write_image, root, recipe=recipe)
        if workers == 1:
            images = _collect(map(work, jobs), len(jobs))
        else:
            # spawned, not forked: whoever calls this may have threads running
            with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
                images = _collect(pool.map(work, jobs, chunksize=16), len(jobs))
        text = json.dumps({"dataset": "scenes", "images": images}, indent=1)
        (root / "dataset_scenes.json").write_text(text, encoding="utf-8")
        pairs = [
            (one.stem, other.stem) for of in of_split.values() for twins in twins_of(of) for one, other in permutations(twins)
        ]
        neighbours = {f"{one}.npz": [f"{other}.npz"] for one, other in pairs}
        (root / "twins.json").write_text(json.dumps(neighbours, indent=1), encoding="utf-8")
        examples = write_winoground(root / "winoground" / "examples.jsonl", of_split["test"], recipe)
        fitting = images_per_caption(of_split["test"], recipe)
        readme = README.format(
            seed=recipe.seed,
            twins=recipe.twins,
            items="{} {}".format(*recipe.items),
            relations=recipe.relations,
            images=len(jobs),
            **counts,
            examples=examples,
            mean=fitting.mean(),
            median=np.median(fitting),
            most=fitting.max(),
            unique=(fitting == 1).mean(),
            ceiling=(1 / fitting).mean(),
        )
        (root / "README.txt").write_text(readme, encoding="utf-8")


def images_per_caption(jobs: list[Job], recipe: Recipe) -> np.ndarray:
    """For each caption of these images, of how many of the images it is true; (images * 5,)."""
    scenes = [scene_of(job, recipe) for job in jobs]
    captions = [caption for job, scene in zip(jobs, scenes, strict=True) for caption in captions_of(job, scene, recipe)]
    return np.array([sum(caption.holds(scene.items) for scene in scenes) for caption in captions])


def _collect(results: Iterator[dict[str, Any]], total: int) -> list[dict[str, Any]]:
    return list(tqdm(results, total=total, desc="drawing scenes", unit="image", disable=None))


if __name__ == "__main__":
    main()
