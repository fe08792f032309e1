"""Flickr30k Entities (Plummer et al. 2015): captions whose phrases are marked, and the boxes of what they speak of.

A folder of them has, for each picture,
    Sentences/<picture>.txt    a caption a line; ``[/EN#12/clothing a red hat]`` is a phrase of coreference chain 12,
    Annotations/<picture>.xml  the boxes of the chains, or that a chain is the whole scene.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat

import numpy as np

from utils.errors import InputError
from utils.files import short_repr

MAX_BYTES = 1 << 20  # of a file; those of Flickr30k have some kilobytes
MAX_BOXES = 4096  # of a picture, each counted once for every chain it is of
_MAX_DEPTH = 8
_OPENING = re.compile(r"\[/EN#([0-9]{1,18})((?:/[^/\[\]]+)+)")
_NUMBER = re.compile(r"-?[0-9]{1,18}")
_EDGES = ("xmin", "ymin", "xmax", "ymax")


class Phrase(NamedTuple):
    """A marked phrase: its coreference chain, the types that its mark names, and the places of its words."""

    chain: int
    types: tuple[str, ...]
    words: range


class Caption(NamedTuple):
    """A caption without its marks."""

    words: list[str]
    phrases: list[Phrase]


@dataclass(frozen=True)
class Annotated:
    """A picture's captions and chains.

    Attributes:
        captions: in the file's order.
        boxes: (boxes, 4) float64 of each chain that has one: x1, y1, x2, y2 as shares of the picture's width and height.
        scenes: the chains that are marked as the scene.
    """

    captions: list[Caption]
    boxes: dict[int, np.ndarray]
    scenes: frozenset[int]


def picture_names(folder: Path) -> list[str]:
    """What the pictures of a folder are called, sorted. Raises ``InputError`` when there is none."""
    sentences = folder / "Sentences"
    try:
        files = sorted(os.listdir(sentences))
    except OSError as error:
        raise InputError(
            f"{sentences}: cannot be read ({error.strerror}), expected a folder of Sentences/ and Annotations/"
        ) from error
    names = [file.removesuffix(".txt") for file in files if file.endswith(".txt") and not file.startswith(".")]
    if not names:
        raise InputError(f"{sentences}: no .txt file in it")
    return names


def read_annotated(folder: Path, name: str) -> Annotated:
    """The two files of a picture. Raises ``InputError``, with the line, when one is missing, damaged or over 1 MiB."""
    captions = read_sentences(folder / "Sentences" / f"{name}.txt")
    return Annotated(captions, *read_boxes(folder / "Annotations" / f"{name}.xml"))


def read_sentences(path: Path) -> list[Caption]:
    """The captions of a picture. Raises ``InputError`` as ``read_annotated`` does."""
    data = _read(path)
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1  # without the mark of byte order
        raise InputError(f"{path}: line {number}: not UTF-8 ({error.reason})") from error
    captions = []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                captions.append(parse_caption(line))
        except ValueError as error:
            raise InputError(f"{path}: line {number}: {error}") from error
    return captions


def parse_caption(line: str) -> Caption:
    """Tell words from marks. Raises ``ValueError`` for a mark that is damaged, within another, or without its other end."""
    words: list[str] = []
    phrases: list[Phrase] = []
    opening: re.Match[str] | None = None
    first = 0
    for token in line.split():
        if token.startswith("["):
            within, opening, first = opening, _OPENING.fullmatch(token), len(words)
            if opening is None:
                raise ValueError(f"{short_repr(token)} found, expected the start of a phrase, such as [/EN#12/clothing")
            if within is not None:
                raise ValueError(f"{short_repr(token)} begins within the phrase of {within[0]}, expected its ] before")
            continue
        word = token.removesuffix("]")
        words += [word] if word else []
        if word != token:
            if opening is None:
                raise ValueError(f"{short_repr(token)} ends a phrase, but none has begun")
            phrases.append(Phrase(int(opening[1]), tuple(opening[2].split("/")[1:]), range(first, len(words))))
            opening = None
    if opening is not None:
        raise ValueError(f"the phrase of {short_repr(opening[0])} does not end, expected a ]")
    return Caption(words, phrases)


def read_boxes(path: Path) -> tuple[dict[int, np.ndarray], frozenset[int]]:
    """``boxes`` and ``scenes`` of a picture. Raises ``InputError`` as ``read_annotated`` does.

    A file with a document type is refused before anything in it is read, so there are no entities to expand or to fetch.
    """
    data = _read(path)
    parser = expat.ParserCreate()
    parser.buffer_text = True
    events = _Events()
    parser.StartElementHandler = events.start
    parser.CharacterDataHandler = events.text.append
    parser.EndElementHandler = events.end
    parser.StartDoctypeDeclHandler = events.refuse
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise InputError(f"{path}: line {error.lineno}: not XML ({expat.ErrorString(error.code)})") from error
    except (ValueError, LookupError) as error:  # LookupError: an encoding that there is not
        raise InputError(f"{path}: line {parser.CurrentLineNumber}: {error}") from error
    sides = np.array([events.size["width"], events.size["height"]] * 2)
    boxes = {chain: np.array(of_chain) / sides for chain, of_chain in events.boxes.items()}
    return boxes, frozenset(events.scenes)


class _Events:
    """Gathers boxes and scenes from what the parser meets, in one pass and without a tree. Raises ``ValueError``."""

    def __init__(self) -> None:
        self.size: dict[str, int] = {}
        self.boxes: dict[int, list[list[int]]] = {}
        self.scenes: set[int] = set()
        self.text: list[str] = []
        self._path: list[str] = []
        self._chains: list[int] = []
        self._of_object: list[list[int]] = []
        self._edges: dict[str, int] = {}
        self._is_scene = False
        self._boxes = 0

    def refuse(self, *_: object) -> None:
        raise ValueError("document type declared (<!DOCTYPE), expected none")

    def start(self, tag: str, _: dict[str, str]) -> None:
        if not self._path and tag != "annotation":
            raise ValueError(f"element {short_repr(tag)} found, expected 'annotation'")
        if len(self._path) == _MAX_DEPTH:
            raise ValueError(f"elements within one another, expected at most {_MAX_DEPTH} deep")
        self._path.append(tag)
        self.text.clear()

    def end(self, tag: str) -> None:
        parents = self._path[1:-1]
        self._path.pop()
        if parents == ["size"] and tag in ("width", "height"):
            self.size[tag] = self._number(tag)
        elif parents == ["object", "bndbox"] and tag in _EDGES:
            self._edges[tag] = self._number(tag)
        elif parents == ["object"]:
            if tag == "name":
                self._chains.append(self._number(tag))
            elif tag == "scene":
                self._is_scene = self._number(tag) > 0
            elif tag == "bndbox":
                self._end_box()
        elif self._path and not parents and tag == "object":
            self._end_object()
        elif not self._path:
            self._end_picture()
        self.text.clear()

    def _number(self, tag: str) -> int:
        text = "".join(self.text).strip()
        if not _NUMBER.fullmatch(text):
            raise ValueError(f"{tag} is {short_repr(text)}, expected a whole number")
        return int(text)

    def _end_box(self) -> None:
        for edge in _EDGES:
            if edge not in self._edges:
                raise ValueError(f"bndbox without {edge}")
        x1, y1, x2, y2 = box = [self._edges[edge] for edge in _EDGES]
        if x1 > x2 or y1 > y2:
            raise ValueError(f"bndbox from {(x1, y1)} to {(x2, y2)}, expected its left upper and its right lower corner")
        self._of_object.append(box)
        self._edges = {}

    def _end_picture(self) -> None:
        for side in ("width", "height"):
            if self.size.get(side, 0) < 1:
                raise ValueError(f"{side} of the picture is {self.size.get(side, 'missing')}, expected a positive number")

    def _end_object(self) -> None:
        self._boxes += len(self._chains) * len(self._of_object)
        if self._boxes > MAX_BOXES:
            raise ValueError(f"more than {MAX_BOXES:,} boxes of chains")
        for chain in self._chains if self._of_object else ():
            self.boxes.setdefault(chain, []).extend(self._of_object)
        if self._is_scene:
            self.scenes.update(self._chains)
        self._chains, self._of_object, self._is_scene = [], [], False


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected a file of Flickr30k Entities") from error
    if len(data) > MAX_BYTES:
        raise InputError(f"{path}: over {MAX_BYTES:,} bytes, expected a file of Flickr30k Entities")
    return data
