"""Recall@K in both directions. A negative that ties with the positive counts as ranked before it, so ties never flatter.

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
    """How many negatives score at least as high as the best positive, and how many of all these exactly as high.

    ``UNRANKED`` where that positive was not scored, but has -inf; it ties with nothing.

    Attributes:
        txt: (images that have a text,), among all texts.
        img: (T,), among all images.
        ties: by ``"txt"`` and ``"img"``, over all queries.
    """

    txt: np.ndarray
    img: np.ndarray
    ties: dict[str, int]


def ranks(scores: np.ndarray, image_of: np.ndarray) -> Ranks:
    """The ranks, from 0, in ``scores`` (T, I), where the image of each text is column ``image_of`` (T,).

    Reads the matrix once, some rows at a time, and makes nothing of its size, so that it may lie on disk.
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
    """The score of each text with its image, (T,), and of each image the best with one of its texts, (I,), -inf without any."""
    own = scores[np.arange(len(scores)), image_of]
    best = np.full(scores.shape[1], -np.inf, scores.dtype)
    np.maximum.at(best, image_of, own)
    return own, best


def recalls(found: Ranks) -> dict[str, float]:
    """The nine published numbers, as fractions: ``txt_*`` finds an image's texts, ``img_*`` a text's image.

    Keys ``txt_r1 txt_r5 txt_r10 txt_r_mean img_r1 img_r5 img_r10 img_r_mean r_mean``.
    """
    return _with_mean(_at_cutoffs("txt", found.txt), _at_cutoffs("img", found.img))


def as_published(found: Ranks) -> dict[str, float]:
    """The nine numbers as the published program counts them, up to ties, to compare with the paper (docs/fidelity.md).

    For image retrieval it counts row numbers along with ranks: each of the first K texts whose image is in its top 10 is one
    hit more at K. Over T texts that adds up to K / T to ``img_rK``; text retrieval is not affected.
    """
    rows = np.flatnonzero(found.img < max(CUTOFFS))
    return _with_mean(_at_cutoffs("txt", found.txt), _at_cutoffs("img", found.img, extra_hits=rows))


def sampled_recalls(found: Ranks) -> dict[str, float]:
    """Image retrieval alone, where each text was scored with its own image and some others. ``r_mean`` is its mean."""
    image_retrieval = _at_cutoffs("img", found.img)
    return image_retrieval | {"r_mean": image_retrieval["img_r_mean"]}


def table(rows: Mapping[str, Mapping[str, float]], more: Mapping[str, Sequence[str]] = MappingProxyType({})) -> str:
    """A text table of recalls in percent, one line a name; ``more`` adds columns, each its heading to a cell for each row."""
    width = max(len(name) for name in rows)
    keys = ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10", "r_mean")
    lines = [f"{'':{width}}{'text retrieval':>21}{'image retrieval':>21}"]
    lines.append(f"{'':{width}}" + "".join(f"{name:>7}" for name in (*("R@1", "R@5", "R@10") * 2, "mean")))
    lines += [f"{name:<{width}}" + "".join(f"{100 * values[key]:7.2f}" for key in keys) for name, values in rows.items()]
    for heading, cells in more.items():
        for line, cell in enumerate((heading, *cells), start=1):
            lines[line] += f"{cell:>{len(heading) + 3}}"
    return "\n".join(lines)


def _at_cutoffs(prefix: str, found: np.ndarray, extra_hits: np.ndarray | None = None) -> dict[str, float]:
    hits = found if extra_hits is None else np.concatenate([found, extra_hits])
    values = {f"{prefix}_r{cutoff}": int((hits < cutoff).sum()) / len(found) for cutoff in CUTOFFS}
    return values | {f"{prefix}_r_mean": sum(values.values()) / len(values)}


def _with_mean(text_retrieval: dict[str, float], image_retrieval: dict[str, float]) -> dict[str, float]:
    r_mean = (text_retrieval["txt_r_mean"] + image_retrieval["img_r_mean"]) / 2
    return text_retrieval | image_retrieval | {"r_mean": r_mean}
