"""Reading damaged files, most of them from tests/golden, ends in a result or the documented error (docs/robustness.md).

``make test`` tries a few per reader, ``make test-long`` thousands; with ``ARGS=-s`` they print the tables of docs/log.md.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lz4.frame
import msgpack
import numpy as np
import pytest
import torch

from data.boxes import BoxRule
from data.image_db import ImageDatabase, ImageDatabaseWriter, encode_image
from data.lmdb_store import LmdbReader
from data.records import write_msgpack, write_npz
from data.sources import region_tsv as tsv
from data.sources.captions import all_captions
from data.sources.entities import read_boxes, read_sentences
from data.sources.region_files import load_npy_pair, load_npz
from data.text_db import TextDatabase
from model.checkpoint import load_checkpoint
from model.config import UniterConfig
from model.retrieval import RetrievalModel
from scripts import inspect_db
from tests.conftest import BUNDLED
from tests.data.sources.detectors import ROWS, SIZE, Detected, line, save_milvlg, save_mmf, save_uniter
from tests.fuzz.mutations import either, json_damaged, json_like, msgpack_like, mutated, then
from tests.fuzz.sandbox import MIB, Fuzz
from utils.errors import InputError
from utils.tensors import load_tensors

DEATHS = ("died of SIGBUS", "died of SIGSEGV", "died of SIGABRT")
ENTITIES = {
    "a.txt": (read_sentences, "[/EN#7/people/clothing Two men] in [/EN#8/clothing green shirts] [/EN#0/notvisual wave] ."),
    "a.xml": (
        read_boxes,
        "<annotation><size><width>400</width><height>200</height><depth>3</depth></size><object><name>7</name><name>8</name>"
        "<bndbox><xmin>100</xmin><ymin>50</ymin><xmax>200</xmax><ymax>150</ymax></bndbox></object>"
        "<object><name>9</name><scene>1</scene><nobndbox>1</nobndbox></object></annotation>",
    ),
}


@pytest.fixture(params=[150, pytest.param(10_000, marks=[pytest.mark.long, pytest.mark.timeout(7200)])])
def fuzz(request: pytest.FixtureRequest) -> Fuzz:
    return Fuzz(request.param)


def test_lmdb_files(fuzz: Fuzz, tmp_path: Path) -> None:
    """LMDB trusts its pages, and damaged ones can end the process that reads them, except that of ``inspect_db``."""

    def read_texts(path: Path) -> None:
        database = TextDatabase(path.parent)
        [database[name] for name in database.ids]

    def read_images(path: Path) -> None:
        database = ImageDatabase(path.parent.parent)
        [database[name] for name in database.names()]

    def inspect(path: Path) -> None:
        try:
            inspect_db.main([str(path.parent), "--nproc", "1"])
        except SystemExit as end:
            raise InputError(str(path)) from end

    for load, original in ((read_texts, BUNDLED.text_db), (read_images, BUNDLED.image_db)):
        copy = shutil.copytree(original, tmp_path / original.name)
        kind, path = load.__name__.removeprefix("read_"), next(copy.rglob("data.mdb"))
        sound = path.read_bytes()
        damaged = mutated(sound, page_bytes=4096)
        fuzz.file(f"LMDB file of {kind}", path, load, damaged, sound, share=0.5, deaths=DEATHS)
        fuzz.file(f"LMDB file of {kind}, inspect_db", path, inspect, damaged, sound, share=0.05)


def with_record(look_up: Callable[[], object]) -> Callable[[bytes], object]:
    """A reader of bytes as the record that ``look_up`` looks up in an LMDB."""

    def read(record: bytes) -> None:
        with mock.patch.object(LmdbReader, "get", return_value=memoryview(record)):
            look_up()

    return read


def text_reader() -> Callable[[bytes], object]:
    """A reader of records of a text."""
    database = TextDatabase(BUNDLED.text_db)
    return with_record(lambda: database[database.ids[0]])


def image_reader(folder: Path, compressed: bool) -> Callable[[bytes], object]:
    """A reader of records of an image with all its boxes."""
    path = folder / f"images {compressed}"
    with ImageDatabaseWriter(path, None, compressed=compressed) as writer:
        writer.put("a", *(np.full(shape, 0.5, np.float16) for shape in ((2, 3), (2, 6), 2)))
    database = ImageDatabase(path, compressed=compressed)
    return with_record(lambda: database["a"])


def test_records(fuzz: Fuzz, tmp_path: Path) -> None:
    """Records of texts and of images, and what is packed in them."""
    with LmdbReader(BUNDLED.text_db) as store:
        frames = [bytes(store.get(name)) for name in list(store.keys())[:10]]
        frames.insert(0, bytes(store.get(TextDatabase(BUNDLED.text_db).ids[0])))
    texts = [msgpack.unpackb(lz4.frame.decompress(frame)) for frame in frames]
    texts.append({**texts[0], "raw": "two dogs", "toked_caption": ["two", "dogs"], "target": {"labels": [1], "scores": [0.5]}})
    packed = either(msgpack_like(*texts), mutated(*map(msgpack.packb, texts)))
    read_text = text_reader()
    fuzz("text record: lz4 frame", read_text, mutated(*frames), frames[0])
    frame = then(packed, lz4.frame.compress)
    fuzz("text record: msgpack in the frame", read_text, frame, frames[0], memory=400 * MIB)

    rng = np.random.default_rng(0)
    shapes = {"features": (5, 3), "norm_bb": (5, 6), "conf": (5,), "soft_labels": (5, 2)}
    arrays = {name: rng.random(shape).astype(np.float16) for name, shape in shapes.items()}
    with LmdbReader(next(BUNDLED.image_db.glob("feat_*"))) as store:
        golden = [bytes(store.get(name)) for name in list(store.keys())[:2]]
    plain = [write_msgpack(arrays), write_msgpack({**arrays, "features": arrays["features"].astype(">f8")})]
    maps = [msgpack.unpackb(record, strict_map_key=False) for record in plain]
    damaged = either(msgpack_like(*maps), mutated(*plain, *golden))
    fuzz("image record: msgpack", image_reader(tmp_path, False), damaged, plain[0])

    members = {name: npy(array) for name, array in arrays.items()}
    by_column = {**members, "features": npy(np.asfortranarray(arrays["features"]))}
    zips = [write_npz(arrays), zipped(members), zipped(by_column)]
    read_zip = image_reader(tmp_path, True)
    fuzz("image record: npz", read_zip, mutated(*zips), zips[0])
    member = mutated(*members.values())
    damaged = then(member, lambda data: zipped({**members, "features": data}))
    fuzz("image record: npy in the npz", read_zip, damaged, zips[0])


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, member in members.items():
            archive.writestr(f"{name}.npy", member)
    return stream.getvalue()


def test_json_files(fuzz: Fuzz, tmp_path: Path) -> None:
    """The JSON files beside the databases, the list of names in one, and the configuration of a model."""
    texts = Path(shutil.copytree(BUNDLED.text_db, tmp_path / "texts"))
    kept = {"meta.json": None, "id2len.json": 10, "txt2img.json": 10, "img2txts.json": 2}  # entries; five texts per image
    values = {name: dict(list(json.loads((texts / name).read_bytes()).items())[:few]) for name, few in kept.items()}
    for name, value in values.items():
        (texts / name).write_text(json.dumps(value))
    for name, value in values.items():
        make, sound = json_damaged(value), json.dumps(value).encode()
        fuzz.file(f"text database: {name}", texts / name, lambda _: TextDatabase(texts), make, sound, share=0.25)

    images = Path(shutil.copytree(BUNDLED.image_db, tmp_path / "images"))
    path = next(images.glob("nbb*.json"))
    counts, config = json.loads(path.read_bytes()), (BUNDLED.folder / "model.json").read_bytes()
    names, read_names = list(counts)[:10], with_record(ImageDatabase(images).names)
    read_counts, damaged = lambda _: ImageDatabase(images).most_boxes(counts), json_damaged(counts)
    fuzz.file("image database: box counts", path, read_counts, damaged, path.read_bytes())
    fuzz("image database: list of names", read_names, json_damaged(names), json.dumps(names).encode())
    damaged = json_damaged(json.loads(config))
    fuzz.file("model configuration", tmp_path / "model.json", UniterConfig.from_json, damaged, config)


def test_annotations(fuzz: Fuzz, tmp_path: Path) -> None:
    """Annotation files of each kind."""

    def read(path: Path) -> None:
        list(all_captions(path))

    sentences = [{"raw": f"a dog {number}", "sentid": number, "tokens": ["a", "dog"]} for number in range(3)]
    places = {"train2014/COCO_train2014_000000000042.jpg": "restval", "val2014/77.jpg": "test", "val2014/9.jpg": "train"}
    paths = [(Path(place), {"split": split, "sentences": sentences}) for place, split in places.items()]
    images = [{"filename": path.name, "filepath": str(path.parent), **image} for path, image in paths]
    karpathy = [{"images": images, "dataset": dataset} for dataset in ("coco", "flickr30k", "other")]
    rows = [{"image": f"{number}.png", "caption": f'a "dog", {number}', "split": "test"} for number in range(4)]
    table = "image,caption,split\r\n" + "".join(f'{number}.png,"a ""dog"", {number}",test\r\n' for number in range(4))
    lines = [json.dumps(row).encode() for row in rows]
    damaged_lines = then(json_like(*rows), lambda line: b"\n".join([line, lines[0], line]))
    for suffix, sound, makes in (
        ("json", json.dumps(karpathy[0]).encode(), [json_like(*karpathy)]),
        ("jsonl", b"\n".join(lines), [damaged_lines]),
        ("csv", table.encode(), []),
    ):
        fuzz.file(f"captions: {suffix}", tmp_path / f"captions.{suffix}", read, either(mutated(sound), *makes), sound)
    texts = [text for _, text in ENTITIES.values()]
    for name, (load, text) in ENTITIES.items():
        make, named = mutated(*(seed.encode() for seed in (*texts, f"{text}\n{text}"))), f"{tmp_path / name}: line "
        fuzz.file(f"Flickr30k Entities: {name}", tmp_path / name, load, make, text.encode(), named=named, share=0.5)


def test_regions(fuzz: Fuzz, tmp_path: Path) -> None:
    """The output of detectors: rows and files of TSV, files with one image each, and the pickles in them."""
    found = [Detected(seed, boxes=4) for seed in range(3)]
    whole = []
    for name, write in ROWS.items():
        rows = [line(write("picture.jpg", one)) for one in found]
        whole.append(b"".join(rows))
        kind = tsv.KINDS[rows[0].count(b"\t") + 1]

        def read_row(row: bytes, kind: tuple[str, ...] = kind) -> None:
            _encode(tsv.load_row(row, kind, SIZE))

        make = mutated(*rows)
        if name == "vinvl":
            content = json_like(*(json.loads(row.split(b"\t")[1]) for row in rows))
            make = either(make, then(content, b"picture.jpg\t".__add__))
        fuzz(f"TSV row: {name}", read_row, make, rows[0], errors=(ValueError,))

    def read_file(path: Path) -> None:
        for source in tsv.sources_of(path, tsv.kind_of(path), {"picture.jpg": SIZE}):
            with contextlib.suppress(ValueError):  # listed by the converter, which continues with the next row
                _encode(source.load())

    fuzz.file("TSV file", tmp_path / "a.tsv", read_file, mutated(*whole), whole[0])
    heights = b"".join(b'%d.jpg\t[{"height": 480, "width": 640}]\n' % number for number in range(3))
    size = json_like([{"height": 480, "width": 640}])
    make = either(mutated(heights), then(size, (heights + b"dog.jpg\t").__add__))
    fuzz.file("TSV of VinVL's sizes", tmp_path / "hw.tsv", tsv.read_sizes, make, heights)

    npz, npy, info = (tmp_path / name for name in ("a.npz", "a.npy", "a_info.npy"))
    files: dict[str, list[bytes]] = {"UNITER's npz": [], "MILVLG's npz": [], "MMF's npy": [], "MMF's info": []}
    for one in found:
        for name, save, path in zip(files, (save_uniter, save_milvlg, save_mmf, save_mmf), (npz, npz, npy, info), strict=True):
            save(npz if path == npz else npy, one)
            files[name].append(path.read_bytes())
    of_info = {"bbox": found[2].boxes, "num_boxes": np.int64(4), "cls_prob": found[2].conf[:, None], "image_width": 640}
    contents = {**of_info, "image_height": 480.0, "others": (1 << 80, "é", None, True, b"\xff", [2.0, (1, 2, 3)])}
    header = info.read_bytes()[: info.read_bytes().index(b"\n") + 1]
    array = np.array(contents, object)
    files["pickles in MMF's info"] = [header + pickle.dumps(array, protocol) for protocol in range(2, 6)]
    for name, seeds in files.items():
        path = {"npz": npz, "npy": npy, "info": info}[name.split()[-1]]
        load = (lambda _: _encode(load_npz(npz))) if path == npz else (lambda _: _encode(load_npy_pair(npy)))
        memory = {npz: 256 * MIB, info: 320 * MIB}.get(path, 64 * MIB)
        fuzz.file(name, path, load, mutated(*seeds), seeds[0], errors=(ValueError, OSError), memory=memory)


def _encode(arrays: Any) -> None:
    encode_image(**arrays, rule=BoxRule(), compressed=False)


def saved(value: Any, *, legacy: bool = False) -> bytes:
    """What ``torch.save`` writes, in the container of today or in that of before torch 1.6."""
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def pickle_of(archive: bytes) -> bytes:
    """The ``data.pkl`` of a zip of ``torch.save``."""
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return file.read(next(name for name in file.namelist() if name.endswith("/data.pkl")))


def with_pickle(archive: bytes, pickled: bytes) -> bytes:
    """The zip of ``torch.save`` with another ``data.pkl`` and valid checksums."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(stream, "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, pickled if member.filename.endswith("/data.pkl") else old.read(member))
    return stream.getvalue()


def test_checkpoints(fuzz: Fuzz, tmp_path: Path) -> None:
    """Checkpoints of a small model, the golden one, and a training state."""
    small = {"vocab_size": 12, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 4}
    model = RetrievalModel(UniterConfig(**small, max_position_embeddings=8, img_dim=4))
    path = tmp_path / "model.pt"
    weights = OrderedDict(model.state_dict())
    today, legacy = saved(weights), saved(weights, legacy=True)
    optimiser = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(5, dtype=torch.bfloat16), "seed": torch.get_rng_state()[:64]}
    state = saved({"model": dict(list(weights.items())[:3]), "optimiser": {"state": {0: optimiser}}, "updates": 3})

    def load(path: Path) -> None:
        load_checkpoint(model, path)

    pickled = then(mutated(pickle_of(today)), partial(with_pickle, today))
    of_legacy = mutated(*[legacy] * 9, (BUNDLED.folder / "model.pt").read_bytes())
    fuzz.file("checkpoint: zip", path, load, mutated(today), today)
    fuzz.file("checkpoint: pickle in the zip", path, load, pickled, today)
    fuzz.file("checkpoint: before torch 1.6", path, load, of_legacy, legacy, memory=128 * MIB)
    fuzz.file("training state", path, load_tensors, mutated(state), state)
