"""Error analysis beyond recall@K: median and reciprocal ranks, bootstrap intervals, and recalls by caption length and regions.

Shapes: T texts, I images, Q queries of one direction; N observations, C clusters, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from evaluation.recall import CUTOFFS, UNRANKED, Ranks
from evaluation.tables import aligned

RESAMPLES = 1000
LEVEL = 0.95
# Lower bounds of the bins, the last one open. The same for every database, so that splits and models can be compared.
WORD_PIECES = (1, 6, 11, 16, 21, 26, 31)
REGIONS = (1, 11, 21, 31, 41, 61, 81)
Interval = Sequence[float | None] | None


class Bootstrap:
    """``RESAMPLES`` resamples of C clusters with replacement; the same for every statistic and every call.

    The percentile bootstrap of Efron and Tibshirani (1993, chapter 13) over clusters, such as the captions of an image, because
    observations within a cluster are not independent. scipy's resamples observations only.

    Attributes:
        times: (R, C) float64, how often each resample has each cluster.
    """

    def __init__(self, clusters: int, resamples: int = RESAMPLES, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.times = np.empty((resamples, clusters))
        for row in self.times:
            row[:] = np.bincount(rng.integers(clusters, size=clusters), minlength=clusters)

    def means(self, values: np.ndarray, cluster_of: np.ndarray) -> np.ndarray:
        """Return the mean of ``values`` (N,) in each resample, (R,); ``cluster_of`` (N,) is the cluster of each observation.

        NaN for resamples without observations.
        """
        clusters = self.times.shape[1]
        sums = self.times @ np.bincount(cluster_of, values, clusters)
        sizes = self.times @ np.bincount(cluster_of, minlength=clusters).astype(float)
        return np.divide(sums, sizes, out=np.full(len(sizes), np.nan), where=sizes > 0)

    def medians(self, values: np.ndarray, cluster_of: np.ndarray) -> np.ndarray:
        """Return the medians; see ``means``."""
        order = np.argsort(values, kind="stable")
        ordered, cluster_of = np.append(values[order], np.nan), cluster_of[order]
        medians = np.empty(len(self.times))
        for resample, times in enumerate(self.times):
            reached = times[cluster_of].cumsum()  # (N,) number of observations up to each value
            middle = [(reached[-1] - 1) // 2, reached[-1] // 2]
            medians[resample] = ordered[np.searchsorted(reached, middle, side="right")].mean()
        return medians

    def interval(self, values: np.ndarray, cluster_of: np.ndarray, median: bool = False) -> list[float] | None:
        """Return the 95 % interval [low, high] of the mean or median; None if fewer than two clusters have observations."""
        statistic = self.medians if median else self.means
        return interval(statistic(values, cluster_of)) if len(np.unique(cluster_of)) > 1 else None

    def estimates(self, columns: Mapping[str, np.ndarray], cluster_of: np.ndarray) -> dict[str, Any]:
        """Return the mean of each column (N,) without its NaN, None if it has no values, and ``interval_95`` by column."""
        means: dict[str, float | None] = {}
        intervals: dict[str, list[float] | None] = {}
        for name, column in columns.items():
            known = ~np.isnan(column)
            means[name] = float(column[known].mean()) if known.any() else None
            intervals[name] = self.interval(column[known], cluster_of[known])
        return {**means, "interval_95": intervals}


def interval(estimates: np.ndarray) -> list[float]:
    """Return the 95 % interval [low, high] of a statistic from its values (R,) in the resamples, ignoring NaN."""
    ordered = np.sort(estimates[~np.isnan(estimates)])
    outside = int((1 - LEVEL) / 2 * len(ordered))
    return [float(ordered[outside]), float(ordered[-1 - outside])]


class _Queries(NamedTuple):
    """The queries of one direction: ranks (Q,) from 0, and cluster (Q,), the index of the image among those with texts."""

    direction: Literal["txt", "img"]
    ranks: np.ndarray
    cluster_of: np.ndarray

    def hits(self) -> dict[str, np.ndarray]:
        """Return whether each query (Q,) is a hit, by the name of the recall."""
        return {f"{self.direction}_r{cutoff}": self.ranks < cutoff for cutoff in CUTOFFS}

    def mean_hits(self) -> np.ndarray:
        """Return (Q,) values whose mean is the R-mean of this direction."""
        return np.mean(list(self.hits().values()), axis=0)


def analyse(ranks: Ranks, image_of: np.ndarray, text_lengths: np.ndarray, regions: np.ndarray) -> dict[str, Any]:
    """Return ``scores.json["analysis"]``, JSON-serialisable and deterministic; docs/evaluation.md describes it.

    Intervals resample images, each with all its captions.

    Args:
        image_of: (T,) image of each text, as passed to ``evaluation.recall.ranks``.
        text_lengths: (T,) word pieces per text.
        regions: (I,) regions per image.
    """
    described, cluster_of = np.unique(image_of, return_inverse=True)  # images with texts: the queries of ranks.txt
    text_retrieval = _Queries("txt", ranks.txt, np.arange(len(described)))
    image_retrieval = _Queries("img", ranks.img, cluster_of)
    both = text_retrieval, image_retrieval
    bootstrap = Bootstrap(len(described))
    values: dict[str, Any] = {}
    intervals: dict[str, Interval] = {}
    for queries in both:
        direction, images = queries.direction, queries.cluster_of
        from_1 = np.where(queries.ranks == UNRANKED, np.inf, queries.ranks + 1.0)
        values[f"{direction}_median_rank"] = _finite(float(np.median(from_1)))
        values[f"{direction}_mean_reciprocal_rank"] = float((1 / from_1).mean())
        for name, hits in (queries.hits() | {f"{direction}_r_mean": queries.mean_hits()}).items():
            intervals[name] = bootstrap.interval(hits, images)
        medians = bootstrap.interval(from_1, images, median=True)
        intervals[f"{direction}_median_rank"] = medians and [_finite(bound) for bound in medians]
        intervals[f"{direction}_mean_reciprocal_rank"] = bootstrap.interval(1 / from_1, images)
    means = np.mean([bootstrap.means(queries.mean_hits(), queries.cluster_of) for queries in both], axis=0)
    intervals["r_mean"] = interval(means) if len(described) > 1 else None
    of_queries = [(text_retrieval, regions[described]), (image_retrieval, regions[image_of])]
    return {
        **values,
        "unranked": {queries.direction: int((queries.ranks == UNRANKED).sum()) for queries in both},
        "interval_95": intervals,
        "by_word_pieces": _binned(WORD_PIECES, [(image_retrieval, text_lengths)], bootstrap),
        "by_regions": _binned(REGIONS, of_queries, bootstrap),
    }


def _binned(bounds: Sequence[int], parts: Sequence[tuple[_Queries, np.ndarray]], bootstrap: Bootstrap) -> list[dict[str, Any]]:
    """Return recalls and intervals for each bin that has queries; each part is queries and a number (Q,) to bin them by."""
    bins = []
    for first, after in pairwise([*bounds, np.inf]):
        entry: dict[str, Any] = {"from": first, "to": None if after == np.inf else int(after) - 1}
        intervals: dict[str, Interval] = {}
        for queries, numbers in parts:
            rows = (numbers >= first) & (numbers < after)
            of_bin = queries._replace(ranks=queries.ranks[rows], cluster_of=queries.cluster_of[rows])
            entry[{"txt": "images", "img": "texts"}[queries.direction]] = len(of_bin.ranks)
            if len(of_bin.ranks):
                entry |= bootstrap.estimates(of_bin.hits(), of_bin.cluster_of)
                intervals |= entry.pop("interval_95")
        if intervals:
            bins.append(entry | {"interval_95": intervals})
    return bins


def _finite(rank: float) -> float | None:
    return rank if np.isfinite(rank) else None


def summary_table(analysis: Mapping[str, Any]) -> str:
    """Format the intervals of ``analyse``, recalls in percent, and R@1 by bin as seven lines of text."""
    columns = {"r1": "R@1", "r5": "R@5", "r10": "R@10", "r_mean": "mean", "median_rank": "median rank"}
    columns["mean_reciprocal_rank"] = "MRR"
    intervals = analysis["interval_95"]
    rows = [["95 % interval", *columns.values()]]
    for direction, title in (("txt", "text retrieval"), ("img", "image retrieval")):
        rows.append([title, *(_range(name, intervals[f"{direction}_{name}"]) for name in columns)])
    rows.append(["both", *(_range(name, intervals[name]) if name == "r_mean" else "" for name in columns)])
    lines = [aligned(rows)]
    for title, key, name in (
        ("image R@1 by word pieces", "by_word_pieces", "img_r1"),
        ("text R@1 by regions", "by_regions", "txt_r1"),
        ("image R@1 by regions", "by_regions", "img_r1"),
    ):
        cells = (f"{part['from']}–{part['to'] or ''}: {100 * part[name]:.2f}" for part in analysis[key])
        lines.append(f"{title}  {'  '.join(cells)}")
    return "\n".join(lines)


def _range(name: str, bounds: Interval) -> str:
    if bounds is None:
        return "–"
    if name == "median_rank":
        return " – ".join("∞" if bound is None else f"{bound:g}" for bound in bounds)
    scale, digits = (1, 3) if name == "mean_reciprocal_rank" else (100, 2)
    return " – ".join("" if bound is None else f"{scale * bound:.{digits}f}" for bound in bounds)
