"""Which pairs to score, where it is not all of them: such as what the first stage of a cascade leaves to the second.

Shapes: T texts, I images of a split, P listed pairs.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from utils.errors import InputError
from utils.files import short_repr


class Candidates(NamedTuple):
    """The images that each text is scored against, at least one in all.

    Attributes:
        places: (P,) int32, places of images in the split, one text's behind the other's, each text's in rising order.
        bounds: (T + 1,) int64, where in ``places`` those of each text begin and end.
    """

    places: np.ndarray
    bounds: np.ndarray

    @classmethod
    def of(cls, of_texts: Sequence[Sequence[int] | np.ndarray]) -> Candidates:
        """From the places of each text's images, in any order, each only once."""
        bounds = np.zeros(len(of_texts) + 1, np.int64)
        np.cumsum([len(places) for places in of_texts], out=bounds[1:])
        return cls(np.concatenate([np.sort(np.asarray(places, np.int32)) for places in of_texts]), bounds)

    def of_text(self, text: int) -> np.ndarray:
        """The places of this text's images."""
        return self.places[self.bounds[text] : self.bounds[text + 1]]

    def within(self, texts: slice, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """The pairs of these texts with images of places ``first`` to ``last``: which of the texts, from 0, and the places."""
        places = self.places[self.bounds[texts.start] : self.bounds[texts.stop]]
        rows = np.repeat(np.arange(texts.stop - texts.start), np.diff(self.bounds[texts.start : texts.stop + 1]))
        chosen = (places >= first) & (places <= last)
        return rows[chosen], places[chosen]

    def fingerprint(self) -> str:
        """A checksum of which pairs these are, however they were written down."""
        return hashlib.sha256(self.bounds.tobytes() + self.places.tobytes()).hexdigest()

    def counts(self, image_of: np.ndarray) -> dict[str, Any]:
        """How many pairs these are, and what they keep from being found, the image of each text being ``image_of`` (T,).

        ``texts_without_candidates``; ``texts_without_their_image``, for which it is not listed; ``images_without_a_text``, of
        those that have one, for which none of theirs lists them; ``at_most``, the recall at any K in each direction,
        ``"txt"`` and ``"img"``, of a model that makes no mistake.
        """
        lengths = np.diff(self.bounds)
        texts = np.repeat(np.arange(len(lengths)), lengths)
        found = texts[self.places == image_of[texts]]  # the texts that list their own image
        images, reached = len(np.unique(image_of)), len(np.unique(image_of[found]))
        return {
            "pairs": len(self.places),
            "texts_without_candidates": int((lengths == 0).sum()),
            "texts_without_their_image": len(lengths) - len(found),
            "images_without_a_text": images - reached,
            "at_most": {"txt": reached / images, "img": len(found) / len(lengths)},
        }

    def summary(self, image_of: np.ndarray) -> str:
        """What to print beside recalls of these candidates."""
        counts, texts, images = self.counts(image_of), len(image_of), len(np.unique(image_of))
        text_retrieval, image_retrieval = (f"{100 * counts['at_most'][way]:.2f} %" for way in ("txt", "img"))
        return (
            f"only {counts['pairs']:,} of {texts * images:,} pairs are candidates and scored, the others rank below them: "
            f"{counts['texts_without_their_image']:,} of {texts:,} texts lack their image, image retrieval finds at most "
            f"{image_retrieval}; {counts['images_without_a_text']:,} of {images:,} images lack all their texts, text "
            f"retrieval finds at most {text_retrieval}"
        )


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    text: str
    images: list[str]


def read_candidates(path: Path | str, text_ids: Sequence[str], image_names: Sequence[str]) -> Candidates:
    """A JSONL file, ``{"text": id, "images": [names]}`` a line, in any order; a text that has no line has no candidates.

    Raises:
        InputError: the file cannot be read; a line is damaged, names a text or an image that is not in the split, a text of an
            earlier line, or an image twice; or no pair is listed.
    """
    of_texts: list[np.ndarray] = [np.empty(0, np.int32)] * len(text_ids)
    line_of: dict[int, int] = {}
    index_of = {text_id: index for index, text_id in enumerate(text_ids)}
    place_of = {name: place for place, name in enumerate(image_names)}
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    listed = _decoded(line)
                    text = _known(index_of.get(listed.text), "text", listed.text, text_ids)
                    if line_of.setdefault(text, number) != number:
                        raise ValueError(
                            f"text {short_repr(listed.text)} has line {line_of[text]} already, expected one line a text"
                        )
                    places = [_known(place_of.get(name), "image", name, image_names) for name in listed.images]
                    if len(set(places)) < len(places):
                        twice = next(name for name, times in Counter(listed.images).items() if times > 1)
                        raise ValueError(
                            f"text {short_repr(listed.text)} has image {short_repr(twice)} twice, expected different ones"
                        )
                    of_texts[text] = np.array(places, np.int32)
                except ValueError as error:
                    raise InputError(f"{path}: line {number}: {error}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected candidates") from error
    candidates = Candidates.of(of_texts)
    if not len(candidates.places):
        raise InputError(f"{path}: lists no pair, expected candidates of at least one text")
    return candidates


def _decoded(line: bytes) -> _Line:
    try:
        return msgspec.json.decode(line, type=_Line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f'{error}; expected {{"text": "an id", "images": ["a name", …]}}') from error


def _known(place: int | None, kind: str, name: str, names: Sequence[str]) -> int:
    if place is None:
        raise ValueError(
            f"{kind} {short_repr(name)} is not among the {len(names):,} {kind}s of the split, like {short_repr(names[0])}"
        )
    return place
