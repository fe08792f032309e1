"""How fast captions and region features become databases, beside what bounds that: unpacking the source and the disk.

    python benchmarks/conversion.py --captions 200000 --images 3000

Runs the converters as a user does, on random data of Flickr30k's sizes. "Unpacking" is the time in which as many processes only
read the source and undo its compression or base64, "packing" that in which they compress the records, "disk" that of one
process that writes as many bytes as the database has. What a conversion takes beyond the largest of them is the program's own.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.machine import describe
from benchmarks.synthetic import image_name, random_regions
from data.records import read_members, write_npz
from data.tokenizer import load_tokenizer
from utils.precision import choose_device
from utils.provenance import ROOT, provenance

WIDTH, SIDE = 2048, 1000  # numbers per feature; pixels of a picture's side


def clock(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


RUN = """import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))"""


def convert(program: str, *words: object) -> tuple[float, float]:
    """Seconds of one of our programs, its start included, and the most memory of its first process in MB (on Linux)."""
    command = [sys.executable, "-c", RUN, str(ROOT / "scripts" / program), *map(str, words)]
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{program} failed")
    return time.perf_counter() - started, int(done.stdout.split()[-1]) / 1000


def write_captions(path: Path, count: int) -> None:
    """Karpathy's JSON with captions of 6 to 17 words, which are as unequally frequent as words are."""
    rng = np.random.default_rng(0)
    words = np.array([piece for piece in load_tokenizer().pieces[1000:] if piece.isalpha()])
    share = 1 / np.arange(1, len(words) + 1)
    drawn = iter(rng.choice(words, 18 * count, p=share / share.sum()).tolist())
    images = []
    for number in range(count // 5):
        captions = [" ".join(next(drawn) for _ in range(length)) + "." for length in rng.integers(6, 18, 5)]
        sentences = [{"raw": raw, "sentid": 5 * number + place} for place, raw in enumerate(captions)]
        images.append({"filename": f"{number}.jpg", "split": "train", "sentences": sentences})
    path.write_text(json.dumps({"dataset": "flickr30k", "images": images}))


def captions(folder: Path, count: int, processes: list[int]) -> None:
    """Measure text databases."""
    write_captions(folder / "dataset_random.json", count)
    for nproc in processes:
        words = ["--annotations", folder / "dataset_random.json", "--split", "train", "--output", folder / "texts.db"]
        seconds, memory = convert("create_txtdb.py", *words, "--nproc", nproc)
        print(f"{count:,} captions, {nproc} processes: {seconds:.1f} s, {count / seconds:,.0f} captions/s, {memory:,.0f} MB")
        shutil.rmtree(folder / "texts.db")


def write_sources(folder: Path, count: int) -> dict[str, Path]:
    """The same images as compressed and plain ``.npz`` and, without class scores, as bottom-up-attention's TSV."""
    rng = np.random.default_rng(0)
    sources = {name: folder / name for name in ("compressed .npz", "plain .npz", "TSV")}
    for name in ("compressed .npz", "plain .npz"):
        sources[name].mkdir()
    with open(sources["TSV"], "wb") as table:
        for number in range(count):
            arrays = random_regions(rng, WIDTH)
            np.savez_compressed(sources["compressed .npz"] / image_name(number), **arrays)
            np.savez(sources["plain .npz"] / image_name(number), **arrays)
            boxes, features = (arrays[name].astype("<f4") for name in ("norm_bb", "features"))
            packed = [base64.b64encode(array.tobytes()) for array in (boxes[:, :4] * SIDE, features)]
            head = [str(value).encode() for value in (number, SIDE, SIDE, len(features))]
            table.write(b"\t".join([*head, *packed]) + b"\n")
    return sources


def unpack(source: Path) -> None:
    """Read a source and undo what it is wrapped in."""
    if source.is_dir():
        for path in source.iterdir():
            read_members(path.read_bytes(), ("features", "norm_bb", "conf", "soft_labels"))
        return
    with open(source, "rb") as table:
        for row in table:
            for field in row.split(b"\t")[4:]:
                base64.b64decode(field.strip(), validate=True)


def write(folder: Path, size: int) -> None:
    """Write so many bytes, to the disk."""
    block = os.urandom(1 << 20)
    with open(folder / "written", "wb") as file:
        for _ in range(size >> 20):
            file.write(block)
        os.fsync(file.fileno())
    (folder / "written").unlink()


def images(folder: Path, count: int, processes: list[int]) -> None:
    """Measure image databases."""
    sources = write_sources(folder, count)
    rng = np.random.default_rng(0)
    packing = clock(lambda: [write_npz(random_regions(rng, WIDTH)) for _ in range(20)]) * count / 20
    for name, source in sources.items():
        unpack(source)  # so that both read from memory what fits there
        unpacking = clock(lambda source=source: unpack(source))
        for flags in ([], ["--compress"]):
            for nproc in processes:
                words = ["--img_dir" if source.is_dir() else "--tsv", source, "--output", folder / "images", *flags]
                seconds, memory = convert("convert_imgdir.py", *words, "--nproc", nproc)
                size = sum(path.stat().st_size for path in (folder / "images").rglob("data.mdb"))
                shutil.rmtree(folder / "images")
                bounds = {"unpacking": unpacking / nproc, "disk": clock(lambda size=size: write(folder, size))}
                if flags:
                    bounds["packing"] = packing / nproc
                shown = ", ".join(f"{bound} {of_bound:.1f} s" for bound, of_bound in bounds.items())
                print(
                    f"{count:,} images, {name}{' to compressed' if flags else ''}, {nproc} processes: {seconds:.1f} s, "
                    f"{count / seconds:,.0f} images/s, {size / seconds / 1e6:,.0f} MB/s, {memory:,.0f} MB; {shown}"
                )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=200_000)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--nproc", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's folder for temporary files")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        captions(Path(folder), arguments.captions, arguments.nproc)
        images(Path(folder), arguments.images, arguments.nproc)
    print(f"on {describe(choose_device('cpu'))}, {provenance()['machine']}")


if __name__ == "__main__":
    main()
