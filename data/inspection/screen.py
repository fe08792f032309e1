"""Draw reports as lines of text."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from data.inspection.report import Range, Report, bins

_EIGHTHS = "▏▎▍▌▋▊▉█"


@dataclass(frozen=True)
class Screen:
    """How wide lines may be, and whether they may have block characters."""

    width: int
    blocks: bool

    @classmethod
    def of(cls, stream: TextIO) -> Screen:
        """That of ``stream``, 60 to 120 columns."""
        try:
            f"{_EIGHTHS}─–".encode(stream.encoding or "ascii")
        except (UnicodeEncodeError, LookupError):
            blocks = False
        else:
            blocks = True
        return cls(min(max(shutil.get_terminal_size().columns, 60), 120), blocks)

    def bar(self, part: int, whole: int, width: int) -> str:
        """A bar of at most ``width`` columns; whatever is there can be seen."""
        if not self.blocks:
            return "#" * max(round(width * part / whole), part > 0)
        eighths = max(round(8 * width * part / whole), part > 0)
        return _EIGHTHS[-1] * (eighths // 8) + (_EIGHTHS[eighths % 8 - 1] if eighths % 8 else "")


def draw(report: Report, screen: Screen) -> Iterator[str]:
    """The lines of one report; what is wrong is only counted, ``draw_faults`` lists it."""
    yield f"{report.kind.upper()}  {report.place}"
    yield ("─" if screen.blocks else "-") * screen.width
    yield from _rows(report.facts, screen)
    title, counts = report.histogram
    if counts:
        yield ""
        yield f"  {title}"
        yield from _histogram(counts, screen)
    if report.ranges:
        yield ""
        yield from _ranges(report.ranges)
    for heading, rows in report.tables.items():
        yield ""
        yield f"  {heading}"
        yield from _rows(rows, screen, indent=4)
    yield ""


def _rows(rows: Mapping[str, str], screen: Screen, indent: int = 2) -> Iterator[str]:
    """Labels and values side by side, long values over several lines."""
    column = indent + 2 + max(map(len, rows), default=0)
    for label, value in rows.items():
        lines = textwrap.wrap(value, max(screen.width - column, 20), break_on_hyphens=False) or [""]
        yield f"{' ' * indent}{label}".ljust(column) + lines[0]
        yield from (" " * column + line for line in lines[1:])


def _histogram(counts: Mapping[int, int], screen: Screen) -> Iterator[str]:
    rows = bins(counts)
    dash = "–" if screen.blocks else "-"
    spans = [(max(first, min(counts)), min(last, max(counts))) for first, last, _ in rows]
    labels = [str(first) if first == last else f"{first}{dash}{last}" for first, last in spans]
    numbers = [f"{total:,}" for *_, total in rows]
    whole, most = sum(counts.values()), max(total for *_, total in rows)
    label_width, number_width = max(map(len, labels)), max(map(len, numbers))
    bar_width = screen.width - label_width - number_width - 16
    for label, number, (*_, total) in zip(labels, numbers, rows, strict=True):
        bar = screen.bar(total, most, bar_width)
        yield f"    {label:>{label_width}}  {number:>{number_width}} {total / whole:>7.1%}  {bar}".rstrip()


def _ranges(ranges: Mapping[str, Range]) -> Iterator[str]:
    label_width = max(map(len, ranges))
    yield f"  {'values':<{label_width + 2}}{'smallest':>12}{'mean':>12}{'largest':>12}{'zeros':>10}"
    for label, values in ranges.items():
        numbers = "".join(f"{number:>12.4g}" for number in (values.low, values.mean, values.high))
        yield f"    {label:<{label_width}}{numbers}{values.zero_share:>10.1%}"


def draw_faults(reports: Sequence[Report], screen: Screen) -> Iterator[str]:
    """The list of what is wrong, or the line that nothing is."""
    faulty = [report for report in reports if report.faults]
    if not faulty:
        yield "Nothing is wrong."
        return
    yield "WRONG"
    yield ("─" if screen.blocks else "-") * screen.width
    for report in faulty:
        yield f"  {report.kind} {report.place}"
        number_width = max(len(f"{count:,}") for count in report.faults.counts.values())
        for kind, count in report.faults.counts.items():
            yield f"    {count:>{number_width},}  {kind}"
            examples = report.faults.examples[kind]
            yield from (f"{' ' * (number_width + 8)}{example}" for example in examples)
            if count > len(examples):
                yield f"{' ' * (number_width + 8)}and {count - len(examples):,} more"
