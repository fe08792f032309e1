"""Winoground (Thrush et al., CVPR 2022): two captions of the same words, two images, and which belongs to which.

s(caption, image) being the score, and each comparison strict, so that a tie is a mistake, an example is right in its
    text score    if s(C0, I0) > s(C1, I0) and s(C1, I1) > s(C0, I1): for each image the right caption is found,
    image score   if s(C0, I0) > s(C0, I1) and s(C1, I1) > s(C1, I0): for each caption the right image is found,
    group score   if both are right.
Shapes: E examples; scores are (E, 2, 2), caption by image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from data.image_db import Image, ImageDatabase
from evaluation.bootstrap import Bootstrap
from evaluation.retriever import Retriever
from utils.errors import InputError
from utils.logging import progress_bar

CHANCE = {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6}
TAGS = ("tag", "collapsed_tag", "secondary_tag", "num_main_preds")
EXAMPLES_PER_BATCH = 64
_Filled = Annotated[str, msgspec.Meta(min_length=1)]


class Example(msgspec.Struct, frozen=True):
    """A line of ``examples.jsonl``; a tag that is empty or missing puts it in no group."""

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


def read_examples(path: Path) -> dict[int, Example]:
    """The examples of a JSONL file, by the number of their line.

    Raises:
        InputError: the file cannot be read, a line is damaged, an id occurs twice, or there is no example.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    examples: dict[int, Example] = {}
    line_of: dict[int | str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            example = msgspec.json.decode(line.encode(), type=Example)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise InputError(f"{path}: line {number}: {error}; expected an example of Winoground") from error
        if example.image_0 == example.image_1:
            raise InputError(f"{path}: line {number}: image_0 and image_1 are both {example.image_0!r}, expected two images")
        if line_of.setdefault(example.id, number) != number:
            raise InputError(f"{path}: line {number}: id {example.id!r} is that of line {line_of[example.id]} already")
        examples[number] = example
    if not examples:
        raise InputError(f"{path}: no example in it")
    return examples


def score_examples(
    retriever: Retriever, examples: Sequence[Example], record_of: dict[str, str], image_db: ImageDatabase
) -> np.ndarray:
    """The scores (E, 2, 2), caption by image, float32; each image is read once for every ``EXAMPLES_PER_BATCH`` examples.

    Args:
        record_of: the name in ``image_db`` of each image that the examples name.

    Raises:
        InputError: a record or a caption that the model cannot take.
    """
    scores = np.empty((len(examples), 2, 2), np.float32)
    with (
        retriever.compute.inference(retriever.model),
        progress_bar(True, total=len(examples), desc="winoground", unit="example") as bar,
    ):
        for batch, rows in _batches(examples):
            names = list(dict.fromkeys(name for example in batch for name in example.images))
            place = {name: number for number, name in enumerate(names)}
            images: list[Image] = [image_db[record_of[name]] for name in names]
            captions = [caption for example in batch for caption in (example.caption_0, example.caption_1)]
            pairs = [
                (2 * number + caption, place[image])
                for number, example in enumerate(batch)
                for caption in (0, 1)
                for image in example.images
            ]
            scores[rows] = retriever.score_pairs(captions, images, np.array(pairs)).reshape(-1, 2, 2)
            bar.update(len(batch))
    return scores


def outcomes(scores: np.ndarray) -> dict[str, np.ndarray]:
    """Whether each example is right in its ``text``, ``image`` and ``group`` score: (E, 2, 2) → (E,) each."""
    text = (scores[:, 0, 0] > scores[:, 1, 0]) & (scores[:, 1, 1] > scores[:, 0, 1])
    image = (scores[:, 0, 0] > scores[:, 0, 1]) & (scores[:, 1, 1] > scores[:, 1, 0])
    return {"text": text, "image": image, "group": text & image}


def ties(scores: np.ndarray) -> dict[str, int]:
    """How many of the 2 · E comparisons of the ``text`` and of the ``image`` score meet two equal scores."""
    return {
        "text": int((scores[:, 0] == scores[:, 1]).sum()),
        "image": int((scores[:, :, 0] == scores[:, :, 1]).sum()),
    }


def summary(examples: Sequence[Example], scores: np.ndarray) -> dict[str, Any]:
    """Fractions ``text``, ``image`` and ``group``, their chance levels, 95 % intervals, all this by tag, ties and counts.

    The intervals resample pairs of images with all their examples, which share what the model makes of these images.
    """
    pairs: dict[frozenset[str], int] = {}
    pair_of = np.array([pairs.setdefault(frozenset(example.images), len(pairs)) for example in examples])
    bootstrap, right = Bootstrap(len(pairs)), outcomes(scores)

    def measured(rows: np.ndarray) -> dict[str, Any]:
        return {
            **{name: float(values[rows].mean()) for name, values in right.items()},
            "interval_95": {name: bootstrap.mean(values[rows], pair_of[rows]) for name, values in right.items()},
        }

    by_tag: dict[str, dict[str, Any]] = {}
    for kind in TAGS:
        tags = [getattr(example, kind) for example in examples]
        by_tag[kind] = {}
        for tag in sorted({tag for tag in tags if tag not in ("", None)}):
            rows = np.flatnonzero([other == tag for other in tags])
            by_tag[kind][str(tag)] = {**measured(rows), "examples": len(rows)}
    return {
        **measured(np.arange(len(examples))),
        "chance": CHANCE,
        "by_tag": by_tag,
        "ties": ties(scores),
        "counts": {
            "examples": len(examples),
            "image_pairs": len(pairs),
            "images": len({name for example in examples for name in example.images}),
        },
    }


def table(results: dict[str, Any]) -> str:
    """``summary`` in percent: all examples with their intervals, chance, and the groups of all tags but the finest."""
    groups = [(f"{kind} {tag}", values) for kind in TAGS[1:] for tag, values in results["by_tag"][kind].items()]
    rows = [("all", results | results["counts"]), *groups]
    width = max(len(name) for name, _ in [*rows, ("95 % interval", None)])
    lines = [f"{'':{width}}{'examples':>10}" + "".join(f"{name:>16}" for name in CHANCE)]
    for name, values in rows:
        lines.append(f"{name:{width}}{values['examples']:10,}" + "".join(f"{100 * values[score]:16.2f}" for score in CHANCE))
    intervals = (results["interval_95"][score] for score in CHANCE)
    cells = (f"{100 * found[0]:.2f} – {100 * found[1]:.2f}" if found else "–" for found in intervals)
    lines.insert(2, f"{'95 % interval':{width}}{'':10}" + "".join(f"{cell:>16}" for cell in cells))
    lines.insert(3, f"{'chance':{width}}{'':10}" + "".join(f"{100 * level:16.2f}" for level in CHANCE.values()))
    return "\n".join(lines)


def _batches(examples: Sequence[Example]) -> Iterator[tuple[Sequence[Example], slice]]:
    for first in range(0, len(examples), EXAMPLES_PER_BATCH):
        rows = slice(first, first + EXAMPLES_PER_BATCH)
        yield examples[rows], rows
