"""A map of attention in colours, with words or cut-out regions along its sides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from evaluation.plots.drawing import Panel, bare_axes, grid, stacked, text_panel, width_of, write

COLOURS = "BuPu"
_WIDTHS = 9.0, 24.0  # inches that the cells of maps beside one another take if they can, and at most
_CELLS = 0.1, 0.32  # inches that a cell takes within these bounds, at least and at most
_SMALLEST_TILE = 0.26  # inches
_SPACE = 0.04  # inches between map, names and tiles
_BLACK, _GREY, _FAINT = "#202020", "#606060", "#b0b0b0"


class Labels(NamedTuple):
    """What stands along a side of a map: words or region numbers, and tiles (TILE, TILE, 4) of the regions, if any."""

    names: Sequence[str]
    tiles: Sequence[np.ndarray] = ()

    def name_width(self, cell: float) -> float:
        """Inches of the widest name beside cells of so many inches."""
        return max(width_of(name, points_of(cell)) for name in self.names)

    def depth(self, cell: float) -> float:
        """Inches that names and tiles take."""
        levels, size = tiling(cell)
        return self.name_width(cell) + 2 * _SPACE + (levels * (size + _SPACE) if self.tiles else 0)


def points_of(cell: float) -> float:
    """The size of letters beside cells of so many inches."""
    return min(9.0, 0.74 * 72 * cell)


def tiling(cell: float) -> tuple[int, float]:
    """In how many rows tiles of neighbouring cells are staggered, so that they are large enough; their size in inches."""
    levels = math.ceil(_SMALLEST_TILE / cell)
    return levels, 0.94 * levels * cell


class Map(NamedTuple):
    """A map (rows, columns), what it is called, and what stands along it.

    Maps of one ``kind`` are drawn in common colours; the title may have mathematics.
    """

    kind: str
    values: np.ndarray
    title: str
    subtitle: str
    rows: Labels
    columns: Labels


def map_grids(of_models: Sequence[Sequence[Sequence[Map]]], own_colours: bool) -> list[Panel]:
    """For each of several models, its maps in rows and columns: all cells of one size, rows and columns aligned.

    The colours of a map go from its least to its largest value if they are its own; otherwise from 0 to the largest value
    that there is in the maps of its kind.
    """
    first = of_models[0]
    every = [shown for maps in of_models for row in maps for shown in row]
    largest = {kind: max(float(m.values.max()) for m in every if m.kind == kind) for kind in {m.kind for m in every}}
    widest = max(sum(shown.values.shape[1] for shown in row) for row in first)
    cell = min(max(_WIDTHS[0] / widest, min(_CELLS[0], _WIDTHS[1] / widest)), _CELLS[1])
    above = [max(shown.columns.depth(cell) for maps in of_models for shown in maps[row]) for row in range(len(first))]
    left = [max(row[column].rows.depth(cell) for maps in of_models for row in maps) for column in range(len(first[0]))]

    def panel(shown: Map, row: int, column: int) -> Panel:
        values = shown.values
        ends = (float(values.min()), float(values.max())) if own_colours else (0.0, largest[shown.kind])
        return map_panel(shown, ends, cell, left[column], above[row])

    return [
        grid([[panel(shown, row, column) for column, shown in enumerate(of_row)] for row, of_row in enumerate(maps)])
        for maps in of_models
    ]


def map_panel(shown: Map, ends: tuple[float, float], cell: float, left: float, above: float) -> Panel:
    """A map with cells of so many inches, colours between two values, and so many inches left and above for its labels."""
    titles = text_panel([shown.title], 11, math=True, color=_BLACK), text_panel([shown.subtitle], 8.5, color=_GREY)
    heading = stacked(titles, gap=0)
    top = heading.height + 0.08 + above
    height, width = cell * shown.values.shape[0], cell * shown.values.shape[1]

    def draw(figure: Figure, x: float, y: float) -> None:
        heading.draw(figure, x, y)
        axes = bare_axes(figure, x, y, panel.width, panel.height)
        colours: dict[str, Any] = {"cmap": COLOURS, "aspect": "auto", "interpolation": "none"}
        low, high = ends
        axes.imshow(shown.values, extent=(left, left + width, top + height, top), vmin=low, vmax=high, **colours)
        axes.add_patch(Rectangle((left, top), width, height, fill=False, linewidth=0.5, clip_on=False))
        _draw_labels(axes, shown.rows, cell, lambda along, away: (left - away, top + along), sideways=False)
        _draw_labels(axes, shown.columns, cell, lambda along, away: (left + along, top - away), sideways=True)
        bar = top + height + 0.09
        axes.imshow(np.linspace(0, 1, 64)[None], extent=(left + 0.4, left + 1.05, bar + 0.07, bar), **colours)
        write(axes, left + 0.36, bar + 0.04, f"{low:.2g}", 6.5, ha="right", va="center", color=_GREY)
        write(axes, left + 1.09, bar + 0.04, f"{high:.2g}", 6.5, ha="left", va="center", color=_GREY)

    panel = Panel(max(left + max(width, 1.5), heading.width), top + height + 0.22, draw)
    return panel


def _draw_labels(
    axes: Axes, labels: Labels, cell: float, place: Callable[[float, float], tuple[float, float]], *, sideways: bool
) -> None:
    """Names, then tiles farther away; ``place`` turns inches along the side and away from the map into the panel's."""
    points, name_width = points_of(cell), labels.name_width(cell)
    upright = sideways and name_width <= cell
    for number, name in enumerate(labels.names):
        x, y = place((number + 0.5) * cell, _SPACE)
        if not sideways:
            look = {"ha": "right", "va": "center_baseline"}
        elif upright:
            look = {"ha": "center", "va": "bottom"}
        else:
            look = {"ha": "center", "va": "bottom", "rotation": "vertical"}
        write(axes, x, y, name, points, color=_BLACK, **look)
    levels, size = tiling(cell)
    for number, tile in enumerate(labels.tiles):
        away = name_width + 2 * _SPACE + (number % levels + 0.5) * (size + _SPACE)
        ends = place((number + 0.5) * cell, name_width + 2 * _SPACE), place((number + 0.5) * cell, away)
        axes.plot(*zip(*ends, strict=True), color=_FAINT, linewidth=0.4, zorder=-1)
        x, y = ends[1]
        axes.imshow(tile, extent=(x - size / 2, x + size / 2, y + size / 2, y - size / 2), aspect="auto")
