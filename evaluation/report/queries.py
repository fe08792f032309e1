"""The hardest queries: what each run answered to them, their captions, and the attention of the pairs.

Shapes: L words, K regions, C candidates. Texts and images are indices into the text database's ``ids`` and ``images``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import closing
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from data.image_db import ImageDatabase
from data.text_db import Text, TextDatabase
from data.tokenizer import WordPieceTokenizer, load_tokenizer
from evaluation.recall import UNRANKED
from evaluation.report.runs import DIRECTIONS, Direction, Run, read_scores
from evaluation.retriever import Retriever
from utils.errors import InputError
from utils.files import sha256
from utils.logging import progress_bar

TOP = 5
Pair = tuple[int, int]  # text, image


class Answer(NamedTuple):
    """A candidate, its rank from 1, its score, and whether it is a positive."""

    candidate: int
    rank: int
    score: float
    right: bool


class HardQuery(NamedTuple):
    """A query; per run, the rank from 1 of its best positive, None if that was not scored; per run, the best answers."""

    query: int
    ranks: list[int | None]
    answers: list[list[Answer]]

    def pairs(self, direction: Direction, run: int) -> list[Pair]:
        """The (text, image) pairs of the answers of a run."""
        query, candidates = self.query, [answer.candidate for answer in self.answers[run]]
        return [(query, image) for image in candidates] if direction == "img" else [(text, query) for text in candidates]


def hardest_queries(runs: Sequence[Run], image_of: np.ndarray, count: int) -> dict[Direction, list[HardQuery]]:
    """Return, by direction, the ``count`` queries whose positives have the worst mean rank over the runs, worst first.

    A positive that was not scored ranks behind all candidates.
    """
    candidates = {"img": int(image_of.max()) + 1, "txt": len(image_of)}
    queries: dict[Direction, list[HardQuery]] = {}
    for direction in DIRECTIONS:
        mean = np.mean([np.minimum(run.ranks[direction], candidates[direction]) for run in runs], axis=0)
        queries[direction] = [HardQuery(query, [], []) for query in np.argsort(-mean, kind="stable")[:count].tolist()]
    for run in runs:
        scores, _ = read_scores(run.folder)
        for direction in DIRECTIONS:
            for query, ranks, answers in queries[direction]:
                rank = int(run.ranks[direction][query])
                ranks.append(None if rank == UNRANKED else rank + 1)
                own = np.arange(scores.shape[1]) == image_of[query] if direction == "img" else image_of == query
                answers.append(best_answers(scores[query] if direction == "img" else scores[:, query], own))
    return queries


def best_answers(scores: np.ndarray, positives: np.ndarray) -> list[Answer]:
    """Return the ``TOP`` best of the candidates (C,), followed by the best positive if it is not among them.

    Positives come last among equal scores, as ``evaluation.recall`` counts them. Candidates that were not scored are left out.
    """
    order = np.lexsort((positives, -scores))[: int((scores > -np.inf).sum())]
    chosen = {*range(min(TOP, len(order))), *np.flatnonzero(positives[order])[:1].tolist()}
    return [Answer(int(order[i]), i + 1, float(scores[order[i]]), bool(positives[order[i]])) for i in sorted(chosen)]


class Captions:
    """Captions by the index of their text: the ``raw`` or ``sentence`` of the record, or else its word pieces or their ids."""

    def __init__(self, text_db: TextDatabase) -> None:
        self._text_db = text_db
        self._first_of = np.unique(text_db.image_of, return_index=True)[1]  # (I,), the first text of each image

    @cached_property
    def _tokenizer(self) -> WordPieceTokenizer | None:
        try:
            tokenizer = load_tokenizer()
        except InputError:  # the package with the vocabulary is not installed
            return None
        return tokenizer if len(tokenizer.pieces) == self._text_db.vocab_size else None

    def __getitem__(self, index: int) -> str:
        return self.of(self._text_db[self._text_db.ids[index]])

    def of_image(self, index: int) -> str:
        return self[self._first_of[index]]  # the first of its captions

    def of(self, text: Text) -> str:
        ids = text.input_ids.tolist()
        return displayable(text.caption or (self._tokenizer.decode(ids) if self._tokenizer else " ".join(map(str, ids))))


def displayable(text: str) -> str:
    """Return ``text`` with a question mark for each half of a surrogate pair, which UTF-8 cannot encode."""
    return text.encode(errors="replace").decode()


def word_attention(run: Run, pairs: Collection[Pair], text_db: TextDatabase) -> tuple[dict[Pair, dict[str, Any]], str]:
    """Compute A_LV of the last layer, averaged over heads, for ``pairs``. If that fails, return no attention and the reason.

    ``words`` are L word pieces; ``boxes`` K corners x1, y1, x2, y2 in thousandths of the picture; ``weights`` L rows of K in
    ten-thousandths.
    """
    options = run.provenance.options
    try:
        if sha256(options.checkpoint) != run.provenance.checkpoint_sha256:
            return {}, f"{options.checkpoint} has changed since"
        retriever = Retriever.from_checkpoint(options.checkpoint, options.architecture)
        retriever.check_vocabulary(text_db)
        maps, last = {}, [retriever.config.num_hidden_layers - 1]
        with closing(ImageDatabase(options.img_db, options.box_rule, compressed=options.compressed_db)) as image_db:
            for text, image in progress_bar(True, iterable=sorted(pairs), desc=f"attention, {run.name}", unit="pair"):
                attention = retriever.attention(text_db[text_db.ids[text]], image_db[text_db.images[image]], layers=last)
                maps[text, image] = {
                    "words": [displayable(piece) for piece in attention.pieces],
                    "boxes": (1000 * attention.image.boxes[:, :4]).round().astype(int).tolist(),
                    "weights": (10_000 * attention.blocks().LV.exp()).round().int().tolist(),
                }
    except InputError as error:
        return {}, str(error)
    return maps, ""
