"""Targets: LMDB files, the records in them, and the JSON files beside them, all out of the golden databases."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lz4.frame
import msgpack
import numpy as np
from hypothesis import strategies as st

from data.image_db import ImageDatabase
from data.inspection.reading import Reading, read_names
from data.inspection.report import Faults, Summary
from data.lmdb_store import LmdbReader
from data.records import read_npz, write_msgpack, write_npz
from data.text_db import TextDatabase
from tests.conftest import BUNDLED
from tests.fuzz import databases
from tests.fuzz.mutations import Seed, mutated, zip_seed
from tests.fuzz.target import MIB, Target, one_of_files, pack_files, write_files
from tests.fuzz.values import json_like, msgpack_like
from utils.errors import InputError

TEXTS, IMAGES = 10, 2  # of the golden ones, five texts an image


class OneRecord:
    """Stands in for the LMDB of a database: whatever is looked up, there is this record."""

    def __init__(self) -> None:
        self.record = b""
        self.path = Path("database")

    def get(self, key: str) -> memoryview:
        return memoryview(self.record)

    def __contains__(self, key: str) -> bool:
        return True


def text_reader() -> tuple[Callable[[bytes], object], list[bytes]]:
    """What reads bytes as the record of a golden text, and the golden records."""
    database = TextDatabase(BUNDLED.text_db)
    with LmdbReader(BUNDLED.text_db) as store:
        records = [bytes(store.get(text_id)) for text_id in database.ids[:TEXTS]]
    return _with_record(database, database.ids[0]), records


def image_reader(compressed: bool, everything: bool = False) -> Callable[[bytes], object]:
    """What reads bytes as a record of a golden image; ``everything`` as one of a database that is not filtered yet."""
    database = ImageDatabase(BUNDLED.image_db)
    name = database.names()[0]
    database._read = read_npz if compressed else database._read
    database._filtered = not everything
    return _with_record(database, name)


def _with_record(database: Any, key: str) -> Callable[[bytes], object]:
    database.close()
    database._store = store = OneRecord()

    def read(record: bytes) -> object:
        store.record = record
        return database[key]

    return read


def record_targets() -> list[Target]:
    """Records of texts and of images, and what is packed in them."""
    read_text, frames = text_reader()
    texts = [msgpack.unpackb(lz4.frame.decompress(frame)) for frame in frames]
    extra = {"raw": "two dogs", "toked_caption": ["two", "dogs"], "target": {"labels": [1, 2], "scores": [0.5, 1.0]}}
    texts.append({**texts[0], **extra})
    packed = st.one_of(msgpack_like(texts), mutated([Seed(msgpack.packb(text)) for text in texts]), st.binary(max_size=64))
    rng = np.random.default_rng(0)
    shapes = {"features": (5, 3), "norm_bb": (5, 6), "conf": (5,), "soft_labels": (5, 2)}
    arrays = {name: rng.random(shape).astype(np.float16) for name, shape in shapes.items()}
    with LmdbReader(next(BUNDLED.image_db.glob("feat_*"))) as store:
        golden = [bytes(store.get(name)) for name in list(store.keys())[:IMAGES]]
    plain = [write_msgpack(arrays), write_msgpack({"features": arrays["features"].astype(">f8"), **arrays})]
    maps = [msgpack.unpackb(record, strict_map_key=False) for record in plain]
    zipped = [write_npz(arrays), _stored(arrays), _stored({**arrays, "features": np.asfortranarray(arrays["features"])})]
    members = [Seed(_member(array)) for array in arrays.values()]
    return [
        Target("text record: lz4 frame", read_text, mutated([Seed(frame) for frame in frames]), frames[0]),
        Target("text record: msgpack in the frame", read_text, packed.map(lz4.frame.compress), frames[0], memory=400 * MIB),
        Target(
            "image record: msgpack",
            image_reader(compressed=False, everything=True),
            st.one_of(msgpack_like(maps), mutated([*map(Seed, plain), *map(Seed, golden)])),
            plain[0],
        ),
        Target(
            "image record: npz",
            image_reader(compressed=True, everything=True),
            mutated([zip_seed(record) for record in zipped]),
            zipped[0],
        ),
        Target(
            "image record: npy in the npz",
            image_reader(compressed=True),
            mutated(members).map(lambda member: _zip({"features": member, "norm_bb": _member(arrays["norm_bb"])})),
            zipped[0],
        ),
    ]


def _member(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _stored(arrays: dict[str, np.ndarray]) -> bytes:
    return _zip({name: _member(array) for name, array in arrays.items()})


def _zip(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, member in members.items():
            archive.writestr(f"{name}.npy", member)
    return stream.getvalue()


def page_targets(folder: Path) -> list[Target]:
    """Whole LMDB files. Whatever their pages are, they are read to the last byte in child processes, or are a fault."""
    files = [databases.make(folder / shape, fill) for shape, fill in databases.SHAPES.items()]
    contents = [file.read_bytes() for file in (*files, BUNDLED.text_db / "data.mdb")]
    (folder / "damaged").mkdir()

    def check(store: LmdbReader, records: Sequence[tuple[str]]) -> Summary:
        summary = Summary()
        for (key,) in records:
            try:
                bytes(store.get(key))
            except InputError as error:
                summary.faults.refuse(key, error)
        return summary

    def read(data: bytes) -> None:
        (folder / "damaged/data.mdb").write_bytes(data)
        faults = Faults()
        names, _ = read_names(folder / "damaged", faults)
        faults.update(Reading(None, 1).check(folder / "damaged", check, [(name,) for name in names or []], 100).faults)
        if faults:
            raise InputError(str(faults.examples))

    seeds = [Seed(data, databases.fields(data)) for data in contents]
    return [Target("LMDB file", read, mutated(seeds), contents[-1])]


def sidecar_targets(folder: Path) -> list[Target]:
    """The JSON files beside the databases, and the list of names within."""
    of_texts = {
        name: json.loads((BUNDLED.text_db / name).read_bytes()) for name in ("meta.json", "id2len.json", "txt2img.json")
    }
    of_texts |= {name: dict(list(of_texts[name].items())[:TEXTS]) for name in ("id2len.json", "txt2img.json")}
    lists = json.loads((BUNDLED.text_db / "img2txts.json").read_bytes())
    of_texts["img2txts.json"] = dict(list(lists.items())[:IMAGES])
    (folder / "text.db").mkdir()

    def read_texts(data: bytes) -> None:
        write_files(folder / "text.db", data)
        database = TextDatabase(folder / "text.db")
        [database.index_of[text_id] for text_id in database.ids]

    (folder / "images/feat_th0.2_max100_min10").mkdir(parents=True)
    numbers = json.loads((BUNDLED.image_db / "nbb_th0.2_max100_min10.json").read_bytes())
    file = folder / "images/nbb_th0.2_max100_min10.json"

    def read_numbers(data: bytes) -> None:
        file.write_bytes(data)
        ImageDatabase(folder / "images").most_boxes(numbers)

    def read_names(data: bytes) -> None:
        images = ImageDatabase(BUNDLED.image_db)
        store: Any = OneRecord()
        store.record = data
        images._store = store
        images.names()

    texts = {name: json.dumps(value).encode() for name, value in of_texts.items()}
    damaged = {name: _damaged(value) for name, value in of_texts.items()}
    names = list(numbers)[:TEXTS]
    return [
        Target("text database: JSON files", read_texts, one_of_files(texts, damaged), pack_files(texts)),
        Target("image database: JSON of box numbers", read_numbers, _damaged(numbers), json.dumps(numbers).encode()),
        Target("image database: list of names", read_names, _damaged(names), json.dumps(names).encode()),
    ]


def _damaged(value: Any) -> st.SearchStrategy[bytes]:
    """A JSON value changed in its values or in its text."""
    return st.one_of(json_like([value]), mutated([Seed(json.dumps(value).encode())]))
