"""Draw reports as lines of text, and their histograms and ranges as a PNG."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, TextIO

from data.inspection.report import Range, Report, bins
from utils.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOUR, _LIGHT = "#31688e", "#c3d5e3"


@dataclass(frozen=True)
class Screen:
    """The width of lines, and whether they may have characters beyond ASCII."""

    width: int
    block: str
    line: str
    dash: str

    @classmethod
    def of(cls, stream: TextIO) -> Screen:
        """The screen of ``stream``, with 60 to 120 columns."""
        width = min(max(shutil.get_terminal_size().columns, 60), 120)
        try:
            "█─–".encode(stream.encoding or "ascii")
        except (UnicodeEncodeError, LookupError):
            return cls(width, "#", "-", "-")
        return cls(width, "█", "─", "–")

    def heading(self, title: str) -> str:
        """A title, underlined."""
        return f"{title}\n{self.line * self.width}"


def draw(report: Report, screen: Screen) -> Iterator[str]:
    """The lines of a report, without its faults."""
    yield screen.heading(f"{report.kind.upper()}  {report.place}")
    yield from _rows(report.facts, screen)
    title, counts = report.histogram
    if counts:
        yield f"\n  {title}"
        yield from _histogram(counts, screen)
    if report.ranges:
        yield ""
        yield from _ranges(report.ranges)
    for heading, rows in report.tables.items():
        yield f"\n  {heading}"
        yield from _rows(rows, screen, indent=4)
    yield ""


def _rows(rows: Mapping[str, str], screen: Screen, indent: int = 2) -> Iterator[str]:
    column = indent + 2 + max(map(len, rows), default=0)
    for label, value in rows.items():
        lines = textwrap.wrap(value, max(screen.width - column, 20), break_on_hyphens=False) or [""]
        yield f"{' ' * indent}{label}".ljust(column) + lines[0]
        yield from (" " * column + line for line in lines[1:])


def _histogram(counts: Mapping[int, int], screen: Screen) -> Iterator[str]:
    rows = [(max(first, min(counts)), min(last, max(counts)), total) for first, last, total in bins(counts)]
    labels = [str(first) if first == last else f"{first}{screen.dash}{last}" for first, last, _ in rows]
    whole, most = sum(counts.values()), max(total for *_, total in rows)
    label_width, number_width = max(map(len, labels)), len(f"{most:,}")
    bar_width = screen.width - label_width - number_width - 16
    for label, (*_, total) in zip(labels, rows, strict=True):
        bar = screen.block * max(round(bar_width * total / most), total > 0)  # whatever is there can be seen
        yield f"    {label:>{label_width}}  {total:>{number_width},} {total / whole:>7.1%}  {bar}".rstrip()


def _ranges(ranges: Mapping[str, Range]) -> Iterator[str]:
    width = max(map(len, ranges)) + 2
    yield f"  {'values':<{width}}{'smallest':>12}{'mean':>12}{'largest':>12}{'zeros':>10}"
    for label, values in ranges.items():
        numbers = "".join(f"{number:>12.4g}" for number in (values.low, values.mean, values.high))
        yield f"    {label:<{width - 2}}{numbers}{values.zeros / values.count:>10.1%}"


def draw_faults(reports: Sequence[Report], screen: Screen) -> Iterator[str]:
    """The lines that list all faults, or say that there are none."""
    faulty = [report for report in reports if report.faults]
    yield screen.heading("WRONG") if faulty else "Nothing is wrong."
    for report in faulty:
        yield f"  {report.kind} {report.place}"
        width = max(len(f"{count:,}") for count in report.faults.counts.values())
        for kind, count in report.faults.counts.items():
            yield f"    {count:>{width},}  {kind}"
            examples = report.faults.examples[kind]
            more = [f"and {count - len(examples):,} more"] if count > len(examples) else []
            yield from (f"{' ' * (width + 8)}{line}" for line in [*examples, *more])


def load_plotter() -> Callable[[Sequence[Report], IO[bytes]], None]:
    """The function that writes reports as a PNG. Importing matplotlib takes a second; raises ``InputError`` without it."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise InputError(f"--plot: matplotlib cannot be imported ({error}); install it") from error

    def save_plot(reports: Sequence[Report], file: IO[bytes]) -> None:
        """One row per report with a histogram, which has the ranges of values beside it."""
        drawn = [report for report in reports if report.histogram[1]]
        figure = Figure(figsize=(12, 3.4 * max(len(drawn), 1)), dpi=110, layout="constrained")
        grid = figure.add_gridspec(max(len(drawn), 1), 2, width_ratios=(3, 2))
        for row, report in enumerate(drawn):
            axes = figure.add_subplot(grid[row, :1] if report.ranges else grid[row, :])
            _draw_histogram(axes, report)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(integer=True))
            if report.ranges:
                cells = grid[row, 1].subgridspec(len(report.ranges), 1)
                for index, (name, values) in enumerate(report.ranges.items()):
                    _draw_range(figure.add_subplot(cells[index]), name, values)
        figure.savefig(file, format="png")

    return save_plot


def _draw_histogram(axes: Axes, report: Report) -> None:
    title, counts = report.histogram
    edges, _, totals = zip(*bins(counts), strict=True)
    step = edges[1] - edges[0] if len(edges) > 1 else 1
    axes.bar([edge + (step - 1) / 2 for edge in edges], totals, width=0.9 * step, color=_COLOUR)
    axes.set_title(report.place, fontsize=9, loc="left", parse_math=False)
    axes.set_xlabel(title)
    axes.set_ylabel(report.kind.split()[0] + "s")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_range(axes: Axes, name: str, values: Range) -> None:
    """A bar from the smallest to the largest value, with a mark at the mean."""
    axes.barh(0, values.high - values.low, left=values.low, height=1, color=_LIGHT)
    axes.plot([values.mean, values.mean], [-0.5, 0.5], color=_COLOUR, linewidth=2)
    axes.set_yticks([0], [name])
    axes.tick_params(axis="y", length=0)
    axes.set_title(f"{values.low:.4g} to {values.high:.4g}, mean {values.mean:.4g}", fontsize=8, loc="right", pad=3)
    axes.spines[["top", "right", "left"]].set_visible(False)
