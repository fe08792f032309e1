"""The attention of a (text, image) pair as a figure: its four blocks, how well they align, its regions (docs/evaluation.md).

Shapes: L words, K regions. Rows of a block attend to its columns.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.transforms import BboxTransformTo, ScaledTranslation, Transform, blended_transform_factory
from PIL import Image as Picture

from data.text_db import Text
from data.tokenizer import joined
from evaluation.alignment import alignment_table
from evaluation.plots.regions import ASPECT, TILE, draw_boxes, tiles_of
from evaluation.plots.style import printable, shorten, style
from evaluation.retriever import Attention
from evaluation.tables import fixed
from model.iais import MODALITIES, REGULARISERS, Modality, PairAttention, between_nearest, distributed_target, nearest

NAMES: dict[Modality, str] = {"L": "words", "V": "regions"}
MAX_WORD = 18  # letters
COLOURS = "BuPu"
_CELL = 0.1, 0.32  # inches, least and most
_MAPS_WIDTH = 9.0, 24.0  # inches of the cells of neighbouring maps: aimed at, and at most
_MIN_TILE = 0.26  # inches
_TITLE_WIDTH = 3.8  # inches
_FAINT = "#b0b0b0"
_GAP = 0.3  # inches between models
_LETTER = 0.62  # width of a letter, in font sizes


def caption_of(text: str | Text, attention: Attention) -> str:
    """Return a text as its author wrote it, or its word pieces joined if the database does not have that."""
    return text if isinstance(text, str) else text.caption or joined(attention.pieces)


class Labels(NamedTuple):
    """What stands along a side of a map: words or region numbers, and tiles (TILE, TILE, 4) of the regions, if any."""

    names: Sequence[str]
    tiles: Sequence[np.ndarray] = ()

    def depth(self, cell: float) -> float:
        """Estimate the inches that names and tiles take beside cells of ``cell`` inches."""
        names = max(map(len, self.names)) * _LETTER * _font_size(cell) / 72
        return names + (_tile_rows(cell) ** 2 * cell if self.tiles else 0)


class Map(NamedTuple):
    """A heat map (rows, columns) with its labels. Maps of one ``kind`` share a colour scale. The title may use mathtext."""

    kind: str
    values: np.ndarray
    title: str
    rows: Labels
    columns: Labels


class Panel(NamedTuple):
    """A part of the figure that shows all models side by side: its size in inches for one model, and what draws it."""

    width: float
    height: float
    draw: Callable[[SubFigure], None]


def pair_figure(
    attentions: Mapping[str, Attention],
    *,
    text: str,
    picture: Picture.Image | None = None,
    layer: int = -1,
    head: int | None = None,
    views: Sequence[str] = ("boxes", "linguistic", "blocks"),
    own_colours: bool = False,
) -> Figure:
    """Draw one pair as several models (display name → attention) see it, side by side, under the caption ``text``.

    ``layer``, ``head`` and ``InputError`` as for ``Attention.pair``; ``views`` of ``VIEWS``, from top to bottom. Colours range
    from 0 to the largest value in all models' maps of a kind or, with ``own_colours``, from least to largest of each map.
    """
    first = next(iter(attentions.values()))
    boxes = first.image.boxes
    words = Labels([shorten(printable(piece), MAX_WORD) for piece in first.pieces])
    regions = Labels([str(number) for number in range(len(boxes))], tiles_of(picture, boxes) if picture else ())
    pairs = [attention.pair(layer, head) for attention in attentions.values()]
    panels = [
        _boxes_panel(pairs, words, picture, boxes)
        if view == "boxes"
        else _maps_panel([MAPS[view](pair, {"L": words, "V": regions}) for pair in pairs], own_colours)
        for view in views
    ]
    width = len(pairs) * max(panel.width for panel in panels)
    caption = textwrap.fill(printable(" ".join(text.split())), int(width * 72 / 13 / _LETTER)) or " "
    caption_height = 0.35 + 0.25 * (1 + caption.count("\n"))
    heads = "heads averaged" if head is None else f"head {head}"
    heights = [0.8 + 0.15 * len(REGULARISERS), *(panel.height for panel in panels)]
    with style():
        figure = Figure(figsize=(width, sum(heights) + caption_height), layout="constrained")
        figure.suptitle(caption, fontsize=13, x=0.05 / width, ha="left")
        heading, *parts = figure.subfigures(len(heights), 1, height_ratios=heights)
        for number, ((name, attention), pair) in enumerate(zip(attentions.items(), pairs, strict=True)):
            x = number / len(pairs) + 0.05 / width
            source = f"layer {max(attention.maps) if layer == -1 else layer}, {heads}"
            heading.text(x, 1 - 0.06 / heights[0], shorten(printable(name), 80), fontsize=11, weight="bold", va="top")
            below = f"score {fixed(attention.score, 3)}; attention of {source}"
            heading.text(x, 1 - 0.33 / heights[0], below, fontsize=9, va="top")
            losses = {key: {side: float(loss(pair, side)) for side in MODALITIES} for key, loss in REGULARISERS.items()}
            heading.text(x, 1 - 0.55 / heights[0], alignment_table(losses), fontsize=8, va="top", family="monospace")
        for part, panel in zip(parts, panels, strict=True):
            panel.draw(part)
    return figure


def _boxes_panel(pairs: Sequence[PairAttention], words: Labels, picture: Picture.Image | None, boxes: np.ndarray) -> Panel:
    """The boxes with the words of which each is the nearest region."""
    aspect = picture.width / picture.height if picture else ASPECT
    size = min(max(5.0, 0.08 * len(boxes)), 8.0)
    width, height = min(size, 0.8 * size * aspect), min(size / aspect, 0.8 * size)

    def draw(figure: SubFigure) -> None:
        for axes, pair in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
            words_of: dict[int, list[str]] = {}
            for word, region in zip(words.names, nearest(pair.head_mean()).tolist(), strict=True):
                words_of.setdefault(region, []).append(word)
            draw_boxes(axes, picture, boxes, words_of)

    return Panel(width + 2.8, height, draw)


def _maps_panel(by_model: Sequence[Sequence[Sequence[Map]]], own_colours: bool) -> Panel:
    """For each model its maps in rows and columns, all cells of one size."""
    first = by_model[0]
    everything = [heat for maps in by_model for row in maps for heat in row]
    largest: dict[str, float] = {}
    for heat in everything:
        largest[heat.kind] = max(largest.get(heat.kind, 0.0), float(heat.values.max()))
    columns, rows = [heat.values.shape[1] for heat in first[0]], [row[0].values.shape[0] for row in first]
    cell = min(max(_MAPS_WIDTH[0] / sum(columns), min(_CELL[0], _MAPS_WIDTH[1] / sum(columns))), _CELL[1])
    left = max(heat.rows.depth(cell) for heat in everything)
    above = [max(heat.columns.depth(cell) for maps in by_model for heat in maps[row]) for row in range(len(rows))]
    widths = [max(cell * count, _TITLE_WIDTH - left) for count in columns]

    def draw(figure: SubFigure) -> None:
        ratios = [*widths, _GAP] * len(by_model)
        grid = figure.subplots(len(rows), len(ratios), width_ratios=ratios, height_ratios=rows, squeeze=False)
        for axes in grid[:, len(columns) :: len(columns) + 1].flat:
            axes.remove()  # leaves a gap between models
        for model, maps in enumerate(by_model):
            for row, of_row in enumerate(maps):
                for column, heat in enumerate(of_row):
                    values = heat.values
                    limits = (float(values.min()), float(values.max())) if own_colours else (0.0, largest[heat.kind])
                    _draw_map(figure, grid[row, model * (len(columns) + 1) + column], heat, limits, cell)

    return Panel(sum(widths) + (left + 0.2) * len(widths) + _GAP, cell * sum(rows) + sum(above) + 0.9 * len(rows), draw)


def _font_size(cell: float) -> float:
    return min(9.0, 0.7 * 72 * cell)


def _tile_rows(cell: float) -> int:
    """The number of rows in which tiles of neighbouring cells are staggered so that they are large enough."""
    return math.ceil(_MIN_TILE / cell)


def _draw_map(figure: SubFigure, axes: Axes, heat: Map, limits: tuple[float, float], cell: float) -> None:
    image = axes.imshow(heat.values, cmap=COLOURS, vmin=limits[0], vmax=limits[1], interpolation="none")
    axes.set(anchor="NW", xticks=(), yticks=())
    axes.spines[:].set_visible(True)
    bar_axes = axes.inset_axes((0, -0.15, 0.65, 0.08), transform=_inches_from(axes, 0, 0))
    bar = figure.colorbar(image, cax=bar_axes, orientation="horizontal")
    bar.set_ticks(limits, labels=[f"{limit:.2g}" for limit in limits], fontsize=6.5)
    bar.outline.set_linewidth(0)  # type: ignore[operator]
    bar.ax.tick_params(length=0)
    look = {"length": 0, "labelsize": _font_size(cell)}
    beside = _draw_tiles(axes, heat.rows.tiles, "y", cell) if heat.rows.tiles else axes
    beside.set_yticks(range(len(heat.rows.names)), heat.rows.names)
    beside.tick_params("y", **look)
    above = _draw_tiles(axes, heat.columns.tiles, "x", cell) if heat.columns.tiles else axes
    above.xaxis.tick_top()
    above.set_xticks(range(len(heat.columns.names)), heat.columns.names)
    above.tick_params("x", rotation=0 if max(map(len, heat.columns.names)) <= 2 else 90, **look)
    # A title would do, but measures all labels again for every drawing.
    above.xaxis.set_label_position("top")
    above.set_xlabel(heat.title, loc="left", labelpad=6, fontsize="medium", parse_math=True)


def _inches_from(axes: Axes, x: float, y: float) -> Transform:
    """From inches right of and above a corner of ``axes``; sizes relative to the axes would upset the layout engine."""
    return axes.figure.dpi_scale_trans + ScaledTranslation(x, y, BboxTransformTo(axes.bbox))


def _draw_tiles(axes: Axes, tiles: Sequence[np.ndarray], along: Literal["x", "y"], cell: float) -> Axes:
    """Draw tiles on new axes outside ``axes``, staggered in rows and joined to their cells by lines; return these axes."""
    count, rows = len(tiles), _tile_rows(cell)
    depth, step = rows * rows * cell, TILE // rows  # inches; pixels per cell
    turn = (1, 0, 2) if along == "x" else (0, 1, 2)
    canvas = np.zeros(((count + rows - 1) * step, rows, TILE, 4), np.uint8)
    for number, tile in enumerate(tiles):
        canvas[number * step :, rows - 1 - number % rows][: rows * step] = tile.transpose(turn)[: rows * step]
    pixels = canvas.reshape(len(canvas), rows * TILE, 4).transpose(turn)
    before, after = -rows / 2, count - 1 + rows / 2
    if along == "x":
        transform = blended_transform_factory(axes.transAxes, _inches_from(axes, 0, 1))
        strip = axes.inset_axes((0, 0, 1, depth), transform=transform, facecolor="none")
        strip.imshow(pixels, extent=(before, after, 0, rows), aspect="auto")
        strip.set(xlim=(-0.5, count - 0.5), xticks=(), yticks=())
        strip.vlines(range(count), 0, rows, color=_FAINT, linewidth=0.4, zorder=-1)
    else:
        transform = blended_transform_factory(_inches_from(axes, 0, 0), axes.transAxes)
        strip = axes.inset_axes((-depth, 0, depth, 1), transform=transform, facecolor="none")
        strip.imshow(pixels, extent=(rows, 0, after, before), aspect="auto")
        strip.set(ylim=(count - 0.5, -0.5), xticks=(), yticks=())
        strip.hlines(range(count), 0, rows, color=_FAINT, linewidth=0.4, zorder=-1)
    strip.spines[:].set_visible(False)
    return strip


def _block_maps(pair: PairAttention, labels: Mapping[Modality, Labels]) -> list[list[Map]]:
    """LL and LV above VL and VV."""
    return [[_block_map(pair, labels, rows, columns) for columns in MODALITIES] for rows in MODALITIES]


def _block_map(pair: PairAttention, labels: Mapping[Modality, Labels], rows: Modality, columns: Modality) -> Map:
    blocks = pair.seen_from(rows).head_mean()
    values = (blocks.intra if rows == columns else blocks.cross).exp().numpy()
    title = f"$A_{{{rows}{columns}}}$  {NAMES[rows]} attend to {NAMES[columns]}"
    return Map(rows + columns, values, title, labels[rows], labels[columns])


def _alignment_maps(pair: PairAttention, labels: Mapping[Modality, Labels], modality: Modality) -> list[list[Map]]:
    """What singular and distributed alignment (Ren et al. 2021, sections 3.1 and 3.2) compare.

    The modality's own attention; the other's between nearest tokens, before the softmax; and the other's via all its tokens.
    """
    other: Modality = "V" if modality == "L" else "L"
    mine, theirs = labels[modality], labels[other]
    blocks = pair.seen_from(modality).head_mean()
    stand_ins = nearest(blocks).tolist()
    names = [f"{name} {theirs.names[number]}" for name, number in zip(mine.names, stand_ins, strict=True)]
    by_nearest = Labels(names, mine.tiles or [theirs.tiles[number] for number in stand_ins if theirs.tiles])
    by_one = f"$A_{{{other}{other}}}[i^*, j^*]$  of the nearest {NAMES[other]}"
    by_all = f"$A_{{{modality}{other}}} A_{{{other}{modality}}}$  via all {NAMES[other]}"
    own = _block_map(pair, labels, modality, modality)
    by_singular = Map("singular", between_nearest(blocks).numpy(), by_one, by_nearest, Labels(names))
    return [[own, by_singular, Map(own.kind, distributed_target(blocks).numpy(), by_all, mine, mine)]]


MAPS: dict[str, Callable[[PairAttention, Mapping[Modality, Labels]], list[list[Map]]]] = {
    "linguistic": partial(_alignment_maps, modality="L"),
    "visual": partial(_alignment_maps, modality="V"),
    "blocks": _block_maps,
}
VIEWS = ("boxes", *MAPS)
