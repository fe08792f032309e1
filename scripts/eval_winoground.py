#!/usr/bin/env python
"""Score the examples of Winoground, or others in its format: text, image and group score, overall and by tag.

python scripts/eval_winoground.py --examples examples.jsonl --img_db DB --checkpoint FILE --model_config JSON --output_dir DIR
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.startup import one_line_errors
from data.image_db import ImageDatabase
from evaluation import winoground
from evaluation.options import FROM_TRAINING, RetrieverOptions
from evaluation.results import made_with
from evaluation.retriever import Retriever
from utils.files import exclusive_folder, save_json, sha256
from utils.logging import log_to_screen
from utils.options import check_at_least, option, parse_options, require
from utils.signals import StopSignal

LOGGER = logging.getLogger("winoground")


@dataclass(frozen=True, kw_only=True)
class WinogroundOptions(RetrieverOptions):
    """Options of eval_winoground.py."""

    examples: str = option("", "examples.jsonl: two captions and two images per line")
    img_db: str = option("", "image database of these images")
    output_dir: str = option("", "output folder for winoground.json and scores.jsonl")
    batch_size: int = option(400, "maximum number of pairs per encoder batch; changes scores by rounding only")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "examples", "img_db", "output_dir")
        check_at_least(self, 1, "batch_size")


@one_line_errors
def main(argv: Sequence[str]) -> None:
    """Options → examples and their images → model → scores → fractions of correct examples."""
    started = time.perf_counter()
    log_to_screen()
    options = parse_options(WinogroundOptions, argv, __doc__ or "", inherit=FROM_TRAINING)
    path = Path(options.examples)
    by_line = winoground.read_examples(path)
    examples = list(by_line.values())
    with ExitStack() as stack:
        stack.enter_context(StopSignal())
        image_db = ImageDatabase(options.img_db, options.box_rule, compressed=options.compressed_db)
        stack.enter_context(closing(image_db))
        record_of = winoground.find_records(path, by_line, image_db)
        retriever = Retriever.from_options(options, options.batch_size)
        checksum = sha256(options.checkpoint)
        winoground.check_captions(path, by_line, retriever)
        output = stack.enter_context(exclusive_folder(options.output_dir, "winoground.json"))
        scores = winoground.score_examples(retriever, examples, record_of, image_db)
        winoground.save_scores(output / "scores.jsonl", examples, scores)
        more = {"checkpoint_sha256": checksum, "examples_sha256": sha256(path), "vocabulary": retriever.tokenizer.name}
        results = {
            **winoground.summary(examples, scores),
            "seconds": time.perf_counter() - started,
            "provenance": made_with(options, retriever.compute.precision, image_db, **more),
        }
        save_json(output / "winoground.json", results)
    print(winoground.table(results))
    LOGGER.info("wrote %s and %s", output / "winoground.json", output / "scores.jsonl")


if __name__ == "__main__":
    main(sys.argv[1:])
