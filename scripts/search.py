#!/usr/bin/env python
"""Rank the images of a database for a caption; print raw scores and their sigmoids.

    python scripts/search.py DB "a dog catching a frisbee" --checkpoint FILE --model_config JSON [--top 10]

Takes any number of captions and reads the database once; without captions, reads them from standard input, one per line.
Words after -- are captions even if they begin with a dash.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.startup import one_line_errors
from data.image_db import ImageDatabase
from evaluation.options import FROM_TRAINING, RetrieverOptions
from evaluation.retriever import Ranked, Retriever
from evaluation.tables import fixed
from utils.errors import InputError
from utils.logging import log_to_screen
from utils.options import check_at_least, option, parse_options
from utils.signals import StopSignal


@dataclass(frozen=True, kw_only=True)
class SearchOptions(RetrieverOptions):
    """Options of search.py."""

    top: int = option(10, "number of images per caption")
    json: bool = option(False, "print one JSON object per caption and line, for other programs")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "top")


@one_line_errors
def main(argv: Sequence[str]) -> None:
    """Database and captions → model → the best images of each caption."""
    log_to_screen()
    words, given = split_words(argv)
    options = parse_options(SearchOptions, given, __doc__ or "", inherit=FROM_TRAINING)
    if not words:
        raise InputError("no image database given, expected: search.py DB [CAPTION …] [--OPTION …] [-- CAPTION …]")
    captions = words[1:]
    if not captions:
        lines = sys.stdin.buffer.read().decode("utf-8", "surrogateescape").split("\n")
        captions = [line.strip() for line in lines if line.strip()]
    if not captions:
        raise InputError("standard input has no caption, expected one per line")
    database = ImageDatabase(words[0], options.box_rule, compressed=options.compressed_db)
    with StopSignal(), closing(database) as image_db:
        ranked = Retriever.from_options(options).rank_each(captions, image_db, options.top)
    print("\n".join(map(as_json, captions, ranked)) if options.json else "\n\n".join(map(as_table, captions, ranked)))


def split_words(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate database and captions from options with their values; all words after ``--`` are captions."""
    words, options, rest = [], [], iter(argv)
    with_value = {f"--{field.name}" for field in fields(SearchOptions) if field.type != "bool"} | {"--config"}
    for word in rest:
        if word == "--":
            words += rest
        elif word.startswith("-"):
            options += [word, *islice(rest, word in with_value)]
        else:
            words.append(word)
    return words, options


def as_table(caption: str, ranked: Sequence[Ranked]) -> str:
    """Format a caption, and below it one line per image: rank, name, score and its sigmoid."""
    width = max(len(image.name) for image in ranked)
    rows = (
        f"{rank:4}  {it.name:{width}}  {fixed(it.score, 4):>9}  {fixed(it.sigmoid, 4)}" for rank, it in enumerate(ranked, 1)
    )
    return "\n".join([caption, *rows])


def as_json(caption: str, ranked: Sequence[Ranked]) -> str:
    """Format the same as one line of JSON."""
    images = [{"name": image.name, "score": image.score, "sigmoid": image.sigmoid} for image in ranked]
    return json.dumps({"text": caption, "images": images})


if __name__ == "__main__":
    main(sys.argv[1:])
