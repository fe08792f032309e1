#!/usr/bin/env python
"""Measure ISDa: the distance between attention among the words of annotated objects and among their regions.

python scripts/eval_isda.py --entities DIR --img_db DB --checkpoint FILE --model_config JSON --output_dir DIR [--txt_db DB]

DIR has the format of Flickr30k Entities; --txt_db restricts it to one split. Without --entities, measure ISD, which needs no
annotation, for each text of --txt_db and its image. See docs/evaluation.md.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.startup import one_line_errors
from data.image_db import ImageDatabase
from data.split import RetrievalSplit
from data.text_db import TextDatabase
from evaluation.alignment import check_regularisers
from evaluation.isda import annotated_pairs, matched_pairs, measure, table
from evaluation.options import FROM_TRAINING, RetrieverOptions
from evaluation.plots.curves import isda_figure
from evaluation.plots.style import save_figure
from evaluation.results import made_with
from evaluation.retriever import Retriever
from utils.errors import InputError
from utils.files import exclusive_folder, save_json, sha256
from utils.logging import log_to_screen
from utils.options import option, parse_options, require
from utils.signals import StopSignal

LOGGER = logging.getLogger("isda")


@dataclass(frozen=True, kw_only=True)
class IsdaOptions(RetrieverOptions):
    """Options of eval_isda.py."""

    entities: str | None = option(None, "folder with Sentences/ and Annotations/; if not given, measure ISD")
    txt_db: str | None = option(None, "text database: restricts entities to its images; without entities, the texts to measure")
    img_db: str = option("", "image database")
    output_dir: str = option("", "output folder for isda.json and the plot")
    layers: tuple[int | Literal["all"], ...] = option((-1,), "layers to measure: 0 is the first, -1 the last; or: all")
    heads: bool = option(False, "measure each head, too")
    plot: Literal["png", "svg"] = option("png", "format of the plot")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "img_db", "output_dir", "layers")
        if not (self.entities or self.txt_db):
            raise InputError("entities and txt_db are missing, expected at least one of them")


@one_line_errors
def main(argv: Sequence[str]) -> None:
    """Options → model → pairs → attention → distances, their means and intervals."""
    started = time.perf_counter()
    log_to_screen()
    options = parse_options(IsdaOptions, argv, __doc__ or "", inherit=FROM_TRAINING)
    with ExitStack() as stack:
        stack.enter_context(StopSignal())
        retriever = Retriever.from_options(options)
        checksum = sha256(options.checkpoint)
        config, counts = retriever.config, {}
        layers = config.layer_numbers(options.layers, "layers")
        compressed = options.compressed_db
        if options.entities:
            image_db = ImageDatabase(options.img_db, options.box_rule, compressed=compressed)
            stack.enter_context(closing(image_db))
            wanted = set(TextDatabase(options.txt_db).images) if options.txt_db else None
            pairs = annotated_pairs(Path(options.entities), image_db, wanted, retriever, counts)
        else:
            split = RetrievalSplit(options.txt_db, options.img_db, config.input_limits, options.box_rule, compressed=compressed)
            image_db, pairs = stack.enter_context(split).image_db, matched_pairs(split)
            retriever.check_vocabulary(split.text_db)
            check_regularisers(config.num_attention_heads)
        output = stack.enter_context(exclusive_folder(options.output_dir, "isda.json"))
        results = measure(retriever, pairs, layers, options.heads)
        results["counts"] |= counts
        results["seconds"] = time.perf_counter() - started
        more = {"checkpoint_sha256": checksum, "vocabulary": retriever.tokenizer.name}
        results["provenance"] = made_with(options, retriever.compute.precision, image_db, **more)
        save_figure(isda_figure(results), output / f"isda.{options.plot}")
        save_json(output / "isda.json", results)  # last: with it, the evaluation is finished
    print(table(results))
    LOGGER.info("%s", results["counts"])
    LOGGER.info("wrote %s and isda.%s beside it", output / "isda.json", options.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
