"""How cost grows: evaluation with the number of pairs, and a text database with the number of its texts.

    python benchmarks/growth.py

Evaluation scores slices of random data of Flickr30k's sizes with UNITER-tiny, each in a process of its own, into a matrix in a
file, as inf_itm.py does. The databases of up to a million texts have five to an image, whose features are 8 numbers wide.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.machine import memory_peak, start_memory_peak
from benchmarks.synthetic import image_name, write_data
from data.datasets import HardNegativeDataset
from data.image_db import ImageDatabaseWriter
from data.loader import Loader
from data.split import RetrievalSplit
from data.text_db import TextDatabaseWriter
from evaluation.recall import ranks, recalls
from evaluation.scoring import score_matrix
from evaluation.unfinished import UnfinishedScores
from model.chunks import ChunkSize
from model.config import UniterConfig
from model.cpu import packed_for_inference
from model.retrieval import ComputeSettings, RetrievalModel
from utils.distributed import SingleProcess
from utils.precision import Precision
from utils.provenance import ROOT, provenance

CPU = torch.device("cpu")
WIDTH = 8


def evaluation(folder: Path) -> dict[str, float]:
    """Score what is in ``folder``, and rank: seconds of the scoring, and bytes at the peak of both beyond those before."""
    config = UniterConfig.from_json(ROOT / "config/uniter-tiny.json")
    torch.manual_seed(0)
    model = RetrievalModel(config)
    compute = ComputeSettings(
        Precision("fp32", CPU), ChunkSize.for_device(CPU, config.intermediate_size, 400), prepare=packed_for_inference
    )
    with RetrievalSplit(str(folder / "texts.db"), str(folder / "images"), config.input_limits) as source:
        shape = len(source.text_db), len(source.image_names)
        before = start_memory_peak(CPU)
        started = time.perf_counter()
        with UnfinishedScores(folder, shape, {}) as unfinished:
            scored = score_matrix(model, source, compute, Loader(CPU), SingleProcess(), into=unfinished.scores)
            assert scored is not None
            seconds = time.perf_counter() - started
            recalls(ranks(scored.scores, source.image_of))
    peak = memory_peak(CPU) - before
    return {"texts": shape[0], "images": shape[1], "seconds": seconds, "bytes": peak}


def ranking(texts: int, images: int) -> dict[str, float]:
    """Rank a matrix of random scores that lies in a file: seconds, and bytes beyond those before."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        scores = np.lib.format.open_memmap(Path(folder) / "scores.npy", "w+", np.float32, (texts, images))
        for row in scores:
            row[:] = rng.random(images, np.float32)
        scores.flush()
        del scores
        before = start_memory_peak(CPU)
        started = time.perf_counter()
        recalls(ranks(np.load(Path(folder) / "scores.npy", mmap_mode="r"), np.arange(texts) % images))
        return {"texts": texts, "images": images, "seconds": time.perf_counter() - started, "bytes": memory_peak(CPU) - before}


def write_many(folder: Path, texts: int) -> None:
    """A database of short texts, five to an image."""
    specials = {"CLS": 101, "SEP": 102, "MASK": 103, "UNK": 100, "v_range": [106, 28996]}
    rng = np.random.default_rng(0)
    with ImageDatabaseWriter(folder / "images") as writer:
        features, boxes, confidence = (
            np.ones((10, WIDTH), np.float16),
            np.full((10, 6), 0.5, np.float16),
            np.ones(10, np.float16),
        )
        for number in range(texts // 5):
            writer.put(image_name(number), features, boxes, confidence)
    with TextDatabaseWriter(folder / "texts.db", specials) as writer:
        for number in range(texts):
            writer.put(str(number), rng.integers(106, 28996, 12), image_name(number // 5))


def opening(folder: Path) -> dict[str, float]:
    """Seconds to open a database for training, and memory of its own that this process and a reading process then have."""
    config = UniterConfig(img_dim=WIDTH)
    before = start_memory_peak(CPU)
    started = time.perf_counter()
    with RetrievalSplit(str(folder / "texts.db"), str(folder / "images"), config.input_limits) as source:
        task = HardNegativeDataset([source], negative_size=399, micro_steps=10**6)
        opened = time.perf_counter() - started
        peak, after = memory_peak(CPU) - before, start_memory_peak(CPU) - before
        task[0], task[1]
        first = time.perf_counter() - started
        halves = Loader(CPU, 1)(task)
        for _ in range(200):
            next(halves)
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        own = max(_private_bytes(int(child)) for child in children)
    return {
        "texts": len(source.text_db), "open": opened, "first halves": first, "peak": peak, "held": after, "reader": own,
    }  # fmt: skip


def _private_bytes(process: int) -> int:
    """Memory that a process shares with no other."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private"))


def measure(what: str, folder: Path) -> dict[str, Any]:
    """``what`` of ``folder``, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--what", what, "--folder", folder], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure and print, or on behalf of another process measure one thing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--slices", nargs="+", default=["200x200", "400x400", "1000x400"], help="texts x images, which are no more"
    )
    parser.add_argument("--matrices", nargs="+", default=["5000x1000", "25000x5000"], help="texts x images, ranked alone")
    parser.add_argument("--texts", nargs="+", type=int, default=[100_000, 1_000_000], help="of the databases that are opened")
    parser.add_argument("--what", choices=("evaluation", "opening"), help="given by this program to its processes")
    parser.add_argument("--folder", type=Path, help="likewise")
    arguments = parser.parse_args()
    if arguments.what:
        print(json.dumps({"evaluation": evaluation, "opening": opening}[arguments.what](arguments.folder)))
        return

    for size in arguments.slices:
        texts, images = map(int, size.split("x"))
        with tempfile.TemporaryDirectory() as folder:
            write_data(Path(folder), UniterConfig(), images, texts)
            found = measure("evaluation", Path(folder))
        texts, images = found["texts"], found["images"]
        pairs = texts * images
        print(
            f"{texts:,} x {images:,}: {found['seconds']:.1f} s, {1e6 * found['seconds'] / pairs:.0f} µs a pair, "
            f"{found['bytes'] / 1e6:.0f} MB beyond what there was; the matrix has {4 * pairs / 1e6:.1f} MB"
        )
    for size in arguments.matrices:
        found = ranking(*map(int, size.split("x")))
        matrix = 4 * found["texts"] * found["images"] / 1e6
        print(
            f"recalls of {found['texts']:,} x {found['images']:,}: {found['seconds']:.1f} s; {found['bytes'] / 1e6:.0f} MB, "
            f"pages of the file included, which has {matrix:.0f} MB"
        )
    for texts in arguments.texts:
        with tempfile.TemporaryDirectory() as folder:
            write_many(Path(folder), texts)
            found = measure("opening", Path(folder))
        print(
            f"{texts:,} texts: open in {found['open']:.1f} s, first halves after {found['first halves']:.1f} s; "
            f"{found['peak'] / 1e6:.0f} MB at the peak, {found['held'] / 1e6:.0f} MB held; "
            f"a reading process has {found['reader'] / 1e6:.0f} MB of its own"
        )
    print(json.dumps(provenance()))


if __name__ == "__main__":
    main()
