"""A small text and a small image database, ways to damage them, and an inspection of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from data.boxes import BoxRule
from data.image_db import ImageDatabaseWriter
from data.lmdb_store import LmdbReader
from data.records import read_msgpack
from data.text_db import TextDatabaseWriter
from data.tokenizer import load_tokenizer
from scripts.inspect_db import main

RULE = {"conf_th": 0.2, "max_bb": 6, "min_bb": 2, "num_bb": 4}
FOLDER, NBB = "feat_th0.2_max6_min2", "nbb_th0.2_max6_min2.json"
ROWS = [6, 3, 6, 4, 5, 2]
IMAGES = [f"made_{number:012d}.npz" for number in range(len(ROWS))]
CAPTIONS = ["Two dogs run.", "A red circle is left of a small blue square."]

UNREADABLE = "files that cannot be read"

Arrays = dict[str, np.ndarray]


def regions(rows: int, seed: int) -> Arrays:
    random = np.random.default_rng(seed)
    corners = np.sort(random.random((rows, 2, 2)), axis=1)
    return {
        "features": np.maximum(random.standard_normal((rows, 8)), 0),
        "norm_bb": np.concatenate([corners[:, 0], corners[:, 1], corners[:, 1] - corners[:, 0]], axis=1),
        "conf": np.linspace(0.9, 0.3, rows),
        "soft_labels": random.random((rows, 5)),
    }


def write_images(path: Path, *, keep_all: bool = False, compressed: bool = False, **options: Any) -> None:
    with ImageDatabaseWriter(path, None if keep_all else BoxRule(**{**RULE, **options}), compressed=compressed) as writer:
        for number, name in enumerate(IMAGES):
            writer.put(name, **regions(ROWS[number], number))


def write_texts(path: Path) -> None:
    tokenizer = load_tokenizer()
    with TextDatabaseWriter(path, {**tokenizer.meta(), "annotations": "made.json"}) as writer:
        for number in range(2 * len(IMAGES)):
            raw = CAPTIONS[number % 2]
            ids = tokenizer.encode(raw)
            writer.put(str(number), ids, IMAGES[number // 2], raw=raw, toked_caption=tokenizer.tokens(ids))


def write_pair(folder: Path) -> Path:
    """Write ``texts.db`` and ``images``, in which nothing is wrong, and return their folder."""
    write_images(folder / "images")
    write_texts(folder / "texts.db")
    return folder


def put(folder: Path, key: str, value: bytes | None) -> None:
    """Replace a record, or remove it."""
    with lmdb.open(str(folder), map_size=1 << 26, lock=False) as environment, environment.begin(write=True) as transaction:
        if value is None:
            assert transaction.delete(key.encode())
        else:
            transaction.put(key.encode(), value)


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    """Change what a JSON file holds, in place or to what ``change`` returns."""
    contents = json.loads(file.read_text())
    changed = change(contents)
    file.write_text(json.dumps(contents if changed is None else changed))


def read_record(images: Path, name: str) -> Arrays:
    with LmdbReader(images / FOLDER) as store:
        return read_msgpack(bytes(store.get(name)), ("features", "norm_bb", "conf", "soft_labels"))


@dataclass
class Inspection:
    """How the program ended, what it printed, its list of faults, and how often it found each kind."""

    code: object
    output: str
    errors: str
    list: str
    faults: dict[str, int]


def inspect(*arguments: object) -> Inspection:
    code: object = 0
    with redirect_stdout(StringIO()) as output, redirect_stderr(StringIO()) as errors:
        try:
            main(["--nproc", "1", *map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
    _, _, listed = output.getvalue().partition("\nWRONG\n")
    found = re.findall(r"^ {4} *([\d,]+)  (\S.*)$", listed, re.MULTILINE)
    faults = {kind: int(count) for count, kind in found}
    assert code == 2 or bool(faults) == (code == 1)
    assert ("\nNothing is wrong.\n" in output.getvalue()) == (code == 0)
    return Inspection(code, output.getvalue(), errors.getvalue(), listed, faults)
