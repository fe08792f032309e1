"""Bar charts and histograms as numbers for the page's template to draw as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.ticker import MaxNLocator

from evaluation.recall import UNRANKED
from evaluation.report.runs import Direction, Extremes, Run

LEFT, RIGHT, TOP, BOTTOM = 40, 372, 10, 160  # of the plot in a chart of 380 x 200 SVG units, each about a pixel
_LAST_OF_BIN = (1, 5, 10, 20, 50, 100, 200, 500, 1000)
_SCORE_BINS = 32
Tick = tuple[float, str]  # its position in SVG units, its label
Bar = tuple[float, float, float, float, int, str]  # x, y, width, height, number of the run, its value in words


class Chart(NamedTuple):
    """A chart; ``paths`` are outlines that start and end on the x axis, one per series."""

    x_title: str
    y_title: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    bars: list[Bar]
    paths: list[str]


class RankCounts(NamedTuple):
    """The number of queries of each run (row) that have a rank in each bin (column)."""

    labels: list[str]
    counts: list[list[int]]
    queries: int


def count_ranks(runs: Sequence[Run], direction: Direction) -> RankCounts:
    """Count ranks, from 1, in bins that end at the cutoffs of recall and widen from there; the last bin is not scored."""
    ranks = [run.ranks[direction] for run in runs]
    scored = [of_run[of_run != UNRANKED] + 1 for of_run in ranks]
    highest = max((int(of_run.max()) for of_run in scored if len(of_run)), default=1)
    ends = [end for end in _LAST_OF_BIN if end < highest]
    starts = [1, *(end + 1 for end in ends)]
    counts = [np.bincount(np.searchsorted(ends, of_run), minlength=len(starts)).tolist() for of_run in scored]
    labels = [str(start) if start == end else f"{start}–{end}" for start, end in zip(starts, ends, strict=False)]
    labels.append(f"{starts[-1]}+" if starts[-1] < highest else str(highest))
    if any((of_run == UNRANKED).any() for of_run in ranks):
        labels.append("none")
        counts = [[*row, int((of_run == UNRANKED).sum())] for row, of_run in zip(counts, ranks, strict=True)]
    return RankCounts(labels, counts, len(ranks[0]))


def rank_chart(names: Sequence[str], counted: RankCounts) -> Chart:
    """Return bars of all runs side by side in each bin, in percent of the queries."""
    shares = 100 * np.array(counted.counts) / counted.queries
    scale, y_ticks = _y_axis(float(shares.max()))
    pitch = (RIGHT - LEFT) / len(counted.labels)
    width = 0.8 * pitch / len(names)
    bars = []
    for series, name in enumerate(names):
        for column, label in enumerate(counted.labels):
            share, count = float(shares[series, column]), counted.counts[series][column]
            title = f"{name}: rank {label}, queries: {count:,} of {counted.queries:,} ({share:.1f} %)"
            x, height = LEFT + (column + 0.1) * pitch + series * width, share * scale
            bars.append((x, BOTTOM - height, width, height, series, title))
    # "201–500" is too wide; where a bin starts follows from the one before.
    x_ticks = [(LEFT + (column + 0.5) * pitch, label.split("–")[-1]) for column, label in enumerate(counted.labels)]
    return Chart("rank of the best right answer, up to", "% of queries", x_ticks, y_ticks, bars, [])


def score_chart(extremes: Extremes) -> Chart:
    """Return histograms of the positives' scores and of the hardest negatives' on one axis, in percent of all queries."""
    series = [scores[scores > -np.inf].astype(float) for scores in extremes]
    both = np.concatenate(series)
    low, high = (float(both.min()), float(both.max())) if len(both) else (0.5, 0.5)
    if low == high:
        low, high = low - 0.5, high + 0.5
    shares = [np.histogram(scores, _SCORE_BINS, (low, high))[0] * (100 / len(extremes.positives)) for scores in series]
    scale, y_ticks = _y_axis(max(float(share.max()) for share in shares))
    step = (RIGHT - LEFT) / _SCORE_BINS
    outlines = ("".join(f"V{BOTTOM - value * scale:.1f}h{step:.3f}" for value in share.tolist()) for share in shares)
    paths = [f"M{LEFT},{BOTTOM}{outline}V{BOTTOM}" for outline in outlines]
    across = (RIGHT - LEFT) / (high - low)
    ticks = [tick for tick in _round_numbers(low, high, 5) if low <= tick <= high]
    x_ticks = [(LEFT + (tick - low) * across, f"{tick:.6g}".replace("-", "−")) for tick in ticks]
    return Chart("score", "% of queries", x_ticks, y_ticks, [], paths)


def _y_axis(highest: float) -> tuple[float, list[Tick]]:
    """SVG units per percent such that ``highest`` fits, and the ticks."""
    ticks = _round_numbers(0, highest or 1.0, 4)
    scale = (BOTTOM - TOP) / ticks[-1]
    return scale, [(BOTTOM - tick * scale, f"{tick:.6g}") for tick in ticks]


def _round_numbers(low: float, high: float, steps: int) -> list[float]:
    ticks = np.round(MaxNLocator(steps, steps=[1, 2, 5, 10]).tick_values(low, high), 12)
    return [tick + 0.0 for tick in ticks.tolist()]  # no minus zero
