"""Measure how cost grows: evaluation with the number of pairs, and a text database with the number of its texts.

    python benchmarks/growth.py

Evaluation scores slices of random data of Flickr30k's sizes with UNITER-tiny, each in a process of its own, into a matrix in a
file, as inf_itm.py does. The databases of up to a million texts have five per image, with features 8 numbers wide.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.machine import CPU, in_new_process, memory_peak, seconds_of, start_memory_peak
from benchmarks.synthetic import compute_settings, image_name, open_split, random_model, write_data, write_texts
from data.datasets import HardNegativeDataset
from data.image_db import ImageDatabaseWriter
from data.loader import Loader
from evaluation.recall import ranks, recalls
from evaluation.scoring import partial_scores, score_matrix
from model.config import UniterConfig
from utils.distributed import SingleProcess
from utils.provenance import ROOT, provenance

WIDE, NARROW = UniterConfig(), UniterConfig(img_dim=8)


def evaluation(folder: Path) -> str:
    """Score everything in ``folder`` and compute recall."""
    config = UniterConfig.from_json(ROOT / "config/uniter-tiny.json")
    model, compute = random_model(config), compute_settings(config, pairs=400)
    with open_split(folder, config) as split:
        shape = len(split.text_db), len(split.image_names)
        before = start_memory_peak(CPU)
        with partial_scores(folder, shape, {}) as scores:
            seconds = seconds_of(lambda: score_matrix(model, split, compute, Loader(CPU), SingleProcess(), into=scores))
            recalls(ranks(scores, split.image_of))
        beyond = memory_peak(CPU) - before
    texts, images = shape
    return (
        f"{texts:,} x {images:,}: {seconds:.1f} s, {1e6 * seconds / (texts * images):.0f} µs per pair, "
        f"{beyond / 1e6:.0f} MB of additional memory; the matrix has {4 * texts * images / 1e6:.1f} MB"
    )


def write_scores(folder: Path, texts: int, images: int) -> None:
    """Write a matrix of random scores."""
    np.save(folder / "scores.npy", np.random.default_rng(0).random((texts, images), np.float32))


def recall(folder: Path) -> str:
    """Compute recall from the scores in the file."""
    scores = np.load(folder / "scores.npy", mmap_mode="r")
    texts, images = scores.shape
    before = start_memory_peak(CPU)
    seconds = seconds_of(lambda: recalls(ranks(scores, np.arange(texts) % images)))
    return (
        f"recalls of {texts:,} x {images:,}: {seconds:.1f} s; {(memory_peak(CPU) - before) / 1e6:.0f} MB, "
        f"including pages of the file, which has {scores.nbytes / 1e6:.0f} MB"
    )


def write_many(folder: Path, texts: int) -> None:
    """Write a database of short texts, five per image."""
    arrays = np.ones((10, NARROW.img_dim), np.float16), np.full((10, 6), 0.5, np.float16), np.ones(10, np.float16)
    with ImageDatabaseWriter(folder / "images") as writer:
        for number in range(texts // 5):
            writer.put(image_name(number), *arrays)
    write_texts(folder, NARROW, np.random.default_rng(0), ((image_name(number // 5), 12) for number in range(texts)))


def opening(folder: Path) -> str:
    """Open a database for training; measure seconds, and the memory that this process and a loader worker then hold."""
    before = start_memory_peak(CPU)
    started = time.perf_counter()
    with open_split(folder, NARROW) as split:
        dataset = HardNegativeDataset([split], negative_size=399, micro_steps=10**6)
        opened = time.perf_counter() - started
        peak, held = memory_peak(CPU) - before, start_memory_peak(CPU) - before
        dataset[0], dataset[1]
        first = time.perf_counter() - started
        halves = Loader(CPU, 1)(dataset)
        for _ in range(200):
            next(halves)
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        worker = max(_private_megabytes(child) for child in children)
    return (
        f"{len(split.text_db):,} texts: open in {opened:.1f} s, first halves after {first:.1f} s; {peak / 1e6:.0f} MB at the "
        f"peak, {held / 1e6:.0f} MB held; a loader worker owns {worker:.0f} MB"
    )


def _private_megabytes(process: str) -> float:
    """Return the memory that a process shares with no other."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private")) / 1e6


def main() -> None:
    """Measure and print."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for write, measure, sizes in (
        (write_data, evaluation, [(WIDE, 200, 200), (WIDE, 400, 400), (WIDE, 400, 1000)]),  # images, texts
        (write_scores, recall, [(5000, 1000), (25000, 5000)]),  # texts, images
        (write_many, opening, [(100_000,), (1_000_000,)]),
    ):
        for size in sizes:
            with tempfile.TemporaryDirectory() as folder:
                write(Path(folder), *size)
                print(in_new_process(measure, Path(folder)), flush=True)
    print(json.dumps(provenance()))


if __name__ == "__main__":
    main()
