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
from collections.abc import Callable
from pathlib import Path
from typing import Any

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

NARROW = UniterConfig(img_dim=8)


def evaluation(folder: Path) -> dict[str, float]:
    """Score everything in ``folder`` and compute recall; return the seconds of scoring and the peak in additional bytes."""
    config = UniterConfig.from_json(ROOT / "config/uniter-tiny.json")
    model, compute = random_model(config), compute_settings(config, pairs=400)
    with open_split(folder, config) as split:
        shape = len(split.text_db), len(split.image_names)
        before = start_memory_peak(CPU)
        started = time.perf_counter()
        with partial_scores(folder, shape, {}) as scores:
            score_matrix(model, split, compute, Loader(CPU), SingleProcess(), into=scores)
            seconds = time.perf_counter() - started
            recalls(ranks(scores, split.image_of))
        return {"texts": shape[0], "images": shape[1], "seconds": seconds, "bytes": memory_peak(CPU) - before}


def recall(texts: int, images: int) -> tuple[float, int]:
    """Compute recall from random scores in a file; return seconds and the peak in additional bytes."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.npy"
        scores = np.lib.format.open_memmap(path, "w+", np.float32, (texts, images))
        for row in scores:
            row[:] = rng.random(images, np.float32)
        scores.flush()
        del scores
        before = start_memory_peak(CPU)
        seconds = seconds_of(lambda: recalls(ranks(np.load(path, mmap_mode="r"), np.arange(texts) % images)))
        return seconds, memory_peak(CPU) - before


def write_many(folder: Path, texts: int) -> None:
    """Write a database of short texts, five per image."""
    arrays = np.ones((10, NARROW.img_dim), np.float16), np.full((10, 6), 0.5, np.float16), np.ones(10, np.float16)
    with ImageDatabaseWriter(folder / "images") as writer:
        for number in range(texts // 5):
            writer.put(image_name(number), *arrays)
    write_texts(folder, NARROW, np.random.default_rng(0), ((image_name(number // 5), 12) for number in range(texts)))


def opening(folder: Path) -> dict[str, float]:
    """Open a database for training; return seconds, and the bytes that this process and a loader worker then hold."""
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
        worker = max(_private_bytes(int(child)) for child in children)
    return {"open": opened, "first halves": first, "peak": peak, "held": held, "worker": worker}


def _private_bytes(process: int) -> int:
    """Return the memory that a process shares with no other."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private"))


def measure(function: Callable[[Path], Any], write: Callable[..., None], *sizes: Any) -> Any:
    """Call ``function`` in a process of its own, on a folder that ``write`` has filled."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), *sizes)
        return in_new_process(function, Path(folder))


def size(words: str) -> tuple[int, int]:
    """Parse texts x images, such as 400x200."""
    texts, images = map(int, words.split("x"))
    return texts, images


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    slices, matrices = [(200, 200), (400, 400), (1000, 400)], [(5000, 1000), (25000, 5000)]
    for name, default, use in (("slices", slices, "scored"), ("matrices", matrices, "only ranked")):
        parser.add_argument(
            f"--{name}", nargs="+", type=size, default=default, help=f"sizes such as 400x200, texts x images, {use}"
        )
    parser.add_argument("--texts", nargs="+", type=int, default=[100_000, 1_000_000], help="sizes of the databases to open")
    options = parser.parse_args()
    for texts, images in options.slices:
        found = measure(evaluation, write_data, UniterConfig(), images, texts)
        texts, images = found["texts"], found["images"]
        print(
            f"{texts:,} x {images:,}: {found['seconds']:.1f} s, {1e6 * found['seconds'] / (texts * images):.0f} µs per pair, "
            f"{found['bytes'] / 1e6:.0f} MB of additional memory; the matrix has {4 * texts * images / 1e6:.1f} MB"
        )
    for texts, images in options.matrices:
        seconds, memory = recall(texts, images)
        print(
            f"recalls of {texts:,} x {images:,}: {seconds:.1f} s; {memory / 1e6:.0f} MB, "
            f"including pages of the file, which has {4 * texts * images / 1e6:.0f} MB"
        )
    for texts in options.texts:
        found = measure(opening, write_many, texts)
        print(
            f"{texts:,} texts: open in {found['open']:.1f} s, first halves after {found['first halves']:.1f} s; "
            f"{found['peak'] / 1e6:.0f} MB at the peak, {found['held'] / 1e6:.0f} MB held; "
            f"a loader worker has {found['worker'] / 1e6:.0f} MB of its own"
        )
    print(json.dumps(provenance()))


if __name__ == "__main__":
    main()
