#!/usr/bin/env python
"""Score the examples of Winoground, or of others in its layout: text, image and group score, overall and by tag.

python scripts/eval_winoground.py --examples examples.jsonl --img_db DB --checkpoint FILE --model_config JSON --output_dir DIR
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from data.batch import check_length
from data.image_db import ImageDatabase
from data.picture_names import feature_name
from evaluation.options import FROM_TRAINING, RetrieverOptions
from evaluation.retriever import Retriever
from evaluation.winoground import Example, outcomes, read_examples, score_examples, summary, table
from utils.errors import InputError, one_line_errors
from utils.files import atomic_file, output_folder, save_json, sha256
from utils.logging import log_to_screen
from utils.options import check_at_least, option, parse_options, require

LOGGER = logging.getLogger("winoground")


@dataclass(frozen=True, kw_only=True)
class WinogroundOptions(RetrieverOptions):
    """Options of this program."""

    examples: str = option("", "examples.jsonl: two captions and two images a line")
    img_db: str = option("", "image database that has these images")
    output_dir: str = option("", "folder for winoground.json and scores.jsonl")
    batch_size: int = option(400, "most pairs in one chunk of the encoder; changes scores by rounding alone")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "examples", "img_db", "output_dir")
        check_at_least(self, 1, "batch_size")


@one_line_errors
def main(argv: Sequence[str]) -> None:
    """Options → examples and their images → model → scores → how many are right."""
    started = time.perf_counter()
    log_to_screen()
    options = parse_options(WinogroundOptions, argv, __doc__ or "", inherit=FROM_TRAINING)
    path = Path(options.examples)
    by_line = read_examples(path)
    with ExitStack() as stack:
        image_db = stack.enter_context(
            closing(ImageDatabase(options.img_db, options.box_rule, compressed=options.compressed_db))
        )
        record_of = records_of(path, by_line, image_db)
        retriever = Retriever.from_options(options, options.batch_size)
        check_captions(path, by_line, retriever)
        output = stack.enter_context(output_folder(options.output_dir))
        examples = list(by_line.values())
        scores = score_examples(retriever, examples, record_of, image_db)
        save_scores(output / "scores.jsonl", examples, scores)
        results = summary(examples, scores)
        results["seconds"] = time.perf_counter() - started
        results["provenance"] = retriever.provenance(options, image_db) | {"examples_sha256": sha256(path)}
        save_json(output / "winoground.json", results)
    print(table(results))
    LOGGER.info("wrote %s and %s", output / "winoground.json", output / "scores.jsonl")


def records_of(path: Path, by_line: dict[int, Example], image_db: ImageDatabase) -> dict[str, str]:
    """The record of each image that the examples of ``path`` name: that of ``ex_0_img_0`` is called ``ex_0_img_0.npz``.

    Where the first one is not there under its own name, something may precede it, ``winoground_ex_0_img_0.npz``: the same for
    all, and for the first image there must be one such record only.

    Raises:
        InputError: an image has no record; names the first line that needs it.
    """
    line_of = {name: line for line, example in reversed(by_line.items()) for name in example.images}
    record_of = {}
    for name, line in sorted(line_of.items(), key=lambda item: item[1]):
        try:
            record_of[name] = feature_name("", name)
        except ValueError as error:
            raise InputError(f"{path}: line {line}: {error}") from error
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
                f"{path}: line {line_of[name]}: image {name!r}: {image_db.path} has no {record} ({len(absent)} absent in all)"
            )
    return record_of


def check_captions(path: Path, by_line: dict[int, Example], retriever: Retriever) -> None:
    """Raise ``InputError`` for the first caption that is empty or too long for the model; names its line."""
    for line, example in by_line.items():
        for name in ("caption_0", "caption_1"):
            length = len(retriever.tokenizer.encode(getattr(example, name)))
            if not length:
                raise InputError(f"{path}: line {line}: {name} has no word pieces")
            try:
                check_length(name, length, retriever.config.input_limits)
            except InputError as error:
                raise InputError(f"{path}: line {line}: {error}") from error


def save_scores(path: Path, examples: Sequence[Example], scores: np.ndarray) -> None:
    """Write one line for each example: its id, its scores, caption by image, and in which ways it is right."""
    right = outcomes(scores)
    with atomic_file(path) as file:
        for number, (example, table_of) in enumerate(zip(examples, scores.tolist(), strict=True)):
            found = {name: bool(values[number]) for name, values in right.items()}
            file.write((json.dumps({"id": example.id, "scores": table_of, **found}) + "\n").encode())


if __name__ == "__main__":
    main(sys.argv[1:])
