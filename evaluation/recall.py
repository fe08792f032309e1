"""Recall@K in both directions. A negative with the same score as the positive ranks before it, so ties never flatter.

Shapes: T texts, I images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

CUTOFFS = (1, 5, 10)
ROWS_AT_A_TIME = 256
UNRANKED = np.iinfo(np.int64).max  # beyond every cutoff


class Ranks(NamedTuple):
    """The rank from 0 of the best positive of each query: the number of negatives with an equal or higher score.

    ``UNRANKED`` if that positive is not a candidate (-inf); it ties with nothing.

    Attributes:
        txt: (images with texts,), rank among all texts.
        img: (T,), rank among all images.
        ties: negatives with exactly the score of the best positive, summed over queries, by ``"txt"`` and ``"img"``.
    """

    txt: np.ndarray
    img: np.ndarray
    ties: dict[str, int]


def ranks(scores: np.ndarray, image_of: np.ndarray) -> Ranks:
    """Rank the positives in ``scores`` (T, I); ``image_of`` (T,) is the column of each text's image.

    Reads the matrix, which may be memory-mapped, once and in blocks of rows, and allocates nothing of its size.
    """
    texts, images = scores.shape
    own, best = positive_scores(scores, image_of)
    ahead_of_text, equal_to_text = np.zeros(texts, np.int64), 0
    ahead_of_image, equal_to_image = np.zeros(images, np.int64), np.zeros(images, np.int64)
    text_scored, image_scored = own > -np.inf, best > -np.inf
    for first in range(0, texts, ROWS_AT_A_TIME):
        rows = slice(first, first + ROWS_AT_A_TIME)
        block, positive = scores[rows], own[rows, None]
        ahead_of_text[rows] = (block >= positive).sum(axis=1) - 1
        equal_to_text += int(((block == positive).sum(axis=1) - 1)[text_scored[rows]].sum())
        ahead_of_image += (block >= best).sum(axis=0)
        equal_to_image += (block == best).sum(axis=0)
    best_positives = np.bincount(image_of[own == best[image_of]], minlength=images)
    described = np.bincount(image_of, minlength=images) > 0
    ties = {"txt": int((equal_to_image - best_positives)[image_scored].sum()), "img": equal_to_text}
    of_images = np.where(image_scored, ahead_of_image - best_positives, UNRANKED)
    return Ranks(of_images[described], np.where(text_scored, ahead_of_text, UNRANKED), ties)


def positive_scores(scores: np.ndarray, image_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the score of each text with its image, (T,), and each image's best one, (I,), -inf for images without texts."""
    own = scores[np.arange(len(scores)), image_of]
    best = np.full(scores.shape[1], -np.inf, scores.dtype)
    np.maximum.at(best, image_of, own)
    return own, best


def recalls(ranks: Ranks) -> dict[str, float]:
    """Return the nine published numbers as fractions: ``txt_*`` retrieves an image's texts, ``img_*`` a text's image.

    Keys ``txt_r1 txt_r5 txt_r10 txt_r_mean img_r1 img_r5 img_r10 img_r_mean r_mean``.
    """
    return _with_mean(_at_cutoffs("txt", ranks.txt), _at_cutoffs("img", ranks.img))


def as_published(ranks: Ranks) -> dict[str, float]:
    """Return the nine numbers as the published program counts them, up to ties, for comparison (docs/fidelity.md).

    For image retrieval it counts row numbers as ranks, too: each of the first K texts whose image is in its top 10 is another
    hit at K, which adds up to K / T to ``img_rK``.
    """
    hits = np.concatenate([ranks.img, np.flatnonzero(ranks.img < max(CUTOFFS))])
    return _with_mean(_at_cutoffs("txt", ranks.txt), _at_cutoffs("img", hits, len(ranks.img)))


def sampled_recalls(ranks: Ranks) -> dict[str, float]:
    """Return image retrieval alone, for scores of ``sampled_candidates``; ``r_mean`` is its mean."""
    image_retrieval = _at_cutoffs("img", ranks.img)
    return image_retrieval | {"r_mean": image_retrieval["img_r_mean"]}


def table(rows: Mapping[str, Mapping[str, float]], more: Mapping[str, Sequence[str]] = MappingProxyType({})) -> str:
    """Format recalls in percent, one line per name; ``more`` maps the headings of extra columns to their cells."""
    width = max(len(name) for name in rows)
    keys = ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10", "r_mean")
    lines = [f"{'':{width}}{'text retrieval':>21}{'image retrieval':>21}"]
    lines.append(f"{'':{width}}" + "".join(f"{name:>7}" for name in (*("R@1", "R@5", "R@10") * 2, "mean")))
    lines += [f"{name:<{width}}" + "".join(f"{100 * values[key]:7.2f}" for key in keys) for name, values in rows.items()]
    for heading, cells in more.items():
        for line, cell in enumerate((heading, *cells), start=1):
            lines[line] += f"{cell:>{len(heading) + 3}}"
    return "\n".join(lines)


def _at_cutoffs(direction: str, ranks: np.ndarray, queries: int | None = None) -> dict[str, float]:
    values = {f"{direction}_r{cutoff}": int((ranks < cutoff).sum()) / (queries or len(ranks)) for cutoff in CUTOFFS}
    return values | {f"{direction}_r_mean": sum(values.values()) / len(values)}


def _with_mean(text_retrieval: dict[str, float], image_retrieval: dict[str, float]) -> dict[str, float]:
    r_mean = (text_retrieval["txt_r_mean"] + image_retrieval["img_r_mean"]) / 2
    return text_retrieval | image_retrieval | {"r_mean": r_mean}
