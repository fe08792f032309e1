"""Targets: what the converters read, captions and the output of detectors, written as in the tests of the converters."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import pickle
import pickletools
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from data.boxes import BoxRule
from data.image_db import encode_image
from data.sources import region_files as folders
from data.sources import region_tsv as tsv
from data.sources.captions import all_captions, read_annotations
from data.sources.plain_pickle import read_plain
from data.sources.regions import Arrays
from tests.data.sources.detectors import ROWS, SIZE, Detected, line, save_milvlg, save_mmf
from tests.data.sources.test_plain_pickle import ARRAYS, PLAIN
from tests.fuzz.mutations import Seed, mutated, zip_seed
from tests.fuzz.target import MIB, Target, one_of_files, pack_files, write_files
from tests.fuzz.values import json_like

FOUND = [Detected(seed, boxes=4) for seed in range(3)]


def caption_targets(folder: Path) -> list[Target]:
    """Annotation files of each kind."""
    sentences = [{"raw": f"a dog {number}", "sentid": number, "tokens": ["a", "dog"]} for number in range(3)]
    places = [
        ("train2014", "COCO_train2014_000000000042.jpg", "restval"),
        ("val2014", "77.jpg", "test"),
        ("val2014", "9.jpg", "train"),
    ]
    images = [
        {"filename": name, "filepath": path, "split": split, "imgid": number, "sentences": sentences}
        for number, (path, name, split) in enumerate(places)
    ]
    karpathy = [{"images": images, "dataset": dataset} for dataset in ("coco", "flickr30k", "other")]
    rows = [{"image": f"{number}.png", "caption": f'a "dog", {number}', "split": "test"} for number in range(4)]
    table = io.StringIO()
    writer = csv.DictWriter(table, ["image", "caption", "split"])
    writer.writeheader()
    writer.writerows(rows)
    text = table.getvalue().encode()
    lines = b"\n".join(json.dumps(row).encode() for row in rows)
    of_rows = st.lists(json_like(rows), min_size=1, max_size=3).map(b"\n".join)

    def target(name: str, suffix: str, inputs: st.SearchStrategy[bytes], sound: bytes) -> Target:
        path = folder / f"captions{suffix}"

        def read(data: bytes) -> None:
            path.write_bytes(data)
            list(all_captions(path, read_annotations(path)))

        return Target(f"captions: {name}", read, st.one_of(inputs, mutated([Seed(sound)])), sound)

    return [
        target("Karpathy's JSON", ".json", json_like(karpathy), json.dumps(karpathy[0]).encode()),
        target("JSONL", ".jsonl", of_rows, lines),
        target("CSV", ".csv", st.nothing(), text),
    ]


def row_targets(folder: Path) -> list[Target]:
    """Rows of each TSV, whole files of them, and VinVL's file of sizes."""
    targets = []
    for name, write in ROWS.items():
        rows = [line(write("picture.jpg", found)) for found in FOUND]
        kind = tsv.KINDS[rows[0].count(b"\t") + 1]

        def read(row: bytes, kind: tuple[str, ...] = kind) -> None:
            _pack(tsv.load_row(row, kind, SIZE))

        inputs = mutated([Seed(row) for row in rows])
        if name == "vinvl":
            contents = [json.loads(row.split(b"\t")[1]) for row in rows]
            inputs = st.one_of(inputs, json_like(contents).map(b"picture.jpg\t".__add__))
        targets.append(Target(f"TSV row: {name}", read, inputs, rows[0], (ValueError,)))

    path = folder / "rows.tsv"

    def read_file(data: bytes) -> None:
        path.write_bytes(data)
        for source in tsv.sources_of(path, tsv.kind_of(path), {"picture.jpg": SIZE}):
            with contextlib.suppress(ValueError):  # which a converter lists, to go on with the next row
                _pack(source.load())

    def read_sizes(data: bytes) -> None:
        path.write_bytes(data)
        tsv.read_sizes(path)

    whole = [b"".join(line(write("picture.jpg", found)) for found in FOUND) for write in ROWS.values()]
    heights = b"".join(b'%d.jpg\t[{"height": 480, "width": 640}]\n' % number for number in range(3))
    sides = json_like([[{"height": 480, "width": 640}]]).map(lambda value: heights + b"dog.jpg\t" + value)
    return [
        *targets,
        Target("TSV file", read_file, mutated([Seed(data) for data in whole]), whole[0]),
        Target("TSV of VinVL's sizes", read_sizes, st.one_of(mutated([Seed(heights)]), sides), heights),
    ]


def image_targets(folder: Path) -> list[Target]:
    """Files with one image each, and the pickles in them."""
    zipped, pairs = [], []
    for found in FOUND:
        save_milvlg(folder / "a.npz", found)
        save_mmf(folder / "a.npy", found)
        zipped.append(zip_seed((folder / "a.npz").read_bytes()))
        pairs.append({name: (folder / name).read_bytes() for name in ("a.npy", "a_info.npy")})
    np.savez(folder / "a.npz", features=FOUND[0].features, norm_bb=FOUND[0].shares(), conf=FOUND[0].conf, nbb=np.array(3))
    uniter = zip_seed((folder / "a.npz").read_bytes())

    def read_npz(data: bytes) -> None:
        (folder / "a.npz").write_bytes(data)
        _pack(folders.load_npz(folder / "a.npz"))

    def read_pair(data: bytes) -> None:
        write_files(folder, data)
        _pack(folders.load_npy_pair(folder / "a.npy"))

    def read_pickle(data: bytes) -> None:
        read_plain(data, (*PLAIN, *ARRAYS))

    dumps = [pickle.dumps(value, protocol) for value in (PLAIN, ARRAYS) for protocol in range(2, 5)]
    pickles = mutated([pickle_seed(dump) for dump in dumps])
    damaged = {name: mutated([_npy_seed(pair[name]) for pair in pairs]) for name in pairs[0]}
    documented = (ValueError, OSError)
    return [
        Target("npz of UNITER's extractor", read_npz, mutated([uniter]), uniter.data, documented, 256 * MIB),
        Target("npz of MILVLG's extractor", read_npz, mutated(zipped), zipped[0].data, documented, 256 * MIB),
        Target("npy pair of MMF", read_pair, one_of_files(pairs[0], damaged), pack_files(pairs[0]), documented),
        Target("pickle in them", read_pickle, pickles, dumps[0], (ValueError,), 320 * MIB),
    ]


def _pack(arrays: Arrays) -> None:
    encode_image(**arrays, rule=BoxRule(), compressed=False)


def pickle_seed(data: bytes, start: int = 0) -> Seed:
    """A pickle; its numbers are its instructions and the lengths and numbers after them. It begins at ``start``."""
    places = [start + (place or 0) for _, _, place in pickletools.genops(data[start:])]
    return Seed(data, [(place + step, width) for place in places for step, width in ((0, 1), (1, 1), (1, 4))])


def _npy_seed(data: bytes) -> Seed:
    """A file of numpy; its numbers are the letters of its header, and those of the pickle if it holds one."""
    end = data.index(b"\n") + 1
    header = [(place, 1) for place in range(end)]
    return Seed(data, [*header, *(pickle_seed(data, end).fields if b"|O" in data[:end] else ())])
