"""Draw the histograms and ranges of reports as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from data.inspection.report import Range, Report, bins

_COLOUR, _LIGHT = "#31688e", "#c3d5e3"


def save_plot(reports: Sequence[Report], file: IO[bytes]) -> None:
    """Write a PNG with a row for each report that has a histogram: this, and the ranges of values where there are any."""
    drawn = [report for report in reports if report.histogram[1]]
    figure = Figure(figsize=(12, 3.4 * max(len(drawn), 1)), dpi=110, layout="constrained")
    grid = figure.add_gridspec(max(len(drawn), 1), 2, width_ratios=(3, 2))
    for row, report in enumerate(drawn):
        _draw_histogram(figure.add_subplot(grid[row, :1] if report.ranges else grid[row, :]), report)
        if report.ranges:
            places = grid[row, 1].subgridspec(len(report.ranges), 1)
            for place, (name, values) in enumerate(report.ranges.items()):
                _draw_range(figure.add_subplot(places[place]), name, values)
    figure.savefig(file, format="png")


def _draw_histogram(axes: Axes, report: Report) -> None:
    title, counts = report.histogram
    edges, _, totals = zip(*bins(counts), strict=True)
    step = edges[1] - edges[0] if len(edges) > 1 else 1
    axes.bar([edge + (step - 1) / 2 for edge in edges], totals, width=0.9 * step, color=_COLOUR)
    axes.set_title(report.place, fontsize=9, loc="left", parse_math=False)
    axes.set_xlabel(title)
    axes.set_ylabel(report.kind.split()[0] + "s")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)


def _draw_range(axes: Axes, name: str, values: Range) -> None:
    """A bar from the smallest to the largest value, with a mark at the mean."""
    axes.barh(0, values.high - values.low, left=values.low, height=1, color=_LIGHT)
    axes.plot([values.mean, values.mean], [-0.5, 0.5], color=_COLOUR, linewidth=2)
    axes.set_yticks([0], [name])
    axes.tick_params(axis="y", length=0)
    axes.set_title(f"{values.low:.4g} to {values.high:.4g}, mean {values.mean:.4g}", fontsize=8, loc="right", pad=3)
    axes.spines[["top", "right", "left"]].set_visible(False)
