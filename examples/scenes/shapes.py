"""The shapes as polygons, and their masks."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond")
RING_HOLE = 0.55  # radius of the hole divided by that of the ring
SUPERSAMPLING = 3


def outline(shape: str, angle: float) -> NDArray[np.float64]:
    """Return the corners (points, 2), turned by ``angle`` radians: box centred on (0, 0), longer side from -1 to 1."""
    points = _upright(shape)
    cos, sin = np.cos(angle), np.sin(angle)
    points = points @ np.array([[cos, sin], [-sin, cos]])
    low, high = points.min(axis=0), points.max(axis=0)
    return (points - (low + high) / 2) / ((high - low).max() / 2)


def silhouette(
    shape: str, angle: float, size: tuple[int, int], centre: tuple[float, float], scale: tuple[float, float]
) -> Image.Image:
    """Return an anti-aliased mask of ``size`` (width, height): the outline around ``centre`` at ``scale`` pixels per unit."""
    canvas = Image.new("L", (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING))
    pen = ImageDraw.Draw(canvas)
    points = outline(shape, angle) * scale
    for share, ink in ((1.0, 255), (RING_HOLE, 0)) if shape == "ring" else ((1.0, 255),):
        corners = (points * share + centre) * SUPERSAMPLING - 0.5  # Pillow counts from pixel centres
        pen.polygon([(x, y) for x, y in corners], fill=ink)
    return canvas.resize(size, Image.Resampling.BOX)


@lru_cache(maxsize=4096)
def extent(shape: str, angle: float) -> tuple[float, float]:
    """Return half the width and half the height of the outline; the larger of the two is 1."""
    half_width, half_height = outline(shape, angle).max(axis=0).tolist()
    return half_width, half_height


def _upright(shape: str) -> NDArray[np.float64]:
    turn = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    if shape in ("circle", "ring"):
        return np.stack([np.cos(turn), np.sin(turn)], axis=1)
    if shape == "square":
        return np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    if shape == "diamond":
        return np.array([[0.0, -1.0], [0.72, 0.0], [0.0, 1.0], [-0.72, 0.0]])
    if shape == "triangle":
        return np.array([[0.0, -1.0], [1.0, 0.75], [-1.0, 0.75]])
    if shape == "star":
        ray = np.arange(10) * np.pi / 5
        reach = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
        return np.stack([np.sin(ray) * reach, -np.cos(ray) * reach], axis=1)
    if shape == "cross":
        arm = 0.34
        quarter = np.array([[arm, -1.0], [arm, -arm], [1.0, -arm]])
        quarter_turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
        return np.concatenate([quarter @ np.linalg.matrix_power(quarter_turn, turns) for turns in range(4)])
    assert shape == "heart", shape
    x = 16 * np.sin(turn) ** 3
    y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
    return np.stack([x, -y], axis=1) / 17
