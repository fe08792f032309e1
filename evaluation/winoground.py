"""Winoground (Thrush et al., CVPR 2022): two captions of the same words, two images, and which belongs to which.

With s(caption, image) as the score and strict comparisons, so that a tie is a mistake, an example is correct in its
    text score    if s(C0, I0) > s(C1, I0) and s(C1, I1) > s(C0, I1): the right caption is found for each image,
    image score   if s(C0, I0) > s(C0, I1) and s(C1, I1) > s(C1, I0): the right image is found for each caption,
    group score   if both are correct.
Shapes: E examples; scores are (E, 2, 2), caption by image.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from data.image_db import ImageDatabase
from data.picture_names import feature_name
from evaluation.analysis import Bootstrap
from evaluation.candidates import read_jsonl
from evaluation.retriever import Retriever
from evaluation.tables import aligned
from utils.errors import InputError
from utils.files import atomic_file
from utils.logging import progress_bar

CHANCE = {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6}
TAGS = ("tag", "collapsed_tag", "secondary_tag", "num_main_preds")
EXAMPLES_PER_BATCH = 64
_Filled = Annotated[str, msgspec.Meta(min_length=1)]


class Example(msgspec.Struct, frozen=True):
    """A line of ``examples.jsonl``; an example with an empty or missing tag is in no group of that tag."""

    id: int | str
    image_0: _Filled
    image_1: _Filled
    caption_0: _Filled
    caption_1: _Filled
    tag: str = ""
    secondary_tag: str = ""
    num_main_preds: int | None = None
    collapsed_tag: str = ""

    @property
    def images(self) -> tuple[str, str]:
        """The names of the two images."""
        return self.image_0, self.image_1

    @property
    def captions(self) -> tuple[str, str]:
        """The two captions."""
        return self.caption_0, self.caption_1


def read_examples(path: Path) -> dict[int, Example]:
    """Read the examples of a JSONL file, by line number.

    Raises ``InputError`` if the file is unreadable or has no example, or a line is malformed or repeats an id.
    """
    examples: dict[int, Example] = {}
    line_of: dict[int | str, int] = {}
    for line, example in read_jsonl(path, Example, "an example of Winoground"):
        if example.image_0 == example.image_1:
            raise InputError(f"{path}: line {line}: image_0 and image_1 are both {example.image_0!r}, expected two images")
        if line_of.setdefault(example.id, line) != line:
            first = line_of[example.id]
            raise InputError(f"{path}: line {line}: id {example.id!r} is on line {first} already, expected distinct ids")
        examples[line] = example
    if not examples:
        raise InputError(f"{path}: has no example, expected one per line")
    return examples


def find_records(path: Path, examples: Mapping[int, Example], image_db: ImageDatabase) -> dict[str, str]:
    """Return the record in ``image_db`` of each image that the examples of ``path`` name, such as ``ex_0_img_0.npz``.

    If the first image has no record of its name, its only record with a prefix, such as ``winoground_ex_0_img_0.npz``, sets the
    prefix for all. Raises ``InputError`` for an image without a record; names the first line that needs it.
    """
    line_of: dict[str, int] = {}
    record_of: dict[str, str] = {}
    for line, example in examples.items():
        for name in example.images:
            try:
                record_of[name] = feature_name("", name)
            except ValueError as error:
                raise InputError(f"{path}: line {line}: {error}") from error
            line_of.setdefault(name, line)
    first = next(iter(record_of.values()))
    if first not in image_db:
        prefixes = {record.removesuffix(first) for record in image_db.names() if record.endswith(f"_{first}")}
        if len(prefixes) == 1:
            prefix = prefixes.pop()
            record_of = {name: prefix + record for name, record in record_of.items()}
    absent = set(image_db.absent(record_of.values()))
    for name, record in record_of.items():
        if record in absent:
            raise InputError(
                f"{path}: line {line_of[name]}: image {name!r}: {image_db.path} has no {record} ({len(absent)} absent in all), "
                "expected the image database of these examples"
            )
    return record_of


def check_captions(path: Path, examples: Mapping[int, Example], retriever: Retriever) -> None:
    """Raise ``InputError`` for the first caption that the model cannot score; names its line."""
    for line, example in examples.items():
        for number, caption in enumerate(example.captions):
            try:
                retriever.score([caption], [])
            except InputError as error:
                raise InputError(f"{path}: line {line}: caption_{number}: {error}") from error


def score_examples(
    retriever: Retriever, examples: Sequence[Example], record_of: Mapping[str, str], image_db: ImageDatabase
) -> np.ndarray:
    """Return the scores (E, 2, 2), caption by image, float32; ``record_of`` is the record in ``image_db`` of each image.

    Reads each image once per ``EXAMPLES_PER_BATCH`` examples. Raises ``InputError`` if a record does not fit the model.
    """
    scores = []
    with (
        retriever.compute.inference(retriever.model),
        progress_bar(True, total=len(examples), desc="winoground", unit="example") as bar,
    ):
        for first in range(0, len(examples), EXAMPLES_PER_BATCH):
            batch = examples[first : first + EXAMPLES_PER_BATCH]
            names = list(dict.fromkeys(name for example in batch for name in example.images))
            captions = [caption for example in batch for caption in example.captions]
            pairs = [
                (2 * number + caption, names.index(image))
                for number, example in enumerate(batch)
                for caption in (0, 1)
                for image in example.images
            ]
            images = [image_db[record_of[name]] for name in names]
            scores.append(retriever.score_pairs(captions, images, pairs).reshape(-1, 2, 2))
            bar.update(len(batch))
    return np.concatenate(scores)


def outcomes(scores: np.ndarray) -> dict[str, np.ndarray]:
    """Return whether each example is correct in its ``text``, ``image`` and ``group`` score: (E, 2, 2) → (E,) each."""
    text = (scores[:, 0, 0] > scores[:, 1, 0]) & (scores[:, 1, 1] > scores[:, 0, 1])
    image = (scores[:, 0, 0] > scores[:, 0, 1]) & (scores[:, 1, 1] > scores[:, 1, 0])
    return {"text": text, "image": image, "group": text & image}


def ties(scores: np.ndarray) -> dict[str, int]:
    """Return how many of the 2 · E comparisons of the ``text`` and of the ``image`` score have equal scores."""
    text, image = scores[:, 0] == scores[:, 1], scores[:, :, 0] == scores[:, :, 1]
    return {"text": int(text.sum()), "image": int(image.sum())}


def summary(examples: Sequence[Example], scores: np.ndarray) -> dict[str, Any]:
    """Return the fractions ``text``, ``image`` and ``group`` with intervals, overall and by tag, chance, ties and counts.

    Intervals resample pairs of images with all their examples, which are not independent.
    """
    pairs: dict[frozenset[str], int] = {}
    pair_of = np.array([pairs.setdefault(frozenset(example.images), len(pairs)) for example in examples])
    bootstrap, correct = Bootstrap(len(pairs)), outcomes(scores)

    def estimates(rows: np.ndarray) -> dict[str, Any]:
        return bootstrap.estimates({name: values[rows] for name, values in correct.items()}, pair_of[rows])

    by_tag: dict[str, dict[str, Any]] = {kind: {} for kind in TAGS}
    for kind, groups in by_tag.items():
        tags = [getattr(example, kind) for example in examples]
        for tag in sorted({tag for tag in tags if tag not in ("", None)}):
            rows = np.flatnonzero([other == tag for other in tags])
            groups[str(tag)] = {**estimates(rows), "examples": len(rows)}
    images = {name for example in examples for name in example.images}
    return {
        **estimates(np.arange(len(examples))),
        "chance": CHANCE,
        "by_tag": by_tag,
        "ties": ties(scores),
        "counts": {"examples": len(examples), "image_pairs": len(pairs), "images": len(images)},
    }


def table(results: Mapping[str, Any]) -> str:
    """Format ``summary`` in percent: all examples, their intervals, chance, and the groups of all tags but the finest."""

    def percent(values: Mapping[str, Any]) -> list[str]:
        return [f"{100 * values[score]:.2f}" for score in CHANCE]

    intervals = [results["interval_95"][score] for score in CHANCE]
    groups = [(f"{kind} {tag}", values) for kind in TAGS[1:] for tag, values in results["by_tag"][kind].items()]
    rows = [
        ["", "examples", *CHANCE],
        ["all", f"{results['counts']['examples']:,}", *percent(results)],
        ["95 % interval", "", *(f"{100 * ends[0]:.2f} – {100 * ends[1]:.2f}" if ends else "–" for ends in intervals)],
        ["chance", "", *percent(CHANCE)],
        *([name, f"{values['examples']:,}", *percent(values)] for name, values in groups),
    ]
    return aligned(rows)


def save_scores(path: Path, examples: Sequence[Example], scores: np.ndarray) -> None:
    """Write one JSON line per example: its id, its scores, and which of its three scores are correct."""
    correct = outcomes(scores)
    with atomic_file(path) as file:
        for number, (example, of_example) in enumerate(zip(examples, scores.tolist(), strict=True)):
            flags = {name: bool(values[number]) for name, values in correct.items()}
            file.write((json.dumps({"id": example.id, "scores": of_example, **flags}) + "\n").encode())
