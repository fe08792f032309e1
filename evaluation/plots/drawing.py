"""What pictures are made of: panels placed on a sheet in inches, text drawn as it stands, and the file at the end."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from utils.errors import InputError
from utils.files import atomic_file

DPI = 150
MOST_DOTS = 30_000  # of a side; matplotlib refuses 65,536
FORMATS = (".png", ".svg")
# Tried in this order for letters that the one before does not have; none but the first has to be installed.
_FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "Arial Unicode MS",
    "Noto Emoji",
    "Symbola",
)
_ILLEGAL_IN_XML = "\ufffe\uffff"


def style() -> Any:
    """The context to draw and to save in, whatever the user's own settings are. SVG keeps its text as text."""
    installed = set(fontManager.get_font_names())
    return rc_context(
        {
            "font.family": [name for name in _FONTS if name in installed],
            "text.usetex": False,
            "svg.fonttype": "none",
            "svg.image_inline": True,
            "svg.hashsalt": "iais",
            "image.composite_image": False,
        }
    )


class Panel(NamedTuple):
    """A rectangle of ``width`` × ``height`` inches; ``draw(figure, left, top)`` puts it there, measured from the top left."""

    width: float
    height: float
    draw: Callable[[Figure, float, float], None]


def grid(rows: Sequence[Sequence[Panel]], gap: float = 0.35) -> Panel:
    """Panels in rows and columns as wide and high as they need, each at the upper left of its place."""
    widths = [max(panel.width for panel in column) for column in zip(*rows, strict=True)]
    heights = [max(panel.height for panel in row) for row in rows]

    def draw(figure: Figure, left: float, top: float) -> None:
        for row, height in zip(rows, heights, strict=True):
            x = left
            for panel, width in zip(row, widths, strict=True):
                panel.draw(figure, x, top)
                x += width + gap
            top += height + gap

    return Panel(sum(widths) + gap * (len(widths) - 1), sum(heights) + gap * (len(heights) - 1), draw)


def stacked(panels: Sequence[Panel], gap: float = 0.35) -> Panel:
    """Panels from top to bottom."""
    return grid([[panel] for panel in panels], gap)


def sheet(panel: Panel, margin: float = 0.25) -> Figure:
    """A figure with ``panel`` on it and nothing else."""
    figure = Figure(figsize=(panel.width + 2 * margin, panel.height + 2 * margin))
    panel.draw(figure, margin, margin)
    return figure


def bare_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes without frame and ticks, in inches from the top left; x grows to the right and y down, from 0 to the size."""
    across, down = figure.get_size_inches()
    axes = figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    return axes


def text_panel(lines: Sequence[str], points: float, *, math: bool = False, **look: Any) -> Panel:
    """Lines of text; with ``math``, which no user's text may have, ``$`` sets mathematics."""
    pitch = 1.35 * points / 72

    def draw(figure: Figure, left: float, top: float) -> None:
        axes = bare_axes(figure, left, top, panel.width, panel.height)
        for number, line in enumerate(lines):
            write(axes, 0, (number + 0.5) * pitch, line, points, parse_math=math, va="center", **look)

    read = [re.sub(r"[${}_^]", "", line) if math else line for line in lines]
    panel = Panel(max(0.1, *(width_of(line, points) for line in read)), pitch * len(lines), draw)
    return panel


def write(axes: Axes, x: float, y: float, text: str, points: float, **look: Any) -> None:
    """Put text on axes as it stands: ``$`` is a dollar unless ``parse_math`` is given."""
    axes.text(x, y, printable(text), **({"fontsize": points, "parse_math": False} | look))


def printable(text: str) -> str:
    """``text`` with U+FFFD for what neither a font nor XML has: control characters and halves of surrogate pairs."""
    return "".join(
        "\ufffd" if unicodedata.category(letter) in ("Cc", "Cs") or letter in _ILLEGAL_IN_XML else letter for letter in text
    )


def width_of(text: str, points: float) -> float:
    """About how many inches ``text`` takes, rather more than less."""
    ems = sum(1.05 if unicodedata.east_asian_width(letter) in "WF" else 0.63 for letter in text)
    return ems * points / 72


def shortened(text: str, letters: int) -> str:
    """``text``, or its beginning if it has more than so many letters."""
    return text if len(text) <= letters else text[: letters - 1] + "…"


def wrapped(text: str, points: float, width: float) -> list[str]:
    """Lines of ``text`` that are ``width`` inches wide at most, broken at spaces, or anywhere in a word that is wider."""
    lines = [""]
    for word in text.split():
        if lines[-1] and width_of(f"{lines[-1]} {word}", points) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
        while width_of(lines[-1], points) > width:
            fitting = next(n for n in range(len(lines[-1]), 0, -1) if n == 1 or width_of(lines[-1][:n], points) <= width)
            lines[-1:] = [lines[-1][:fitting], lines[-1][fitting:]]
    return lines


def check_format(path: str | Path) -> None:
    """Raise ``InputError`` unless the name says in which format to draw."""
    if Path(path).suffix.lower() not in FORMATS:
        raise InputError(f"{path}: expected a file name that ends in {' or '.join(FORMATS)}")


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG or SVG, by the name's suffix, atomically; the same figure gives the same bytes.

    Raises ``InputError`` for another suffix and when the file cannot be written.
    """
    check_format(path)
    suffix = Path(path).suffix.lower()
    dpi = min(DPI, MOST_DOTS / figure.get_size_inches().max())
    with style(), atomic_file(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a box stands for what no font has
        figure.savefig(file, format=suffix[1:], dpi=dpi, metadata={"Date": None} if suffix == ".svg" else None)
