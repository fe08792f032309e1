"""Select the (text, image) pairs to score if not all are: candidates from a file, or sampled ones for quick validation.

Shapes: T texts, I images of a split, P listed pairs.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np

from data.datasets import draw_others
from data.split import RetrievalSplit
from utils.errors import InputError
from utils.files import reading, short_repr

Item = TypeVar("Item")


class Candidates(NamedTuple):
    """The images to score each text with; at least one pair in all.

    Attributes:
        images: (P,) int32, indices of images, text by text, ascending for each text.
        bounds: (T + 1,) int64, where the images of each text begin and end in ``images``.
    """

    images: np.ndarray
    bounds: np.ndarray

    @classmethod
    def of(cls, images_of: Sequence[Sequence[int] | np.ndarray]) -> Candidates:
        """Collect the distinct images of each text, in any order."""
        bounds = np.cumsum([0, *map(len, images_of)], dtype=np.int64)
        return cls(np.concatenate([np.sort(np.asarray(images, np.int32)) for images in images_of]), bounds)

    def of_text(self, text: int) -> np.ndarray:
        """Return the images of one text."""
        return self.images[self.bounds[text] : self.bounds[text + 1]]

    def between(self, texts: slice, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Return text and image indices of the pairs of ``texts`` with the images from ``first`` to ``last``."""
        of_pairs = np.arange(texts.start, texts.stop).repeat(np.diff(self.bounds[texts.start : texts.stop + 1]))
        images = self.images[self.bounds[texts.start] : self.bounds[texts.stop]]
        chosen = (images >= first) & (images <= last)
        return of_pairs[chosen], images[chosen]

    def fingerprint(self) -> str:
        """Return a checksum of the pairs, whatever their order in the file."""
        return hashlib.sha256(self.bounds.tobytes() + self.images.tobytes()).hexdigest()

    def counts(self, image_of: np.ndarray) -> dict[str, Any]:
        """Count the pairs, and the positives that are missing; ``image_of`` (T,) is the image of each text.

        ``images_without_a_text`` are images whose texts all lack them; ``at_most`` is the recall, at any K, of a model without
        errors in each direction, ``"txt"`` and ``"img"``.
        """
        lengths = np.diff(self.bounds)
        texts = np.arange(len(lengths)).repeat(lengths)
        with_own = texts[self.images == image_of[texts]]
        images, reached = len(np.unique(image_of)), len(np.unique(image_of[with_own]))
        return {
            "pairs": len(self.images),
            "texts_without_candidates": int((lengths == 0).sum()),
            "texts_without_their_image": len(lengths) - len(with_own),
            "images_without_a_text": images - reached,
            "at_most": {"txt": reached / images, "img": len(with_own) / len(lengths)},
        }

    def summary(self, image_of: np.ndarray) -> str:
        """Describe ``counts`` in one line, to print beside recalls."""
        counts, texts, images = self.counts(image_of), len(image_of), len(np.unique(image_of))
        limit = {direction: f"{100 * recall:.2f} %" for direction, recall in counts["at_most"].items()}
        return (
            f"candidate pairs: {counts['pairs']:,} of {texts * images:,}; the others are not scored and rank last; "
            f"texts without their image: {counts['texts_without_their_image']:,} of {texts:,}, image retrieval finds at most "
            f"{limit['img']}; images without their texts: {counts['images_without_a_text']:,} of {images:,}, text retrieval "
            f"finds at most {limit['txt']}"
        )


def sampled_candidates(split: RetrievalSplit, images_per_text: int) -> Candidates:
    """Draw candidates for quick validation: the image of each text and random others, up to ``images_per_text``.

    Every call draws the same, so that runs and seeds are compared on the same pairs.
    """
    rng = np.random.default_rng(0)
    images = len(split.image_names)
    others = min(images_per_text, images) - 1
    return Candidates.of([np.append(draw_others(rng, images, [own], others), own) for own in split.image_of])


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    text: str
    images: list[str]


def read_candidates(path: Path | str, text_ids: Sequence[str], image_names: Sequence[str]) -> Candidates:
    """Read a JSONL file, one ``{"text": id, "images": [names]}`` per line; texts without a line have no candidates.

    Raises ``InputError`` if the file lists no pair, or a line is malformed or has an unknown or repeated text or image.
    """
    text_index, image_index = ({name: index for index, name in enumerate(names)} for names in (text_ids, image_names))
    images_of: list[Sequence[int]] = [()] * len(text_ids)
    line_of: dict[str, int] = {}
    for number, line in read_jsonl(path, _Line, '{"text": "an id", "images": ["a name", …]}'):
        try:
            (text,) = _indices("text", [line.text], text_index)
            if line_of.setdefault(line.text, number) != number:
                raise ValueError(
                    f"text {short_repr(line.text)} is on line {line_of[line.text]} already, expected one line each"
                )
            images_of[text] = _indices("image", line.images, image_index)
        except ValueError as error:
            raise InputError(f"{path}: line {number}: {error}") from error
    if not any(map(len, images_of)):
        raise InputError(f"{path}: lists no pair, expected candidates for at least one text")
    return Candidates.of(images_of)


def _indices(kind: str, names: Sequence[str], index: Mapping[str, int]) -> list[int]:
    """Return the indices of distinct ``names``; raise ``ValueError`` for an unknown or repeated one."""
    for name, times in Counter(names).items():
        if name not in index:
            known = f"one of its {len(index):,} {kind}s, such as {short_repr(next(iter(index)))}"
            raise ValueError(f"{kind} {short_repr(name)} is not in the split; expected {known}")
        if times > 1:
            raise ValueError(f"{kind} {short_repr(name)} is listed {times} times, expected once")
    return [index[name] for name in names]


def read_jsonl(path: Path | str, kind: type[Item], expected: str) -> Iterator[tuple[int, Item]]:
    """Yield number and content of each line that is not blank; ``expected`` describes a line for error messages.

    Raises ``InputError`` if the file cannot be read, or a line is not JSON of this ``kind``.
    """
    with reading(path, f"lines of {expected}") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf").strip()
            try:
                if line:
                    yield number, msgspec.json.decode(line, type=kind)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                raise InputError(f"{path}: line {number}: {error}; expected {expected}") from error
