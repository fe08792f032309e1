"""What recall@K leaves out: median and reciprocal ranks, intervals, and for which captions and images retrieval works.

Shapes: T texts, I images, Q queries of one direction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from evaluation.bootstrap import Bootstrap, interval
from evaluation.recall import CUTOFFS, UNRANKED, Ranks

# Where bins begin, the last without an end. The same for every database, so that splits and models can be compared.
WORD_PIECES = (1, 6, 11, 16, 21, 26, 31)
REGIONS = (1, 11, 21, 31, 41, 61, 81)
QUERIES = {"txt": "images", "img": "texts"}  # what is asked with in each direction


class _Queries(NamedTuple):
    """The queries of one direction: ranks (Q,), and the cluster (Q,) of each, its image counted among the described ones."""

    way: Literal["txt", "img"]
    ranks: np.ndarray
    cluster_of: np.ndarray

    def chosen(self, rows: np.ndarray) -> _Queries:
        return self._replace(ranks=self.ranks[rows], cluster_of=self.cluster_of[rows])

    def from_1(self) -> np.ndarray:
        """(Q,) float64, infinite where there is no rank."""
        return np.where(self.ranks == UNRANKED, np.inf, self.ranks + 1.0)

    def hits(self) -> dict[str, np.ndarray]:
        """(Q,) bool for each cutoff."""
        return {f"{self.way}_r{cutoff}": self.ranks < cutoff for cutoff in CUTOFFS}

    def mean_hits(self) -> np.ndarray:
        """(Q,), of which the mean is the direction's R-mean."""
        return np.mean(list(self.hits().values()), axis=0)


def analyse(found: Ranks, image_of: np.ndarray, text_lengths: np.ndarray, regions: np.ndarray) -> dict[str, Any]:
    """The numbers of ``scores.json["analysis"]``, in JSON's types; docs/evaluation.md says what each is.

    Intervals resample images, each with all its captions. The same arguments give the same numbers.

    Args:
        found: ``evaluation.recall.ranks`` of the scores.
        image_of: (T,), as it was given there.
        text_lengths: (T,), word pieces.
        regions: (I,).
    """
    described, cluster_of = np.unique(image_of, return_inverse=True)  # the images that found.txt has ranks of
    ways = _Queries("txt", found.txt, np.arange(len(described))), _Queries("img", found.img, cluster_of)
    bootstrap = Bootstrap(len(described))
    values: dict[str, Any] = {}
    intervals: dict[str, Sequence[float | None] | None] = {}
    for queries in ways:
        way, images, from_1 = queries.way, queries.cluster_of, queries.from_1()
        values[f"{way}_median_rank"] = _finite(float(np.median(from_1)))
        values[f"{way}_mean_reciprocal_rank"] = float((1 / from_1).mean())
        intervals |= {name: bootstrap.mean(hits, images) for name, hits in queries.hits().items()}
        intervals[f"{way}_r_mean"] = bootstrap.mean(queries.mean_hits(), images)
        medians = bootstrap.median(from_1, images)
        intervals[f"{way}_median_rank"] = medians and [_finite(bound) for bound in medians]
        intervals[f"{way}_mean_reciprocal_rank"] = bootstrap.mean(1 / from_1, images)
    both = np.mean([bootstrap.means(queries.mean_hits(), queries.cluster_of) for queries in ways], axis=0)
    intervals["r_mean"] = interval(both) if len(described) > 1 else None
    text_retrieval, image_retrieval = ways
    return {
        **values,
        "unranked": {queries.way: int((queries.ranks == UNRANKED).sum()) for queries in ways},
        "interval_95": intervals,
        "by_word_pieces": _binned(WORD_PIECES, [(image_retrieval, text_lengths)], bootstrap),
        "by_regions": _binned(REGIONS, [(text_retrieval, regions[described]), (image_retrieval, regions[image_of])], bootstrap),
    }


def summary_table(analysed: Mapping[str, Any]) -> str:
    """Intervals of ``analyse``, recalls in percent, and R@1 in its bins; seven lines."""
    columns = {
        "r1": "R@1",
        "r5": "R@5",
        "r10": "R@10",
        "r_mean": "mean",
        "median_rank": "median rank",
        "mean_reciprocal_rank": "MRR",
    }
    intervals = analysed["interval_95"]
    lines = [f"{'95 % interval':16}" + "".join(f"{title:>15}" for title in columns.values())]
    for way, title in (("txt", "text retrieval"), ("img", "image retrieval")):
        lines.append(f"{title:16}" + "".join(f"{_range(name, intervals[f'{way}_{name}']):>15}" for name in columns))
    lines.append(f"{'both':16}{_range('r_mean', intervals['r_mean']):>60}")
    for title, key, name in (
        ("image R@1 by word pieces", "by_word_pieces", "img_r1"),
        ("text R@1 by regions", "by_regions", "txt_r1"),
        ("image R@1 by regions", "by_regions", "img_r1"),
    ):
        cells = (f"{part['from']}–{part['to'] or ''}: {100 * part[name]:.2f}" for part in analysed[key])
        lines.append(f"{title}  {'  '.join(cells)}")
    return "\n".join(lines)


def _binned(starts: Sequence[int], parts: Sequence[tuple[_Queries, np.ndarray]], bootstrap: Bootstrap) -> list[dict[str, Any]]:
    """Recalls with their intervals in every bin that has queries; each part is queries and a number (Q,) for each of them."""
    bins = []
    for first, after in pairwise([*starts, np.inf]):
        entry: dict[str, Any] = {"from": first, "to": None if after == np.inf else int(after) - 1}
        intervals: dict[str, Sequence[float | None] | None] = {}
        for queries, numbers in parts:
            of_bin = queries.chosen((numbers >= first) & (numbers < after))
            entry[QUERIES[queries.way]] = len(of_bin.ranks)
            if len(of_bin.ranks):
                entry |= {name: float(hits.mean()) for name, hits in of_bin.hits().items()}
                intervals |= {name: bootstrap.mean(hits, of_bin.cluster_of) for name, hits in of_bin.hits().items()}
        if intervals:
            bins.append(entry | {"interval_95": intervals})
    return bins


def _finite(rank: float) -> float | None:
    return rank if np.isfinite(rank) else None


def _range(name: str, bounds: Sequence[float | None] | None) -> str:
    """How a table shows the interval of this number."""
    if bounds is None:
        return "–"
    if name == "median_rank":
        return " – ".join("∞" if bound is None else f"{bound:g}" for bound in bounds)
    scale, digits = (1, 3) if name == "mean_reciprocal_rank" else (100, 2)
    return " – ".join("" if bound is None else f"{scale * bound:.{digits}f}" for bound in bounds)
