"""Which regions the words of a pair attend to, by the checkpoint that a run was evaluated with.

Shapes: L words, K regions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import closing
from typing import NamedTuple

from data.image_db import ImageDatabase
from data.text_db import TextDatabase
from evaluation.report.captions import displayable
from evaluation.report.runs import Run
from evaluation.retriever import Retriever
from utils.errors import InputError
from utils.files import sha256
from utils.logging import progress_bar

Pair = tuple[int, int]  # places of a text and of an image


class WordAttention(NamedTuple):
    """A_LV of the last layer, the mean of its heads.

    Attributes:
        words: L word pieces.
        boxes: K corners x1, y1, x2, y2, in thousandths of the picture.
        weights: L rows of K, in ten-thousandths; the sum of each is 10,000 but for rounding.
    """

    words: list[str]
    boxes: list[list[int]]
    weights: list[list[int]]


def word_attention(run: Run, text_db: TextDatabase, pairs: Collection[Pair]) -> tuple[Mapping[Pair, WordAttention], str]:
    """The attention of ``pairs``, or none; and in the latter case, why."""
    options = run.provenance.options
    try:
        if sha256(options.checkpoint) != run.provenance.checkpoint_sha256:
            return {}, f"{options.checkpoint} has changed since"
    except OSError as error:
        return {}, f"{options.checkpoint} cannot be read ({error.strerror})"
    try:
        retriever = Retriever.from_checkpoint(options.checkpoint, options.architecture)
        if len(retriever.tokenizer.pieces) != text_db.vocab_size:
            return {}, f"{text_db.path} has another vocabulary than {retriever.tokenizer.name}"
        with closing(ImageDatabase(options.img_db, options.box_rule, compressed=options.compressed_db)) as image_db:
            found, last = {}, [retriever.config.num_hidden_layers - 1]
            for text, image in progress_bar(True, iterable=sorted(pairs), desc=f"attention, {run.name}", unit="pair"):
                shown = retriever.attention(text_db[text_db.ids[text]], image_db[text_db.images[image]], layers=last)
                found[text, image] = WordAttention(
                    [displayable(piece) for piece in shown.pieces],
                    (1000 * shown.image.boxes[:, :4]).round().astype(int).tolist(),
                    (10_000 * shown.blocks().LV.exp()).round().int().tolist(),
                )
            return found, ""
    except InputError as error:
        return {}, str(error)
