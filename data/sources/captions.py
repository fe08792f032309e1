"""Captions and the names of their images, out of annotation files: Karpathy's JSON, JSONL and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.picture_names import feature_name
from utils.errors import InputError, nearest
from utils.files import short_repr


class Caption(NamedTuple):
    """One caption as its source has it; ``filename`` is the picture's, ``image`` names its features in the image database."""

    text_id: str
    image: str
    filename: str
    raw: str
    split: str
    dataset: str


def read_karpathy(text: str) -> Iterator[Caption]:
    """Captions of ``dataset_flickr30k.json``, ``dataset_coco.json`` and their like; text ids are the ``sentid`` numbers."""
    contents = json.loads(text)
    if not isinstance(contents, dict) or not isinstance(contents.get("images"), list):
        raise ValueError("has no list 'images', expected Karpathy's JSON")
    dataset = str(contents.get("dataset", ""))
    for number, picture in enumerate(contents["images"]):
        try:
            filename, split = _text(picture, "filename"), _text(picture, "split")
            image = feature_name(dataset, filename, str(picture.get("filepath", "")))
            for sentence in picture["sentences"]:
                if not isinstance(sentence["sentid"], int):
                    raise ValueError(f"sentid is {sentence['sentid']!r}, expected a whole number")
                yield Caption(str(sentence["sentid"]), image, filename, _text(sentence, "raw"), split, dataset)
        except KeyError as error:
            raise ValueError(f"images[{number}]: has no {error}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"images[{number}]: {error}") from error


def _text(fields: dict[str, Any], key: str) -> str:
    """``fields[key]``, which has to be text that UTF-8 can hold; raises ``KeyError`` and ``ValueError``."""
    value = fields.get(key)
    if value is None:
        raise KeyError(key)
    if not isinstance(value, str):
        raise ValueError(f"{key} is {short_repr(value)}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{key} has half of a surrogate pair, expected text") from error
    return value


def _read_rows(rows: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[Caption]:
    """Captions of rows, each with its line; text ids number the rows of all splits, so that no two databases share one."""
    for number, (line, row) in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"line {line}: expected an object with image, caption and split")
        if None in row:  # so csv calls what is beyond the last column
            raise ValueError(f"line {line}: has more columns than the first line; a caption with commas needs quotes")
        try:
            image, caption, split = (_text(row, key) for key in ("image", "caption", "split"))
            name = feature_name("", image)
        except KeyError as error:
            raise ValueError(f"line {line}: has no text {error}, expected image, caption and split") from error
        except ValueError as error:
            raise ValueError(f"line {line}: {error}") from error
        yield Caption(str(number), name, image, caption, split.strip(), "")


def read_jsonl(text: str) -> Iterator[Caption]:
    """Captions of a file with one JSON object a line."""

    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        for line, contents in enumerate(text.split("\n"), start=1):
            if contents.strip():
                try:
                    yield line, json.loads(contents)
                except ValueError as error:
                    raise ValueError(f"line {line}: {error}") from error

    return _read_rows(rows())


def read_csv(text: str) -> Iterator[Caption]:
    """Captions of a CSV file whose first row names its columns."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    if len(set(reader.fieldnames or ())) < len(reader.fieldnames or ()):
        raise ValueError("line 1: names a column twice")
    return _read_rows((reader.line_num, row) for row in reader)


READERS = {".json": read_karpathy, ".jsonl": read_jsonl, ".csv": read_csv}


def read_annotations(path: Path) -> bytes:
    """The contents of an annotation file; raises ``InputError``."""
    if path.suffix not in READERS:
        raise InputError(f"{path}: unknown kind of file, expected one of {', '.join(READERS)}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def all_captions(path: Path, contents: bytes) -> Iterator[Caption]:
    """The captions of all splits in the ``contents`` of ``path``; raises ``InputError`` where they are malformed."""
    try:
        yield from READERS[path.suffix](contents.decode("utf-8-sig"))
    except (ValueError, RecursionError, csv.Error) as error:
        raise InputError(f"{path}: {error}") from error


def captions_of(path: Path, contents: bytes, split: str) -> list[Caption]:
    """The captions of one split; ``InputError`` also when it has none, two pictures have one name, or one is in two splits."""
    splits: set[str] = set()
    filename_of: dict[str, str] = {}
    split_of: dict[str, str] = {}
    captions = []
    for caption in all_captions(path, contents):
        splits.add(caption.split)
        other = filename_of.setdefault(caption.image, caption.filename)
        if other != caption.filename:
            both = f"{short_repr(other)} and {short_repr(caption.filename)}"
            raise InputError(f"{path}: {both} would both be image {short_repr(caption.image)}")
        if split_of.setdefault(caption.image, caption.split) != caption.split:
            both = f"{short_repr(split_of[caption.image])} and in {short_repr(caption.split)}"
            raise InputError(f"{path}: {short_repr(caption.filename)} is in {both}, expected a picture in one split")
        if caption.split == split:
            captions.append(caption)
    if split not in splits:
        raise InputError(f"{path}: no caption of split {split!r}{nearest(split, splits)}, it has {short_repr(sorted(splits))}")
    return captions
