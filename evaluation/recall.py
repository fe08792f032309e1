"""Recall@K in both directions. A negative that ties with the positive counts as ranked before it, so ties never flatter.

Shapes: T texts, I images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

CUTOFFS = (1, 5, 10)


def own_pairs(text_ids: Sequence[str], image_names: Sequence[str], image_of: Mapping[str, str]) -> np.ndarray:
    """(T, I) booleans: whether the text belongs to the image."""
    column_of = {name: column for column, name in enumerate(image_names)}
    own = np.zeros((len(text_ids), len(image_names)), bool)
    own[np.arange(len(text_ids)), [column_of[image_of[text_id]] for text_id in text_ids]] = True
    return own


def ranks(scores: np.ndarray, own: np.ndarray) -> np.ndarray:
    """For each row that has a positive the rank, from 0, of its best positive: how many negatives score at least as high.

    ``scores`` (rows, columns) float, ``own`` (rows, columns) bool → (rows with a positive,).
    """
    scores, own = scores[own.any(axis=1)], own[own.any(axis=1)]
    best = np.where(own, scores, -np.inf).max(axis=1, keepdims=True)
    return ((scores >= best) & ~own).sum(axis=1)


def recalls(scores: np.ndarray, own: np.ndarray) -> dict[str, float]:
    """The nine published numbers, as fractions: ``txt_*`` finds an image's texts, ``img_*`` a text's image.

    Keys ``txt_r1 txt_r5 txt_r10 txt_r_mean img_r1 img_r5 img_r10 img_r_mean r_mean``.
    """
    text_retrieval = _at_cutoffs("txt", ranks(scores.T, own.T))
    return _with_mean(text_retrieval, _at_cutoffs("img", ranks(scores, own)))


def as_published(scores: np.ndarray, own: np.ndarray) -> dict[str, float]:
    """The nine numbers as the published program counts them, up to ties, to compare with the paper (docs/fidelity.md).

    For image retrieval it counts row numbers along with ranks: each of the first K texts whose image is in its top 10 is one
    hit more at K. Over T texts that adds up to K / T to ``img_rK``; text retrieval is not affected.
    """
    text_retrieval = _at_cutoffs("txt", ranks(scores.T, own.T))
    found = ranks(scores, own)
    rows = np.flatnonzero(found < max(CUTOFFS))
    return _with_mean(text_retrieval, _at_cutoffs("img", found, extra_hits=rows))


def sampled_recalls(scores: np.ndarray, own: np.ndarray) -> dict[str, float]:
    """Image retrieval alone, for a matrix in which only some candidates of each text are scored; ``r_mean`` is its mean."""
    image_retrieval = _at_cutoffs("img", ranks(scores, own))
    return image_retrieval | {"r_mean": image_retrieval["img_r_mean"]}


def ties(scores: np.ndarray, own: np.ndarray) -> int:
    """How many negatives have exactly the score of a positive in their row."""
    return sum(int(((row == row[mine].max()) & ~mine).sum()) for row, mine in zip(scores, own, strict=True) if mine.any())


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
