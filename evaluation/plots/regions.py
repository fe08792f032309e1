"""The regions of a picture: cut out, one tile each, and drawn as numbered boxes with the words that attend to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image as Picture
from PIL import ImageOps

from evaluation.plots.drawing import Panel, bare_axes, width_of, wrapped, write
from utils.errors import InputError

TILE = 96  # pixels of a side
ASPECT = 4 / 3  # of the frame that boxes are drawn in where there is no picture: normalised boxes don't tell its shape
_WIDTHS = 5.0, 8.0  # inches of the picture, least and most, with _WIDTH_PER_BOX between them
_WIDTH_PER_BOX = 0.08
_LEGEND_WIDTH, _POINTS = 2.6, 9.0
_COLOURS = [colormaps["tab20"](2 * (number % 10) + number // 10 % 2) for number in range(20)]
_QUIET, _FAINT = "#707070", (1.0, 1.0, 1.0, 0.75)


def read_picture(path: str | Path) -> Picture.Image:
    """A picture in RGB, the right way up, as detectors read it. Raises ``InputError`` when it cannot be read."""
    try:
        with Picture.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, SyntaxError, ValueError, Picture.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{path}: cannot be read as a picture ({reason})") from error


def tiles_of(picture: Picture.Image, boxes: np.ndarray) -> list[np.ndarray]:
    """The regions of a picture by their normalised boxes (K, 4 or more), each (TILE, TILE, 4) uint8, transparent beside it."""
    tiles = []
    for x1, y1, x2, y2 in (boxes[:, :4].clip(0, 1) * np.tile(picture.size, 2)).tolist():
        left, top = min(int(x1), picture.width - 1), min(int(y1), picture.height - 1)
        right, bottom = max(round(x2), left + 1), max(round(y2), top + 1)
        scale = TILE / max(right - left, bottom - top)
        width, height = (max(round(side * scale), 1) for side in (right - left, bottom - top))
        tile = Picture.new("RGBA", (TILE, TILE))
        crop = picture.crop((left, top, right, bottom)).resize((width, height))
        tile.paste(crop, ((TILE - width) // 2, (TILE - height) // 2))
        tiles.append(np.asarray(tile))
    return tiles


def boxes_panel(picture: Picture.Image | None, boxes: np.ndarray, words_of: Mapping[int, Sequence[str]]) -> Panel:
    """Boxes (K, 7) on the picture, or in an empty frame; beside it, the words of each region that has some."""
    aspect = picture.width / picture.height if picture else ASPECT
    widest = min(max(_WIDTHS[0], _WIDTH_PER_BOX * len(boxes)), _WIDTHS[1])
    width, height = min(widest, 0.8 * widest * aspect), min(widest / aspect, 0.8 * widest)
    colours = {number: _COLOURS[number % len(_COLOURS)] for number in words_of}
    legend = [
        (number, place, line)
        for number in sorted(words_of)
        for place, line in enumerate(wrapped(", ".join(words_of[number]), _POINTS, _LEGEND_WIDTH - 0.4))
    ]
    pitch = 1.6 * _POINTS / 72
    per_column = max(int(height / pitch), 1)
    columns = -(-len(legend) // per_column)

    def draw(figure: Figure, left: float, top: float) -> None:
        axes = bare_axes(figure, left, top, panel.width, panel.height)
        if picture:
            shown = picture.copy()
            shown.thumbnail((1200, 1200))
            axes.imshow(np.asarray(shown), extent=(0, width, height, 0), aspect="auto")
        else:
            axes.add_patch(Rectangle((0, 0), width, height, facecolor="#f4f4f4", edgecolor="none"))
        scaled = boxes[:, :4].clip(0, 1) * np.tile([width, height], 2)
        # Those with words above the others, and small ones above large ones.
        order = sorted(range(len(boxes)), key=lambda number: (number in words_of, -boxes[number, 4] * boxes[number, 5]))
        for number in order:
            _draw_box(axes, scaled[number], number, colours.get(number))
        for place, (number, continued, line) in enumerate(legend):
            x = width + 0.25 + place // per_column * _LEGEND_WIDTH
            y = (place % per_column + 0.5) * pitch
            if not continued:
                _write_tag(axes, x, y - pitch / 2 + 0.02, number, _POINTS, colours[number])
            write(axes, x + 0.35, y, line, _POINTS, va="center")

    legend_height = min(len(legend), per_column) * pitch
    panel = Panel(width + 0.25 + columns * _LEGEND_WIDTH, max(height, legend_height), draw)
    return panel


def _draw_box(axes: Axes, corners: np.ndarray, number: int, colour: tuple[float, ...] | None) -> None:
    """A box that words attend to, in ``colour``, or one of the others."""
    x1, y1, x2, y2 = corners.tolist()
    strength = 2.6 if colour else 1.4
    for edge, width in (("white", strength), (colour or _QUIET, strength - 0.8)):
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=edge, linewidth=width))
    if colour:
        _write_tag(axes, x1, y1, number, 7.5, colour)
    else:
        _write_tag(axes, x1, y1, number, 5, _FAINT)


def _write_tag(axes: Axes, x: float, y: float, number: int, points: float, colour: tuple[float, ...]) -> None:
    """A number on ``colour``, its upper left corner at (x, y)."""
    height, width = 1.35 * points / 72, width_of(str(number), points) + 0.04
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="none"))
    ink = "white" if sum(colour[:3]) < 1.9 else "black"
    write(axes, x + width / 2, y + height / 2, str(number), points, color=ink, ha="center", va="center_baseline")
