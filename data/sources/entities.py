"""Read Flickr30k Entities (Plummer et al. 2015): captions with marked phrases, and the boxes of what the phrases name.

Its folder has for each picture
    Sentences/<picture>.txt    one caption per line; ``[/EN#12/clothing a red hat]`` is a phrase of coreference chain 12,
    Annotations/<picture>.xml  the boxes of each chain, or that the chain is the whole scene.
"""

from __future__ import annotations

import codecs
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np

from utils.errors import InputError
from utils.files import read_file, short_repr

KIND = "a file of Flickr30k Entities"
MAX_BYTES = 1 << 20  # of a file; those of Flickr30k have some kilobytes
MAX_BOXES = 4096  # of a picture; a box of two chains counts twice
_MAX_ELEMENTS = 50_000  # of a picture's file
_OPENING = re.compile(r"\[/EN#([0-9]{1,18})((?:/[^/\[\]]+)+)")
_NUMBER = re.compile(r"-?[0-9]{1,18}")


class Phrase(NamedTuple):
    """A marked phrase: its coreference chain, the types in its mark, and the positions of its words."""

    chain: int
    types: tuple[str, ...]
    words: range


class Caption(NamedTuple):
    """A caption without its marks."""

    words: list[str]
    phrases: list[Phrase]


@dataclass(frozen=True)
class Annotated:
    """The annotations of a picture.

    Attributes:
        captions: in the file's order.
        boxes: (boxes, 4) float64 for each chain that has boxes: x1, y1, x2, y2 divided by the picture's width and height.
        scenes: the chains that are marked as the scene.
    """

    captions: list[Caption]
    boxes: dict[int, np.ndarray]
    scenes: frozenset[int]


def picture_names(folder: Path) -> list[str]:
    """The sorted names of the annotated pictures. Raises ``InputError`` if there are none."""
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
    """Read the two files of a picture. Raises ``InputError``, with the line, if one is missing, damaged or over 1 MiB."""
    captions = read_sentences(folder / "Sentences" / f"{name}.txt")
    return Annotated(captions, *read_boxes(folder / "Annotations" / f"{name}.xml"))


def read_sentences(path: Path) -> list[Caption]:
    """Read the captions of a picture. Raises ``InputError`` as ``read_annotated`` does."""
    captions = []
    for number, line in enumerate(read_file(path, KIND, MAX_BYTES).removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        try:
            if line.strip():
                captions.append(parse_caption(line.decode()))
        except ValueError as error:
            raise InputError(f"{path}: line {number}: {error}") from error
    return captions


def parse_caption(line: str) -> Caption:
    """Separate words from marks. Raises ``ValueError`` for a mark that is damaged, nested or unclosed."""
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
    """Read ``boxes`` and ``scenes`` of a picture. Raises ``InputError`` as ``read_annotated`` does."""
    data = read_file(path, KIND, MAX_BYTES)
    try:
        return _boxes_and_scenes(_parse(data))
    except expat.ExpatError as error:
        raise InputError(f"{path}: line {error.lineno}: not XML ({expat.ErrorString(error.code)})") from error
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def _parse(data: bytes) -> ElementTree.Element:
    """The elements of an XML file, each with the attribute ``line``, where it ends, instead of its own attributes.

    Raises ``ValueError`` for what only hostile files have; refuses a document type before any entity is expanded or fetched.
    """
    parser, builder = expat.ParserCreate(), ElementTree.TreeBuilder()
    numbers = iter(range(_MAX_ELEMENTS))

    def start(tag: str, _: dict[str, str]) -> None:
        number = next(numbers, None)
        if number is None:
            raise ValueError(f"more than {_MAX_ELEMENTS:,} elements")
        if number == 0 and tag != "annotation":
            raise ValueError(f"element {short_repr(tag)} found, expected 'annotation'")
        builder.start(tag, {})

    def end(tag: str) -> None:
        builder.end(tag).set("line", str(parser.CurrentLineNumber))

    def refuse(*_: object) -> None:
        raise ValueError("document type declared (<!DOCTYPE), expected none")

    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, builder.data
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(data, True)
    except (ValueError, LookupError) as error:  # LookupError: an unknown encoding
        raise ValueError(f"line {parser.CurrentLineNumber}: {error}") from error
    return builder.close()


def _boxes_and_scenes(root: ElementTree.Element) -> tuple[dict[int, np.ndarray], frozenset[int]]:
    sides = [_whole(root, f"size/{side}") for side in ("width", "height")]
    if min(sides) < 1:
        raise _wrong(root, f"picture of {sides[0]} x {sides[1]} pixels, expected a positive width and height")
    corners_of: dict[int, list[list[int]]] = {}
    scenes: set[int] = set()
    boxes = 0
    for entry in root.findall("object"):
        chains = [_whole(name) for name in entry.findall("name")]
        corners = [_corners(box) for box in entry.findall("bndbox")]
        boxes += len(chains) * len(corners)
        if boxes > MAX_BOXES:
            raise _wrong(entry, f"more than {MAX_BOXES:,} boxes of chains")
        for chain in chains if corners else ():
            corners_of.setdefault(chain, []).extend(corners)
        if any(_whole(scene) > 0 for scene in entry.findall("scene")):
            scenes.update(chains)
    return {chain: np.array(corners) / (sides * 2) for chain, corners in corners_of.items()}, frozenset(scenes)


def _corners(box: ElementTree.Element) -> list[int]:
    x1, y1, x2, y2 = corners = [_whole(box, edge) for edge in ("xmin", "ymin", "xmax", "ymax")]
    if x1 > x2 or y1 > y2:
        raise _wrong(box, f"bndbox from {(x1, y1)} to {(x2, y2)}, expected its upper left and its lower right corner")
    return corners


def _whole(element: ElementTree.Element, path: str = ".") -> int:
    text = element.findtext(path, "").strip()
    if not _NUMBER.fullmatch(text):
        raise _wrong(element, f"{element.tag if path == '.' else path} is {short_repr(text)}, expected a whole number")
    return int(text)


def _wrong(element: ElementTree.Element, message: str) -> ValueError:
    return ValueError(f"line {element.get('line')}: {message}")
