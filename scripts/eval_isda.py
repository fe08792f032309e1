#!/usr/bin/env python
"""Measure ISDa: how far attention among the words of annotated objects is from attention among their regions.

python scripts/eval_isda.py --entities DIR --img_db DB --checkpoint FILE --model_config JSON --output_dir DIR [--txt_db DB]

DIR is in the format of Flickr30k Entities, --txt_db restricts it to one split. Without --entities it is ISD, which needs no
annotation, of every text of --txt_db and its image. docs/evaluation.md says what is computed.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from data.image_db import ImageDatabase
from data.picture_names import feature_name, picture_stem, trailing_number
from data.sources.entities import picture_names, read_annotated
from data.split import RetrievalSplit
from data.text_db import TextDatabase
from evaluation.isda import Case, Tally, annotated_cases, measure, measure_isd, summary, table
from evaluation.options import FROM_TRAINING, RetrieverOptions
from evaluation.plots.drawing import save_figure
from evaluation.plots.isda_plot import isda_figure
from evaluation.retriever import Retriever
from utils.errors import InputError, one_line_errors
from utils.files import output_folder, save_json, short_repr
from utils.logging import log_to_screen, progress_bar
from utils.options import option, parse_options, require

LOGGER = logging.getLogger("isda")


@dataclass(frozen=True, kw_only=True)
class IsdaOptions(RetrieverOptions):
    """Options of this program."""

    entities: str | None = option(None, "folder with Sentences/ and Annotations/; without it, ISD is measured")
    txt_db: str | None = option(None, "text database: beside entities, only its images; otherwise its texts")
    img_db: str = option("", "image database")
    output_dir: str = option("", "folder for isda.json and the plot")
    layers: tuple[int | Literal["all"], ...] = option((-1,), "layers to measure in, 0 the first, -1 the last, or: all")
    heads: bool = option(False, "measure each head by itself, too")
    plot: Literal["png", "svg"] = option("png", "format of the plot")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "img_db", "output_dir", "layers")
        if not (self.entities or self.txt_db):
            raise InputError("entities and txt_db are missing, expected one of them or both")


@one_line_errors
def main(argv: Sequence[str]) -> None:
    """Options → model → pairs with their objects → attention → distances, their means and intervals."""
    started = time.perf_counter()
    log_to_screen()
    options = parse_options(IsdaOptions, argv, __doc__ or "", inherit=FROM_TRAINING)
    with ExitStack() as stack:
        retriever = Retriever.from_options(options)
        layers = retriever.config.layer_numbers(options.layers, "layers")
        pairs: AnnotatedPairs | DatabasePairs
        if options.entities:
            image_db = stack.enter_context(
                closing(ImageDatabase(options.img_db, options.box_rule, compressed=options.compressed_db))
            )
            names = names_of_texts(options.txt_db) if options.txt_db else None
            pairs = AnnotatedPairs(Path(options.entities), image_db, names, retriever)
        else:
            source = RetrievalSplit(
                options.txt_db or "",
                options.img_db,
                retriever.config.input_limits,
                options.box_rule,
                compressed=options.compressed_db,
            )
            image_db = stack.enter_context(source).image_db
            pairs = DatabasePairs(source)
        output = stack.enter_context(output_folder(options.output_dir))
        measured = measure(retriever, pairs, layers, options.heads)
        results = summary(measured, layers)
        results["counts"] = {"pairs": len(measured.values), "images": int(measured.image_of.max()) + 1, **pairs.counts()}
        results["seconds"] = time.perf_counter() - started
        results["provenance"] = retriever.provenance(options, image_db)
        save_json(output / "isda.json", results)
        save_figure(isda_figure(results), output / f"isda.{options.plot}")
    print(table(results))
    LOGGER.info("%s", results["counts"])
    LOGGER.info("wrote %s and isda.%s beside it", output / "isda.json", options.plot)


class AnnotatedPairs:
    """The captions of an Entities folder, each with its image, image by image, to be gone through once.

    Args:
        wanted: names of the images to take; None for all that the database has.

    Raises:
        InputError: a file is damaged, two pictures have one name in the database, or no caption has two objects.
    """

    def __init__(self, folder: Path, image_db: ImageDatabase, wanted: Collection[str] | None, retriever: Retriever) -> None:
        self.folder, self.image_db, self.retriever = folder, image_db, retriever
        self.tally = Tally()
        named = {picture: record_names(picture) for picture in picture_names(folder)}
        absent = set(image_db.absent({name for names in named.values() for name in names}))
        self.picture_of: dict[str, str] = {}
        for picture, names in named.items():
            asked = [name for name in names if wanted is None or name in wanted]
            found = next((name for name in asked if name not in absent), None)
            if found is None:
                self.tally.images["not_in_img_db" if asked else "not_in_txt_db"] += 1
            elif (other := self.picture_of.setdefault(found, picture)) != picture:
                raise InputError(
                    f"{folder}: {short_repr(other)} and {short_repr(picture)} would both be image {short_repr(found)}"
                )
        if wanted is not None:
            self.tally.images["no_annotation"] = len(set(wanted).difference(*named.values()))

    def __iter__(self) -> Iterator[Case]:
        for name, picture in progress_bar(True, iterable=self.picture_of.items(), desc="isda", unit="image"):
            annotated = read_annotated(self.folder, picture)
            yield from annotated_cases(picture, annotated, self.image_db[name], self.retriever, self.tally)
        if not self.tally.objects:
            raise InputError(f"{self.folder}: no caption with 2 objects to measure; skipped: {self.tally.skipped()}")

    def counts(self) -> dict[str, Any]:
        """What there was beside pairs and images."""
        tally = self.tally
        return {"objects": tally.objects, "pairs_with_shared_regions": tally.shared, "skipped": tally.skipped()}


class DatabasePairs:
    """The texts of a database, each with its image, image by image."""

    def __init__(self, source: RetrievalSplit) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Case]:
        source = self.source
        ends = np.bincount(source.image_of).cumsum()
        texts_of = np.split(source.image_of.argsort(kind="stable"), ends[:-1])
        images = zip(source.image_names, texts_of, strict=True)
        for name, texts in progress_bar(True, iterable=images, total=len(texts_of), desc="isd", unit="image"):
            image = source.image_db[name]
            for text in texts:
                yield Case(source.text_db[source.text_db.ids[text]], image, measure_isd)

    def counts(self) -> dict[str, Any]:
        """Nothing: every text is measured."""
        return {}


def names_of_texts(txt_db: str) -> set[str]:
    """The images of a text database."""
    with closing(TextDatabase(txt_db)) as text_db:
        return set(text_db.images)


def record_names(picture: str) -> list[str]:
    """What a picture's features may be called: after it, or, where it is a bare number, as published for Flickr30k."""
    stem = picture_stem(picture)
    is_number = stem.isascii() and stem.isdecimal() and trailing_number(stem) is not None
    return [feature_name(dataset, picture) for dataset in (("", "flickr30k") if is_number else ("",))]


if __name__ == "__main__":
    main(sys.argv[1:])
