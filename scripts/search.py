#!/usr/bin/env python
"""Show which images of a database fit a caption best, by their raw scores and the sigmoids of these.

    python scripts/search.py DB "a dog catching a frisbee" --checkpoint FILE --model_config JSON [--top 10]

There may be several captions, and the database is read once for them all. Without any, they are read from standard input,
one a line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.image_db import ImageDatabase
from evaluation.options import FROM_TRAINING, RetrieverOptions
from evaluation.retriever import Ranked, Retriever
from utils.errors import InputError, one_line_errors
from utils.logging import log_to_screen
from utils.options import check_at_least, option, parse_options


@dataclass(frozen=True, kw_only=True)
class SearchOptions(RetrieverOptions):
    """Options of this program."""

    top: int = option(10, "how many images to show for a caption")
    json: bool = option(False, "print a JSON object a caption and line, for other programs to read")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "top")


@one_line_errors
def main(argv: Sequence[str]) -> None:
    """Database and captions → model → the best images of each caption."""
    log_to_screen()
    words = list(takewhile(lambda word: not word.startswith("-"), argv))
    options = parse_options(SearchOptions, argv[len(words) :], __doc__ or "", inherit=FROM_TRAINING)
    if not words:
        raise InputError("no image database is given, expected: search.py DB CAPTION …, and options behind them")
    captions = words[1:] or _lines(sys.stdin.buffer.read())
    if not captions:
        raise InputError("standard input has no caption, expected one a line")
    with closing(ImageDatabase(words[0], options.box_rule, compressed=options.compressed_db)) as image_db:
        retriever = Retriever.from_options(options)
        found = retriever.rank_each(captions, image_db, options.top)
    print("\n".join(map(as_json, captions, found)) if options.json else "\n\n".join(map(as_table, captions, found)))


def as_table(caption: str, found: Sequence[Ranked]) -> str:
    """A caption, and below it a line an image: place, name, score and its sigmoid."""
    width = max(len(image.name) for image in found)
    rows = (f"{place:4}  {name:{width}}  {score:9.4f}  {sigmoid:.4f}" for place, name, score, sigmoid in _rows(found))
    return "\n".join([caption, *rows])


def as_json(caption: str, found: Sequence[Ranked]) -> str:
    """The same as one line of JSON."""
    images = [{"name": name, "score": score, "sigmoid": sigmoid} for _, name, score, sigmoid in _rows(found)]
    return json.dumps({"text": caption, "images": images})


def _lines(data: bytes) -> list[str]:
    return [line.strip() for line in data.decode("utf-8", "surrogateescape").split("\n") if line.strip()]


def _rows(found: Sequence[Ranked]) -> list[tuple[int, str, float, float]]:
    return [(place, image.name, image.score, image.sigmoid) for place, image in enumerate(found, start=1)]


if __name__ == "__main__":
    main(sys.argv[1:])
