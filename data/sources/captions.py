"""Read captions and the names of their images: Karpathy's JSON, JSONL, CSV, and the token files of Flickr8k and Flickr30k."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from tqdm import tqdm

from data.picture_names import feature_name, picture_stem
from data.text_db import TextDatabaseWriter, encode_text
from data.tokenizer import load_tokenizer
from utils.errors import InputError, counted, nearest
from utils.files import read_text, short_repr
from utils.parallel import in_order

CHUNK = 2000  # captions that a worker encodes at a time
PER_WORKER = 15_000  # captions that are encoded in the time in which another worker starts


class Caption(NamedTuple):
    """One caption: ``filename`` is its picture's, ``image`` the key of the picture's features in the image database.

    ``place`` in the file is for messages.
    """

    text_id: str
    image: str
    filename: str
    raw: str
    split: str
    dataset: str
    place: str


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
        place, name, dataset = f"images[{number}]", picture.filename, contents.dataset
        try:
            image = feature_name(dataset, name, picture.filepath)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        for sentence in picture.sentences:
            yield Caption(str(sentence.sentid), image, name, sentence.raw, picture.split, dataset, place)


def _read_rows(rows: Iterable[tuple[int, Any]], read: Callable[[Any], _Row], dataset: str = "") -> Iterator[Caption]:
    """Captions of (line number, row); text ids count the rows of all splits, so that no two databases share one."""
    for number, (line, contents) in enumerate(rows):
        try:
            row = read(contents)
            image = feature_name(dataset, row.image)
            yield Caption(str(number), image, row.image, row.caption, row.split.strip(), dataset, f"line {line}")
        except ValueError as error:
            raise ValueError(f"line {line}: {error}") from error


def _lines(text: str) -> Iterator[tuple[int, str]]:
    return ((line, contents) for line, contents in enumerate(text.split("\n"), start=1) if contents.strip())


def _read_jsonl(text: str) -> Iterator[Caption]:
    return _read_rows(_lines(text), msgspec.json.Decoder(_Row).decode)


def _read_tokens(dataset: str, text: str) -> Iterator[Caption]:
    """Captions of lines ``1000092795.jpg#0``, tab, caption; they belong to no split."""

    def read(line: str) -> _Row:
        picture, _, caption = line.partition("\t")
        if not (caption and (name := re.fullmatch(r"(.+)#\d+", picture))):
            raise ValueError(f"{short_repr(line)} found, expected 1000092795.jpg#0, tab, caption")
        return _Row(name[1], caption.strip(), "")

    return _read_rows(_lines(text), read, dataset)


def _read_csv(text: str) -> Iterator[Caption]:
    rows = _csv_rows(text)
    line, header = next(rows, (1, []))
    if absent := [name for name in _Row.__struct_fields__ if name not in header]:
        lacks = f"lacks column{'s' * (len(absent) > 1)} {', '.join(absent)}; it has {short_repr(header)}"
        raise ValueError(f"line {line} {lacks}; expected the names image, caption and split, separated by commas")
    if len(set(header)) < len(header):
        raise ValueError(f"line {line}: names a column twice")

    def read(row: list[str]) -> _Row:
        if len(row) != len(header):
            wrong = f"{counted(len(row), 'column')}, expected {len(header)} as in line {line}"
            raise ValueError(f"{wrong}; put a caption with commas in quotation marks")
        return msgspec.convert(dict(zip(header, row, strict=True)), _Row)

    return _read_rows(rows, read)


def _csv_rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """Each row that is not blank, with the number of its first line."""
    line, reader = 1, csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if row:
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"line {line}: {error}; is a quotation mark not closed?") from error


# By the end of the file's name.
READERS: dict[str, Callable[[str], Iterator[Caption]]] = {
    ".json": _read_karpathy,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    "results_20130124.token": partial(_read_tokens, "flickr30k"),
    ".token": partial(_read_tokens, ""),
    ".token.txt": partial(_read_tokens, ""),
}


def all_captions(path: Path) -> Iterator[Caption]:
    """The captions of all splits in ``path``. Raises ``InputError`` if it cannot be read or is malformed."""
    reader = next((reader for ending, reader in READERS.items() if path.name.endswith(ending)), None)
    if reader is None:
        raise InputError(f"{path}: unknown kind of file, expected one of {', '.join(READERS)}")
    text = read_text(path, "captions")
    try:
        yield from reader(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {error}") from error


def captions_of(path: Path, split: str) -> list[Caption]:
    """The captions of one split; for a token file, ``split`` is the file that lists its pictures.

    Raises ``InputError`` also if there are none, if two pictures share a name, or if a picture is in two splits.
    """
    first_of: dict[str, Caption] = {}
    splits: set[str] = set()
    captions = []
    listed = None
    if ".token" in path.name:
        expected = f"a list of pictures, such as Flickr_8k.testImages.txt, as {path.name} has no splits"
        listed = {picture_stem(line.strip()) for _, line in _lines(read_text(split, expected))}
    for caption in all_captions(path):
        if listed is not None:
            caption = caption._replace(split=split if picture_stem(caption.filename) in listed else "")
        splits.add(caption.split)
        first = first_of.setdefault(caption.image, caption)
        wrong = None
        if first.filename != caption.filename:
            both = f"{short_repr(first.filename)} and {short_repr(caption.filename)}"
            wrong = f"{both} would both be image {short_repr(caption.image)}; rename one of the pictures"
        elif first.split != caption.split:
            both = f"{short_repr(first.split)} and in {short_repr(caption.split)}"
            wrong = f"{short_repr(caption.filename)} is in {both}, expected each picture in one split"
        if wrong:
            raise InputError(f"{path}: {caption.place}: {wrong}")
        if caption.split == split:
            captions.append(caption)
    if split not in splits:
        raise InputError(f"{path}: no caption of split {split!r}{nearest(split, splits)}, it has {short_repr(sorted(splits))}")
    if absent := (listed or set()) - {picture_stem(caption.filename) for caption in captions}:
        raise InputError(f"{path}: no caption of {counted(len(absent), 'picture')} in {split}, such as {min(absent)!r}")
    return captions


tokenizer_of = lru_cache(maxsize=1)(load_tokenizer)  # once per process


def _encode(vocab: Path | None, captions: Sequence[Caption]) -> list[tuple[str, str, bytes, int]]:
    """Text id, image, record and number of word pieces of each caption."""
    tokenizer = tokenizer_of(vocab)
    encoded = []
    for text_id, image, filename, raw, split, dataset, _ in captions:
        ids = tokenizer.encode(raw)
        kept = {"raw": raw, "toked_caption": tokenizer.tokens(ids), "filename": filename, "split": split, "dataset": dataset}
        encoded.append((text_id, image, encode_text(ids, image, **kept), len(ids)))
    return encoded


def write_captions(
    path: Path, captions: Sequence[Caption], database: TextDatabaseWriter, vocab: Path | None, nproc: int
) -> None:
    """Split captions of ``path`` into word pieces, in up to ``nproc`` worker processes, and add them to ``database``."""
    chunks = [captions[first : first + CHUNK] for first in range(0, len(captions), CHUNK)]
    results = in_order(partial(_encode, vocab), chunks, min(nproc, 1 + len(captions) // PER_WORKER))
    encoded = zip(chain.from_iterable(results), captions, strict=True)
    progress = tqdm(encoded, total=len(captions), desc=database.path.name, unit=" captions", disable=None)
    for (text_id, image, record, length), caption in progress:
        database.put_encoded(text_id, image, record, length, f"{path}: {caption.place}")
