"""Confidence intervals from resampled clusters: what belongs together, such as the captions of an image, is drawn together.

The percentile bootstrap of Efron and Tibshirani (1993, chapter 13), over clusters and not over observations, which within a
cluster depend on each other. Shapes: N observations, C clusters, R resamples.
"""

from __future__ import annotations

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95


class Bootstrap:
    """``RESAMPLES`` resamples of C clusters with replacement: the same for every statistic, and at each call.

    Takes 8 · R · C bytes.

    Attributes:
        times: (R, C) float64, how often each cluster is in each resample.
    """

    def __init__(self, clusters: int, resamples: int = RESAMPLES, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.times = np.empty((resamples, clusters))
        for row in self.times:
            row[:] = np.bincount(rng.integers(clusters, size=clusters), minlength=clusters)

    def means(self, values: np.ndarray, cluster_of: np.ndarray) -> np.ndarray:
        """The mean of ``values`` (N,), of which each lies in cluster ``cluster_of`` (N,), in every resample: (R,).

        Not every cluster needs to have observations; NaN where a resample has none.
        """
        clusters = self.times.shape[1]
        sums = self.times @ np.bincount(cluster_of, values, clusters)
        sizes = self.times @ np.bincount(cluster_of, minlength=clusters).astype(float)
        return np.divide(sums, sizes, out=np.full(len(sizes), np.nan), where=sizes > 0)

    def medians(self, values: np.ndarray, cluster_of: np.ndarray) -> np.ndarray:
        """As ``means``, of the median."""
        order = np.argsort(values, kind="stable")
        ordered, cluster_of = np.append(values[order], np.nan), cluster_of[order]
        medians = np.empty(len(self.times))
        for resample, times in enumerate(self.times):
            reached = times[cluster_of].cumsum()  # (N,) how many observations there are up to each value
            middle = [(reached[-1] - 1) // 2, reached[-1] // 2]
            medians[resample] = ordered[np.searchsorted(reached, middle, side="right")].mean()
        return medians

    def mean(self, values: np.ndarray, cluster_of: np.ndarray) -> list[float] | None:
        """The 95 % interval [low, high] of the mean; None where fewer than two clusters have observations."""
        return interval(self.means(values, cluster_of)) if _spread(cluster_of) else None

    def median(self, values: np.ndarray, cluster_of: np.ndarray) -> list[float] | None:
        """As ``mean``, of the median."""
        return interval(self.medians(values, cluster_of)) if _spread(cluster_of) else None


def interval(estimates: np.ndarray) -> list[float]:
    """The 95 % interval [low, high] of a statistic from its values (R,) in the resamples, NaN left out."""
    ordered = np.sort(estimates[~np.isnan(estimates)])
    outside = int((1 - LEVEL) / 2 * len(ordered))
    return [float(ordered[outside]), float(ordered[-1 - outside])]


def _spread(cluster_of: np.ndarray) -> bool:
    return len(cluster_of) > 0 and bool((cluster_of != cluster_of[0]).any())
