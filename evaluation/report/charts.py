"""Bar charts and histograms as numbers that the page's template draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from evaluation.recall import UNRANKED
from evaluation.report.runs import Extremes, Run, Way

WIDTH, HEIGHT = 380, 200  # of a chart, in SVG units of about a pixel
LEFT, RIGHT, TOP, BOTTOM = 40, 372, 10, 160  # of its plot
_LAST_OF_BIN = (1, 5, 10, 20, 50, 100, 200, 500, 1000)
_SCORE_BINS = 32


class Tick(NamedTuple):
    """A place on an axis, in SVG units, and what stands there."""

    at: float
    label: str


class Bar(NamedTuple):
    """A bar of series ``series``, counted from 0; ``title`` tells its number."""

    x: float
    y: float
    width: float
    height: float
    series: int
    title: str


class Chart(NamedTuple):
    """What to draw; ``paths`` are outlines that begin and end on the x axis, one a series."""

    x_title: str
    y_title: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    bars: list[Bar]
    paths: list[str]


class RankCounts(NamedTuple):
    """How many queries of each run (row) have a rank in each bin (column)."""

    labels: list[str]
    counts: list[list[int]]
    queries: int


def count_ranks(runs: Sequence[Run], way: Way) -> RankCounts:
    """Ranks from 1 in bins that end at the cutoffs of recall and grow from there; those that were not scored last."""
    ranks = [run.ranks[way] for run in runs]
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
    """Bars of all runs side by side in each bin, in percent of the queries."""
    shares = [[100 * count / counted.queries for count in row] for row in counted.counts]
    scale, y_ticks = _upwards(max(max(row) for row in shares))
    pitch = (RIGHT - LEFT) / len(counted.labels)
    width = 0.8 * pitch / len(names)
    bars = [
        Bar(
            LEFT + (place + 0.1) * pitch + series * width,
            BOTTOM - share * scale,
            width,
            share * scale,
            series,
            f"{name}: rank {label}, {count:,} of {counted.queries:,} queries ({share:.1f} %)",
        )
        for series, (name, row, of_run) in enumerate(zip(names, shares, counted.counts, strict=True))
        for place, (label, share, count) in enumerate(zip(counted.labels, row, of_run, strict=True))
    ]
    # All of "201–500" has no room; where a bin begins follows from the one before.
    x_ticks = [Tick(LEFT + (place + 0.5) * pitch, label.split("–")[-1]) for place, label in enumerate(counted.labels)]
    return Chart("rank of the best right answer, up to", "% of queries", x_ticks, y_ticks, bars, [])


def score_chart(extremes: Extremes) -> Chart:
    """Two histograms over one axis: of the positives' scores, then of the hardest negatives', in percent of all queries."""
    series = [scores[scores > -np.inf].astype(float) for scores in extremes]
    both = np.concatenate(series)
    low, high = (float(both.min()), float(both.max())) if len(both) else (0.0, 1.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    shares = [np.histogram(scores, _SCORE_BINS, (low, high))[0] * (100 / len(extremes.positives)) for scores in series]
    scale, y_ticks = _upwards(max(float(share.max()) for share in shares))
    across = (RIGHT - LEFT) / (high - low)
    step = (RIGHT - LEFT) / _SCORE_BINS
    paths = []
    for share in shares:
        outline = "".join(f"V{BOTTOM - value * scale:.1f}h{step:.3f}" for value in share.tolist())
        paths.append(f"M{LEFT},{BOTTOM}{outline}V{BOTTOM}")
    size = _nice((high - low) / 5)
    first = math.ceil(low / size)
    x_ticks = [
        Tick(LEFT + (number * size - low) * across, f"{number * size:.6g}".replace("-", "−"))
        for number in range(first, math.floor(high / size) + 1)
    ]
    return Chart("score", "% of queries", x_ticks, y_ticks, [], paths)


def _upwards(highest: float) -> tuple[float, list[Tick]]:
    """SVG units for one percent so that ``highest`` fits, and ticks with round numbers."""
    size = _nice(highest / 4)
    steps = max(math.ceil(highest / size), 1)
    scale = (BOTTOM - TOP) / (steps * size)
    return scale, [Tick(BOTTOM - number * size * scale, f"{number * size:.6g}") for number in range(steps + 1)]


def _nice(size: float) -> float:
    """The next larger of 1, 2 and 5 times a power of ten."""
    if size <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(size))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= 0.999 * size)
