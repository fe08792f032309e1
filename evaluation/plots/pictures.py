"""The attention of a (text, image) pair as a figure: its four blocks, how far they align, its regions (docs/evaluation.md).

Shapes: L words, K regions. A block's rows attend to its columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image as Picture
from torch import Tensor

from evaluation.plots.drawing import Panel, grid, printable, sheet, shortened, stacked, style, text_panel, wrapped
from evaluation.plots.heatmap import Labels, Map, map_grids
from evaluation.plots.regions import boxes_panel, tiles_of
from evaluation.retriever import Attention
from model.iais import MODALITIES, Modality, PairAttention, between_nearest, distributed, distributed_target, nearest, singular

NAMES: dict[Modality, str] = {"L": "words", "V": "regions"}
LONGEST_WORD = 18  # letters


class PulledBack(NamedTuple):
    """The other modality's attention, seen by this one: both (L, L) for words, (K, K) for regions.

    Attributes:
        nearest: (L,), for each word the region that it attends to most, or mirrored.
        singular: A_VV between these regions, before the softmax with which the loss makes it a distribution.
        distributed: A_LV A_VL, by way of all regions.
    """

    nearest: Tensor
    singular: Tensor
    distributed: Tensor


def pulled_back(pair: PairAttention, modality: Modality) -> PulledBack:
    """What the two alignments (Ren et al. 2021, sections 3.1 and 3.2) compare with A_LL, or for ``"V"`` with A_VV."""
    blocks = pair.seen_from(modality).head_mean()
    return PulledBack(nearest(blocks), between_nearest(blocks), distributed_target(blocks))


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
    """Draw one pair as several models see it, such as those before and after IAIS: a column each.

    Args:
        attentions: of the same pair, by what to call each.
        text: the caption, to stand above.
        layer, head: as for ``Attention.pair``.
        views: of ``VIEWS``, from top to bottom.
        own_colours: those of each map go from its least value to its largest; otherwise they go from 0 and mean the same in
            the maps of all models.

    Raises:
        InputError: as ``Attention.pair``.
    """
    with style():
        first = next(iter(attentions.values()))
        words = Labels([shortened(printable(piece), LONGEST_WORD) for piece in first.pieces])
        boxes = first.image.boxes
        regions = Labels([str(number) for number in range(len(boxes))], tiles_of(picture, boxes) if picture else ())
        pairs = [attention.pair(layer, head) for attention in attentions.values()]
        heads = "heads averaged" if head is None else f"head {head}"
        rows = []
        for view in views:
            if view == "boxes":
                rows.append([_boxes(pair, words, picture, boxes) for pair in pairs])
            else:
                rows.append(map_grids([MAPS[view](pair, {"L": words, "V": regions}) for pair in pairs], own_colours))
        headings = [
            _heading(name, a.score, f"layer {max(a.maps) if layer == -1 else layer}, {heads}") for name, a in attentions.items()
        ]
        rows[0] = [stacked(heading_and_panel, gap=0.15) for heading_and_panel in zip(headings, rows[0], strict=True)]
        body = grid(rows, gap=0.45)
        caption = text_panel(wrapped(text, 13, max(body.width, 4.0)), 13)
        return sheet(stacked([caption, body], gap=0.25))


def _heading(name: str, score: float, of_what: str) -> Panel:
    lines = [
        text_panel([shortened(name, 80)], 11, weight="bold"),
        text_panel([f"score {score:.3f}; attention of {of_what}"], 9),
    ]
    return stacked(lines, gap=0)


def _boxes(pair: PairAttention, words: Labels, picture: Picture.Image | None, boxes: np.ndarray) -> Panel:
    """The boxes with the words of which each is the nearest region."""
    words_of: dict[int, list[str]] = {}
    for word, region in zip(words.names, pulled_back(pair, "L").nearest.tolist(), strict=True):
        words_of.setdefault(region, []).append(word)
    return boxes_panel(picture, boxes, words_of)


def _block_maps(pair: PairAttention, labels: Mapping[Modality, Labels]) -> list[list[Map]]:
    """LL and LV above VL and VV."""
    return [[_block_map(pair, labels, rows, columns) for columns in MODALITIES] for rows in MODALITIES]


def _block_map(pair: PairAttention, labels: Mapping[Modality, Labels], rows: Modality, columns: Modality) -> Map:
    subtitle = f"{NAMES[rows]} attend to {NAMES[columns]}"
    blocks = pair.seen_from(rows).head_mean()
    values = (blocks.intra if rows == columns else blocks.cross).exp().numpy()
    return Map(rows + columns, values, f"$A_{{{rows}{columns}}}$", subtitle, labels[rows], labels[columns])


def _alignment_maps(pair: PairAttention, labels: Mapping[Modality, Labels], modality: Modality) -> list[list[Map]]:
    """The modality's own attention, and the other's pulled back in both ways, with the loss that compares them."""
    other: Modality = "V" if modality == "L" else "L"
    mine, theirs = labels[modality], labels[other]
    back = pulled_back(pair, modality)
    stand_ins = back.nearest.tolist()
    names = [f"{name} {theirs.names[number]}" for name, number in zip(mine.names, stand_ins, strict=True)]
    by_nearest = Labels(names, mine.tiles or [theirs.tiles[number] for number in stand_ins if theirs.tiles])
    cross, across = f"{modality}{other}", f"{other}{modality}"
    by_one = f"by each one's nearest, distance {float(singular(pair, modality)):.4f}"
    by_all = f"by all {NAMES[other]}, distance {float(distributed(pair, modality)):.4f}"
    return [
        [
            _block_map(pair, labels, modality, modality),
            Map("singular", back.singular.numpy(), f"$A_{{{other}{other}}}[i^*, j^*]$", by_one, by_nearest, Labels(names)),
            Map(2 * modality, back.distributed.numpy(), f"$A_{{{cross}}} A_{{{across}}}$", by_all, mine, mine),
        ]
    ]


MAPS: dict[str, Callable[[PairAttention, Mapping[Modality, Labels]], list[list[Map]]]] = {
    "linguistic": partial(_alignment_maps, modality="L"),
    "visual": partial(_alignment_maps, modality="V"),
    "blocks": _block_maps,
}
VIEWS = ("boxes", *MAPS)
