"""Read captions and the names of their images from annotation files: Karpathy's JSON, JSONL and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from tqdm import tqdm

from data.picture_names import feature_name
from data.text_db import TextDatabaseWriter, encode_text
from data.tokenizer import load_tokenizer
from utils.errors import InputError, nearest
from utils.files import short_repr
from utils.parallel import in_order

CHUNK = 2000  # captions that a worker encodes at a time
PER_WORKER = 15_000  # captions that are encoded in the time in which another worker starts


class Caption(NamedTuple):
    """One caption: ``filename`` is its picture's, ``image`` the key of the picture's features in the image database."""

    text_id: str
    image: str
    filename: str
    raw: str
    split: str
    dataset: str


class _Sentence(msgspec.Struct):
    sentid: int
    raw: str


class _Picture(msgspec.Struct):
    filename: str
    split: str
    sentences: list[_Sentence]
    filepath: str = ""


class _Karpathy(msgspec.Struct):
    images: list[_Picture]
    dataset: str = ""


class _Row(msgspec.Struct):
    image: str
    caption: str
    split: str


def _read_karpathy(text: str) -> Iterator[Caption]:
    """Captions of ``dataset_flickr30k.json``, ``dataset_coco.json`` and the like; text ids are the ``sentid`` numbers."""
    try:
        contents = msgspec.json.decode(text, type=_Karpathy)
    except ValueError as error:
        raise ValueError(f"{error}; expected Karpathy's JSON") from error
    for number, picture in enumerate(contents.images):
        try:
            image = feature_name(contents.dataset, picture.filename, picture.filepath)
        except ValueError as error:
            raise ValueError(f"images[{number}]: {error}") from error
        for sentence in picture.sentences:
            yield Caption(str(sentence.sentid), image, picture.filename, sentence.raw, picture.split, contents.dataset)


def _read_rows(rows: Iterable[tuple[int, Any]], read: Callable[[Any], _Row]) -> Iterator[Caption]:
    """Captions of (line number, row); text ids count the rows of all splits, so that no two databases share one."""
    for number, (line, contents) in enumerate(rows):
        try:
            row = read(contents)
            yield Caption(str(number), feature_name("", row.image), row.image, row.caption, row.split.strip(), "")
        except ValueError as error:
            raise ValueError(f"line {line}: {error}; expected image, caption and split") from error


def _read_jsonl(text: str) -> Iterator[Caption]:
    lines = ((line, contents) for line, contents in enumerate(text.split("\n"), start=1) if contents.strip())
    return _read_rows(lines, msgspec.json.Decoder(_Row).decode)


def _read_csv(text: str) -> Iterator[Caption]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    if len(set(reader.fieldnames or ())) < len(reader.fieldnames or ()):
        raise ValueError("line 1: names a column twice")

    def read(row: dict[str | None, Any]) -> _Row:
        if None in row:  # csv's key for what is beyond the last column
            raise ValueError("more columns than in the first line, put a caption with commas in quotes")
        return msgspec.convert(row, _Row)

    return _read_rows(((reader.line_num, row) for row in reader), read)


READERS: dict[str, Callable[[str], Iterator[Caption]]] = {".json": _read_karpathy, ".jsonl": _read_jsonl, ".csv": _read_csv}


def read_annotations(path: Path) -> bytes:
    """The bytes of an annotation file. Raises ``InputError``."""
    if path.suffix not in READERS:
        raise InputError(f"{path}: unknown kind of file, expected one of {', '.join(READERS)}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def all_captions(path: Path, contents: bytes) -> Iterator[Caption]:
    """The captions of all splits in ``contents``, the bytes of ``path``. Raises ``InputError`` if they are malformed."""
    try:
        yield from READERS[path.suffix](contents.decode("utf-8-sig"))
    except (ValueError, RecursionError, csv.Error) as error:
        raise InputError(f"{path}: {error}") from error


def captions_of(path: Path, contents: bytes, split: str) -> list[Caption]:
    """The captions of one split.

    Raises ``InputError`` also if there are none, if two pictures share a name, or if a picture is in two splits.
    """
    first_of: dict[str, Caption] = {}
    splits: set[str] = set()
    captions = []
    for caption in all_captions(path, contents):
        splits.add(caption.split)
        first = first_of.setdefault(caption.image, caption)
        if first.filename != caption.filename:
            both = f"{short_repr(first.filename)} and {short_repr(caption.filename)}"
            raise InputError(f"{path}: {both} would both be image {short_repr(caption.image)}; rename one of the pictures")
        if first.split != caption.split:
            both = f"{short_repr(first.split)} and in {short_repr(caption.split)}"
            raise InputError(f"{path}: {short_repr(caption.filename)} is in {both}, expected each picture in one split")
        if caption.split == split:
            captions.append(caption)
    if split not in splits:
        raise InputError(f"{path}: no caption of split {split!r}{nearest(split, splits)}, it has {short_repr(sorted(splits))}")
    return captions


tokenizer_of = lru_cache(maxsize=1)(load_tokenizer)  # once per process


def _encode(vocab: Path | None, captions: Sequence[Caption]) -> list[tuple[str, str, bytes, int]]:
    """Text id, image, record and number of word pieces of each caption."""
    tokenizer = tokenizer_of(vocab)
    encoded = []
    for text_id, image, filename, raw, split, dataset in captions:
        ids = tokenizer.encode(raw)
        kept = {"raw": raw, "toked_caption": tokenizer.tokens(ids), "filename": filename, "split": split, "dataset": dataset}
        encoded.append((text_id, image, encode_text(ids, image, **kept), len(ids)))
    return encoded


def write_captions(captions: Sequence[Caption], database: TextDatabaseWriter, vocab: Path | None, nproc: int) -> None:
    """Split captions into word pieces, in up to ``nproc`` worker processes, and add them to ``database``."""
    chunks = [captions[first : first + CHUNK] for first in range(0, len(captions), CHUNK)]
    results = in_order(partial(_encode, vocab), chunks, min(nproc, 1 + len(captions) // PER_WORKER))
    encoded = chain.from_iterable(results)
    for caption in tqdm(encoded, total=len(captions), desc=database.path.name, unit=" captions", disable=None):
        database.put_encoded(*caption)
