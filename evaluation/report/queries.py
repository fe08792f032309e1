"""The hardest queries, and what each run answered to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from evaluation.recall import UNRANKED
from evaluation.report.runs import Run, Way, read_matrix

TOP = 5
WAYS: tuple[Way, ...] = ("img", "txt")


class Answer(NamedTuple):
    """A candidate (its place among the texts or images), its rank from 1, its score, and whether it is a positive."""

    place: int
    rank: int
    score: float
    right: bool


class HardQuery(NamedTuple):
    """A query (its place), by run the rank from 1 of its best positive if that was scored, and by run the best answers."""

    place: int
    ranks: list[int | None]
    answers: list[list[Answer]]


def hardest_queries(runs: Sequence[Run], image_of: np.ndarray, count: int) -> dict[Way, list[HardQuery]]:
    """By way, the ``count`` queries whose positives rank lowest on the mean of the runs, lowest first.

    A positive that was not scored counts as behind everything.
    """
    candidates = {"img": int(image_of.max()) + 1, "txt": len(image_of)}
    ranks = {way: [np.minimum(run.ranks[way], candidates[way]) for run in runs] for way in WAYS}
    places = {way: hardest(np.mean(ranks[way], axis=0), count) for way in WAYS}
    answers: dict[Way, list[list[list[Answer]]]] = {"img": [], "txt": []}  # way, run, query
    for run in runs:
        scores = read_matrix(run)
        images = np.arange(scores.shape[1])
        answers["img"].append([best_answers(scores[place], images == image_of[place]) for place in places["img"]])
        answers["txt"].append([best_answers(scores[:, place], image_of == place) for place in places["txt"]])
    return {
        way: [
            HardQuery(place, [rank_from_1(run.ranks[way][place]) for run in runs], of_runs)
            for place, *of_runs in zip(places[way], *answers[way], strict=True)
        ]
        for way in WAYS
    }


def rank_from_1(rank: int) -> int | None:
    """A rank as people count, None if there is none."""
    return None if rank == UNRANKED else int(rank) + 1


def hardest(mean_ranks: np.ndarray, count: int) -> list[int]:
    """Places of the largest, equal ones in their order."""
    places: list[int] = np.argsort(-mean_ranks, kind="stable")[:count].tolist()
    return places


def best_answers(scores: np.ndarray, positives: np.ndarray) -> list[Answer]:
    """The ``TOP`` best of the candidates (C,), and after them the best positive if it is not among these.

    Of equal scores, positives come last, as ``evaluation.recall`` counts them. What was not scored is left out.
    """
    order = np.lexsort((positives, -scores))[: int((scores > -np.inf).sum())]
    wanted = {*range(min(TOP, len(order))), *np.flatnonzero(positives[order])[:1].tolist()}
    return [
        Answer(int(order[place]), place + 1, float(scores[order[place]]), bool(positives[order[place]]))
        for place in sorted(wanted)
    ]
