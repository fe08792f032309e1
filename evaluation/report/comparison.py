"""Recalls of several runs beside each other, with how sure their differences to the first are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from evaluation.analysis import Bootstrap, interval
from evaluation.recall import CUTOFFS
from evaluation.report.queries import WAYS
from evaluation.report.runs import Run, Way

COLUMNS = ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10", "r_mean")


class Cell(NamedTuple):
    """A recall; each of the others may be missing.

    Attributes:
        difference: to the first run's.
        difference_interval: of the difference, 95 %, from resampled images.
        best: whether no run has a higher one, and one has a lower one.
    """

    value: float
    interval: list[float | None] | None
    difference: float | None
    difference_interval: list[float] | None
    best: bool

    @property
    def differs(self) -> bool:
        """Whether the interval of the difference lies on one side of zero."""
        bounds = self.difference_interval
        return bounds is not None and (bounds[0] > 0 or bounds[1] < 0)


def compare(runs: Sequence[Run], image_of: np.ndarray) -> list[dict[str, Cell]]:
    """By run, its cells by column. All runs are resampled alike, so that what their queries have in common cancels."""
    bootstrap = Bootstrap(int(image_of.max()) + 1)
    values = {key: [run.recalls[key] for run in runs] for key in COLUMNS}
    rows = []
    for run in runs:
        first = run is runs[0]
        bounds = {} if first else _difference_intervals(run, runs[0], image_of, bootstrap)
        rows.append(
            {
                key: Cell(
                    run.recalls[key],
                    run.intervals.get(key),
                    None if first else run.recalls[key] - values[key][0],
                    bounds.get(key),
                    min(values[key]) < run.recalls[key] == max(values[key]),
                )
                for key in COLUMNS
            }
        )
    return rows


def _difference_intervals(run: Run, first: Run, image_of: np.ndarray, bootstrap: Bootstrap) -> dict[str, list[float]]:
    cluster_of: dict[Way, np.ndarray] = {"img": image_of, "txt": np.arange(image_of.max() + 1)}
    if len(cluster_of["txt"]) < 2:  # says nothing about the spread
        return {}
    resampled = {
        f"{way}_r{cutoff}": bootstrap.means(
            (run.ranks[way] < cutoff).astype(float) - (first.ranks[way] < cutoff), cluster_of[way]
        )
        for way in WAYS
        for cutoff in CUTOFFS
    }
    resampled["r_mean"] = np.mean(list(resampled.values()), axis=0)
    return {key: interval(differences) for key, differences in resampled.items()}
