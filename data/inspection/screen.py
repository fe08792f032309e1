"""Draw reports as lines of text, and their histograms and ranges as a PNG."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING

from data.inspection.report import Range, Report, bins

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOUR, _LIGHT = "#31688e", "#c3d5e3"


def screen_width() -> int:
    """Return the terminal's width, limited to 80 to 120 columns."""
    return min(max(shutil.get_terminal_size().columns, 80), 120)


def draw(report: Report) -> Iterator[str]:
    """The lines of a report, without its faults."""
    yield from _section(f"{report.kind.upper()}  {report.place}\n{'-' * screen_width()}", report.facts)
    title, counts = report.histogram
    if counts:
        yield from _section(title, _histogram(counts))
    if report.ranges:
        rows = {
            label: f"{seen.low:>12.4g}{seen.mean:>12.4g}{seen.high:>12.4g}{seen.zeros / seen.number:>10.1%}"
            for label, seen in report.ranges.items()
        }
        yield from _section("values: smallest, mean, largest, and share of zeros", rows)
    for title, rows in report.tables.items():
        yield from _section(title, rows)


def _section(title: str, rows: Mapping[str, str]) -> Iterator[str]:
    yield title
    column, width = max(map(len, rows), default=0), screen_width()
    for label, value in rows.items():
        yield textwrap.fill(f"  {label:<{column}}  {value}", width, subsequent_indent=" " * 6, break_on_hyphens=False)
    yield ""


def _histogram(counts: Mapping[int, int]) -> dict[str, str]:
    edges, totals = bins(counts)
    whole, most, longest = totals.sum(), totals.max(), screen_width() - 45
    rows = {}
    for first, last, total in zip(edges[:-1], edges[1:] - 1, totals, strict=True):
        bar = "#" * max(round(longest * total / most), int(total > 0))  # at least one mark for a count above 0
        rows[f"{first}" if first == last else f"{first}-{last}"] = f"{total:>12,} {total / whole:>7.1%}  {bar}".rstrip()
    return rows


def draw_faults(reports: Sequence[Report]) -> Iterator[str]:
    """The lines that list all faults, or say that there are none."""
    faulty = [report for report in reports if report.faults]
    yield "WRONG" if faulty else "Nothing is wrong."
    for report in faulty:
        yield f"  {report.kind} {report.place}"
        for kind, count in report.faults.counts.items():
            yield f"    {count:>9,}  {kind}"
            examples = report.faults.examples[kind]
            more = [f"and {count - len(examples):,} more"] if count > len(examples) else []
            yield from (f"{' ' * 17}{line}" for line in [*examples, *more])


def save_plot(reports: Sequence[Report], file: IO[bytes]) -> None:
    """Write a PNG with one row per report that has a histogram, and beside it the ranges of values."""
    from matplotlib.figure import Figure  # takes a second

    drawn = [report for report in reports if report.histogram[1]]
    rows = max(len(drawn), 1)
    figure = Figure(figsize=(12, 3.4 * rows), dpi=110, layout="constrained")
    grid = figure.add_gridspec(rows, 2, width_ratios=(3, 2))
    for row, report in enumerate(drawn):
        _draw_histogram(figure.add_subplot(grid[row, :1] if report.ranges else grid[row, :]), report)
        if report.ranges:
            _draw_ranges(figure.add_subplot(grid[row, 1]), report.ranges)
    figure.savefig(file, format="png")


def _draw_histogram(axes: Axes, report: Report) -> None:
    title, counts = report.histogram
    edges, totals = bins(counts)
    axes.stairs(totals, edges - 0.5, fill=True, color=_COLOUR)
    axes.locator_params(integer=True)
    axes.set_title(report.place, fontsize=9, loc="left", parse_math=False)
    axes.set(xlabel=title, ylabel=f"{report.kind.split()[0]}s")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_ranges(axes: Axes, ranges: Mapping[str, Range]) -> None:
    """A bar from the smallest to the largest value, with a mark at the mean; logarithmic beyond 1, as features are large."""
    for label, values in ranges.items():
        name = f"{label}\n{values.low:.4g} to {values.high:.4g},\nmean {values.mean:.4g}"
        axes.barh(name, values.high - values.low, left=values.low, color=_LIGHT)
        axes.plot(values.mean, name, "|", color=_COLOUR, markersize=20)
    axes.set_xscale("symlog", linthresh=1)
    axes.spines[["top", "right", "left"]].set_visible(False)
