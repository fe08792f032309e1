"""The regions of a picture: cropped to one tile each, and drawn as numbered boxes with the words that attend to them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle
from PIL import Image as Picture
from PIL import ImageOps, UnidentifiedImageError

from utils.errors import InputError
from utils.files import reading

TILE = 96  # pixels per side
ASPECT = 4 / 3  # of the frame that stands in for a missing picture, whose shape normalised boxes do not tell
LEGEND_LINES = 26  # per column
_COLOURS = [colormaps["tab20"](2 * (number % 10) + number // 10 % 2) for number in range(20)]


def read_picture(path: str | Path) -> Picture.Image:
    """Read a picture as RGB, rotated as its EXIF data says, as detectors do. Raises ``InputError`` if it cannot be read."""
    with reading(path, "a picture") as file:
        try:
            with Picture.open(file) as picture:
                return ImageOps.exif_transpose(picture).convert("RGB")
        except Exception as error:  # damaged pictures make the decoders raise nearly anything
            reason = "not a picture" if isinstance(error, UnidentifiedImageError) else f"cannot be read ({error})"
            raise InputError(f"{path}: {reason}, expected a picture such as a JPEG or PNG file") from error


def tiles_of(picture: Picture.Image, boxes: np.ndarray) -> list[np.ndarray]:
    """Crop normalised boxes (K, 4 or more) from a picture: K arrays (TILE, TILE, 4), uint8, transparent around the crop."""
    tiles = []
    for x1, y1, x2, y2 in (boxes[:, :4].clip(0, 1) * np.tile(picture.size, 2)).tolist():
        left, top = min(int(x1), picture.width - 1), min(int(y1), picture.height - 1)
        crop = picture.crop((left, top, max(round(x2), left + 1), max(round(y2), top + 1)))
        scale = (TILE - 6) / max(crop.size)  # leaves a gap between neighbouring tiles
        crop = crop.resize((max(round(crop.width * scale), 1), max(round(crop.height * scale), 1)))
        tile = Picture.new("RGBA", (TILE, TILE))
        tile.paste(crop, ((TILE - crop.width) // 2, (TILE - crop.height) // 2))
        tiles.append(np.asarray(tile))
    return tiles


def draw_boxes(axes: Axes, picture: Picture.Image | None, boxes: np.ndarray, words_of: Mapping[int, Sequence[str]]) -> None:
    """Draw boxes (K, 7) on the picture, or in an empty frame, and beside it the words of each region that has some."""
    axes.set(xlim=(0, 1), ylim=(1, 0), anchor="NW", xticks=(), yticks=(), facecolor="#f4f4f4")
    axes.spines[:].set_visible(False)
    if picture:
        small = picture.copy()
        small.thumbnail((1200, 1200))
        axes.imshow(np.asarray(small), extent=(0, 1, 1, 0))
    axes.set_aspect(picture.height / picture.width if picture else 1 / ASPECT)
    colours = {number: _COLOURS[number % len(_COLOURS)] for number in sorted(words_of)}
    # Boxes with words above the others, small ones above large ones.
    for number in sorted(range(len(boxes)), key=lambda number: (number in words_of, -boxes[number, 4] * boxes[number, 5])):
        x1, y1, x2, y2 = boxes[number, :4].clip(0, 1).tolist()
        colour = colours.get(number, (1.0, 1.0, 1.0, 0.75))
        width, size = (2.6, 7.5) if number in words_of else (1.4, 5)
        for edge, line in (("white", width), (colour if number in words_of else "#707070", width - 0.8)):
            axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=edge, linewidth=line))
        ink = "white" if sum(colour[:3]) < 1.9 else "black"
        tag = {"boxstyle": "square,pad=0.15", "facecolor": colour, "edgecolor": "none"}
        axes.text(x1, y1, str(number), fontsize=size, color=ink, ha="left", va="top", bbox=tag)
    handles = [
        Patch(color=colour, label=textwrap.fill(f"{number}  {', '.join(words_of[number])}", 32, subsequent_indent="      "))
        for number, colour in colours.items()
    ]
    lines = sum(1 + str(handle.get_label()).count("\n") for handle in handles)
    where = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0}
    axes.legend(handles=handles, ncols=math.ceil(lines / LEGEND_LINES), fontsize=9, handlelength=1.2, **where)
