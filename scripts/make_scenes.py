"""Draws the scenes dataset: pictures of simple shapes with captions, features, phrase boxes and twin pairs.

    python scripts/make_scenes.py --output DIR [--seed 0] [--train 2000 --val 100 --test 200] [--twins 0.1] [--workers N]

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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# the matrices are small: a thread pool in each worker process would cost far more than it saves
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from tqdm import tqdm

from scripts.scenes.write import SPLITS, Job, captions_of, plan, scene_of, write_image, write_winoground
from utils.errors import InputError, one_line_errors
from utils.files import building

README = """\
The scenes dataset: drawn pictures of simple shapes, made by scripts/make_scenes.py --seed {seed} --twins {twins}.

THESE ARE DRAWN SCENES, NOT PHOTOGRAPHS. Results on them say nothing about Flickr30k, COCO or any other real collection.
They exist so that every program of this repository can be run from end to end on a bare machine.

images/                 {images} pictures ({train} train, {val} val, {test} test)
dataset_scenes.json     five captions an image, in the layout of Karpathy's files
features/               region features of each picture, computed from its pixels by fixed rules (no network, nothing learned)
entities/               phrases and their boxes, in the layout of Flickr30k Entities
winoground/             {examples} examples from the twins of the test split, in the layout of Winoground

A share of {twins} of the images of each split belongs to twin pairs: same items, same background, two items changed
places. Two captions of each twin consist of the same words as its twin's and are false of it.

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
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    options = parser.parse_args(arguments)
    for name in (*SPLITS, "workers"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} {getattr(options, name)}: expected at least 1")
    if options.seed < 0:
        raise InputError(f"--seed {options.seed}: expected at least 0")
    if not 0 <= options.twins <= 1:
        raise InputError(f"--twins {options.twins}: expected a share between 0 and 1")
    make_scenes(
        options.output, {split: getattr(options, split) for split in SPLITS}, options.twins, options.seed, options.workers
    )
    print(f"wrote {options.output} (drawn scenes: results on them say nothing about Flickr30k or COCO)")


def make_scenes(output: Path, counts: dict[str, int], twins: float, seed: int, workers: int) -> None:
    """Makes the folder ``output``; the files are the same whatever the number of workers.

    Raises:
        InputError: ``output`` exists, or cannot be made.
    """
    jobs = plan(counts, twins, seed)
    with building(output) as root:
        for folder in ("images", "features", "entities/Sentences", "entities/Annotations"):
            (root / folder).mkdir(parents=True)
        work = partial(write_image, root, seed=seed)
        if workers == 1:
            images = _collect(map(work, jobs), len(jobs))
        else:
            # spawned, not forked: whoever calls this may have threads running
            with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
                images = _collect(pool.map(work, jobs, chunksize=16), len(jobs))
        text = json.dumps({"dataset": "scenes", "images": images}, indent=1)
        (root / "dataset_scenes.json").write_text(text, encoding="utf-8")
        examples = write_winoground(root / "winoground" / "examples.jsonl", jobs, seed)
        fitting = images_per_caption([job for job in jobs if job.split == "test"], seed)
        readme = README.format(
            seed=seed,
            twins=twins,
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


def images_per_caption(jobs: list[Job], seed: int) -> np.ndarray:
    """For each caption of these images, of how many of the images it is true; (images * 5,)."""
    scenes = [scene_of(job, seed) for job in jobs]
    captions = [caption for job, scene in zip(jobs, scenes, strict=True) for caption in captions_of(job, scene, seed)]
    return np.array([sum(caption.holds(scene.items) for scene in scenes) for caption in captions])


def _collect(results: Iterator[dict[str, Any]], total: int) -> list[dict[str, Any]]:
    return list(tqdm(results, total=total, desc="drawing scenes", unit="image", disable=None))


if __name__ == "__main__":
    main()
