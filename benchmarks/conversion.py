"""Measure how fast captions and region features become databases, and what bounds it: unpacking, packing and the disk.

    python benchmarks/conversion.py --captions 200000 --images 3000

Runs the converters as a user does, on random data of Flickr30k's sizes. "Unpacking" is the time to read the source and undo its
compression or base64, "packing" the time to compress the records, each divided by the number of processes; "disk" is the time
to write as many bytes as the database has. What a conversion takes beyond the largest of them is the program's own.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.machine import CPU, describe, seconds_of
from benchmarks.synthetic import image_name, random_regions
from data.records import read_members, write_npz
from data.tokenizer import load_tokenizer
from utils.provenance import ROOT, provenance

WIDTH, SIDE = 2048, 1000  # numbers per feature; side of a picture in pixels
PROGRAM = """import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))"""


def convert(program: str, *options: object, output: Path) -> tuple[float, str, int]:
    """Run one of ``scripts/``; return its seconds, start included, the peak memory of its first process, and bytes written."""
    command = [sys.executable, "-c", PROGRAM, ROOT / "scripts" / program, *options, "--output", output]
    started = time.perf_counter()
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{program} failed")
    seconds = time.perf_counter() - started
    size = sum(path.stat().st_size for path in output.rglob("data.mdb"))
    shutil.rmtree(output)
    return seconds, f"{int(done.stdout.split()[-1]) / 1000:,.0f} MB", size


def write_captions(path: Path, count: int) -> None:
    """Write Karpathy's JSON with captions of 6 to 17 words, whose frequencies fall as those of real words."""
    rng = np.random.default_rng(0)
    words = np.array([piece for piece in load_tokenizer().pieces[1000:] if piece.isalpha()])
    share = 1 / np.arange(1, len(words) + 1)
    drawn = iter(rng.choice(words, 18 * count, p=share / share.sum()).tolist())
    images = []
    for number in range(count // 5):
        captions = [" ".join(next(drawn) for _ in range(length)) + "." for length in rng.integers(6, 18, 5)]
        sentences = [{"raw": raw, "sentid": 5 * number + index} for index, raw in enumerate(captions)]
        images.append({"filename": f"{number}.jpg", "split": "train", "sentences": sentences})
    path.write_text(json.dumps({"dataset": "flickr30k", "images": images}))


def write_sources(folder: Path, count: int) -> dict[str, Path]:
    """Write the same images as compressed and plain ``.npz`` and, without class scores, as bottom-up-attention's TSV."""
    rng = np.random.default_rng(0)
    sources = {name: folder / name for name in ("compressed .npz", "plain .npz", "TSV")}
    compressed, plain, table = sources.values()
    compressed.mkdir()
    plain.mkdir()
    with open(table, "w") as rows:
        for number in range(count):
            arrays = random_regions(rng, WIDTH)
            np.savez_compressed(compressed / image_name(number), **arrays)
            np.savez(plain / image_name(number), **arrays)
            boxes, features = (arrays[name].astype("<f4") for name in ("norm_bb", "features"))
            encoded = [base64.b64encode(array.tobytes()).decode() for array in (boxes[:, :4] * SIDE, features)]
            print(number, SIDE, SIDE, len(features), *encoded, sep="\t", file=rows)
    return sources


def unpack(source: Path) -> None:
    """Read a source and undo its compression or base64."""
    if source.is_dir():
        for path in source.iterdir():
            read_members(path.read_bytes(), ("features", "norm_bb", "conf", "soft_labels"))
    else:
        with open(source, "rb") as table:
            for field in (field for row in table for field in row.split(b"\t")[4:]):
                base64.b64decode(field.strip(), validate=True)


def write(path: Path, size: int) -> None:
    """Write ``size`` bytes, rounded down to MiB, to the disk."""
    with open(path, "wb") as file:
        file.writelines(itertools.repeat(os.urandom(1 << 20), size >> 20))
        os.fsync(file.fileno())


def measure_images(folder: Path, count: int, processes: list[int]) -> None:
    """Convert each source to plain and to compressed image databases and print a line for each number of processes."""
    rng = np.random.default_rng(0)
    packing = seconds_of(lambda: [write_npz(random_regions(rng, WIDTH)) for _ in range(20)]) * count / 20
    for name, source in write_sources(folder, count).items():
        unpack(source)  # brings what fits there into the page cache, for both
        unpacking = seconds_of(lambda source=source: unpack(source))
        for flags, nproc in itertools.product(([], ["--compress"]), processes):
            options = ["--img_dir" if source.is_dir() else "--tsv", source, *flags, "--nproc", nproc]
            seconds, memory, size = convert("convert_imgdir.py", *options, output=folder / "images")
            disk = seconds_of(lambda size=size: write(folder / "block", size))
            print(
                f"{count:,} images, {name}{' to compressed' if flags else ''}, {nproc} processes: {seconds:.1f} s, "
                f"{count / seconds:,.0f} images/s, {size / seconds / 1e6:,.0f} MB/s, {memory}; unpacking "
                f"{unpacking / nproc:.1f} s, disk {disk:.1f} s" + (f", packing {packing / nproc:.1f} s" if flags else "")
            )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=200_000)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--nproc", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, count = Path(folder, "dataset_random.json"), options.captions
        write_captions(source, count)
        for nproc in options.nproc:
            flags = ["--annotations", source, "--split", "train", "--nproc", nproc]
            seconds, memory, _ = convert("create_txtdb.py", *flags, output=Path(folder, "texts.db"))
            print(f"{count:,} captions, {nproc} processes: {seconds:.1f} s, {count / seconds:,.0f} captions/s, {memory}")
        measure_images(Path(folder), options.images, options.nproc)
    print(f"on {describe(CPU)}, {provenance()['machine']}")


if __name__ == "__main__":
    main()
