"""Scenes: items (shape, colour, size) at random places, twins in which two of them are exchanged, and their pictures.

Boxes are (x1, y1, x2, y2) in pixels, y pointing down.
"""

from __future__ import annotations

import colorsys
import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

WIDTH, HEIGHT = 400, 300
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond")
RING_HOLE = 0.55  # radius of the hole divided by that of the ring
SUPERSAMPLING = 3
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 36, 42),
    "orange": (246, 138, 22),
    "yellow": (250, 218, 44),
    "green": (38, 146, 62),
    "blue": (36, 84, 204),
    "purple": (124, 48, 160),
    "pink": (250, 122, 184),
    "brown": (112, 66, 30),
    "black": (26, 26, 30),
    "white": (248, 248, 244),
}
# Half of an item's longer side in pixels. The ranges lie far apart, so that "small" and "large" mean the same in every picture.
SIZES: dict[str, tuple[float, float]] = {"small": (19.0, 25.0), "large": (40.0, 50.0)}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
GAP = 12.0  # minimum between boxes, so that a slightly wrong box still shows background around its item
MARGIN = 10.0  # minimum to the edge of the picture

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Item:
    """One drawn shape; ``radius`` is half the longer side of its box in pixels, ``angle`` is in radians."""

    shape: str
    colour: str
    size: str
    centre: tuple[float, float]
    radius: float
    angle: float

    @property
    def box(self) -> Box:
        """The smallest box around the outline."""
        half_width, half_height = extent(self.shape, self.angle)
        x, y = self.centre
        dx, dy = half_width * self.radius, half_height * self.radius
        return x - dx, y - dy, x + dx, y + dy


@dataclass(frozen=True)
class Scene:
    """The items of one picture. No two share both colour and shape, so that "the red star" is always one item.

    ``swap`` is (first, "left", second) if item ``first`` is left of item ``second`` here, and the reverse in the twin.
    """

    items: tuple[Item, ...]
    swap: tuple[int, str, int] | None = None


def relations(first: Box, second: Box) -> list[str]:
    """Return where all of ``first`` lies from all of ``second``, with a visible gap.

    That is one or two of left, right, above and below, or none if the boxes overlap or almost do.
    """
    holds = {
        "left": first[2] + GAP <= second[0],
        "right": second[2] + GAP <= first[0],
        "above": first[3] + GAP <= second[1],
        "below": second[3] + GAP <= first[1],
    }
    return [relation for relation, true in holds.items() if true]


def draw_scene(rng: np.random.Generator, items: tuple[int, int]) -> Scene:
    """Draw a random scene with a number of items between the minimum and maximum in ``items``."""
    while True:
        kinds = rng.choice(len(SHAPES) * len(COLOURS), size=rng.integers(items[0], items[1] + 1), replace=False).tolist()
        drawn = [_item(rng, SHAPES[kind % len(SHAPES)], list(COLOURS)[kind // len(SHAPES)]) for kind in kinds]
        placed: tuple[Item, ...] = ()
        for item in drawn:
            for _ in range(60):
                candidate = dataclasses.replace(item, centre=_centre(rng, item))
                if fits((*placed, candidate)):
                    placed += (candidate,)
                    break
        if len(placed) == len(drawn):
            return Scene(placed)


def draw_twins(rng: np.random.Generator, items: tuple[int, int]) -> tuple[Scene, Scene]:
    """Draw two scenes with the same items, two of which have exchanged their positions."""
    while True:
        drawn = draw_scene(rng, items).items
        for first, second in rng.permutation(list(combinations(range(len(drawn)), 2))).tolist():
            twin = list(drawn)
            twin[first] = dataclasses.replace(drawn[first], centre=drawn[second].centre)
            twin[second] = dataclasses.replace(drawn[second], centre=drawn[first].centre)
            after = relations(twin[second].box, twin[first].box)
            shared = [relation for relation in relations(drawn[first].box, drawn[second].box) if relation in after]
            if shared and fits(tuple(twin)):
                relation = shared[rng.integers(len(shared))]
                return Scene(drawn, (first, relation, second)), Scene(tuple(twin), (second, relation, first))


def fits(items: tuple[Item, ...]) -> bool:
    """Whether all items lie inside the picture, with margins and gaps."""
    boxes = [item.box for item in items]
    inside = all(x1 >= MARGIN and y1 >= MARGIN and x2 <= WIDTH - MARGIN and y2 <= HEIGHT - MARGIN for x1, y1, x2, y2 in boxes)
    return inside and all(relations(a, b) for a, b in combinations(boxes, 2))


def _item(rng: np.random.Generator, shape: str, colour: str) -> Item:
    size = list(SIZES)[rng.integers(len(SIZES))]
    angle = rng.uniform(-0.14, 0.14)  # small, because a square turned by 45 degrees is a diamond
    return Item(shape, colour, size, (0.0, 0.0), float(rng.uniform(*SIZES[size])), float(angle))


def _centre(rng: np.random.Generator, item: Item) -> tuple[float, float]:
    reach = MARGIN + item.radius
    return float(rng.uniform(reach, WIDTH - reach)), float(rng.uniform(reach, HEIGHT - reach))


def draw_picture(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draw the scene as an RGB picture of ``WIDTH`` x ``HEIGHT`` pixels."""
    masks = [_mask(item) for item in scene.items]
    shadow = Image.new("L", (WIDTH, HEIGHT))
    for mask, corner in masks:
        shadow.paste(mask, (corner[0] + 3, corner[1] + 4), mask)
    soft = np.asarray(shadow.filter(ImageFilter.BoxBlur(3)), dtype=np.float32)
    canvas = _background(rng) * (1 - soft * np.float32(0.2 / 255))[..., None]
    picture = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    for item, (mask, corner) in zip(scene.items, masks, strict=True):
        picture.paste(_paint(item, mask.size, rng), corner, mask)
    return picture


def _mask(item: Item) -> tuple[Image.Image, tuple[int, int]]:
    """Return the coverage of the item, and the position of the mask's top left pixel in the picture."""
    x1, y1, x2, y2 = item.box
    left, top = int(np.floor(x1)), int(np.floor(y1))
    width, height = int(np.ceil(x2)) - left, int(np.ceil(y2)) - top
    x, y = item.centre
    mask = silhouette(item.shape, item.angle, (width, height), (x - left, y - top), (item.radius, item.radius))
    return mask, (left, top)


def _paint(item: Item, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Return the item's colour, varied a little from picture to picture and lighter at the top."""
    colour = np.array(COLOURS[item.colour]) + rng.uniform(-8, 8, size=3)
    light = np.linspace(1.07, 0.93, size[1])[:, None, None]
    pixels = np.broadcast_to(colour * light, (size[1], size[0], 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _background(rng: np.random.Generator) -> NDArray[np.float32]:
    """Return a muted mid-tone with one of five textures, from which every item colour stands out: (height, width, 3)."""
    base = 255 * np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.06, 0.2), rng.uniform(0.62, 0.74)))
    # Half the resolution is enough for a soft texture, and four times as fast.
    x, y = np.meshgrid(np.arange(0, WIDTH, 2, dtype=np.float32), np.arange(0, HEIGHT, 2, dtype=np.float32))
    slope = rng.uniform(-1, 1, size=2).astype(np.float32)
    relief = 5 * (slope[0] * (x / WIDTH - 0.5) + slope[1] * (y / HEIGHT - 0.5))
    angle, frequency = rng.uniform(0, np.pi), 2 * np.pi / rng.uniform(14, 34)
    cos, sin = np.float32(np.cos(angle) * frequency), np.float32(np.sin(angle) * frequency)
    along, across = x * cos + y * sin, y * cos - x * sin
    kind = rng.integers(5)
    if kind == 0:  # ribbed cloth
        relief += 6 * np.sin(along)
    elif kind == 1:  # weave
        relief += 4 * (np.sin(along) + np.sin(across))
    elif kind == 2:  # dots
        relief += 9 * np.clip(3 * np.cos(along) * np.cos(across) - 1.5, 0, 1)
    elif kind == 3:  # checks
        relief += 5 * np.tanh(4 * np.sin(along) * np.sin(across))
    relief += _clouds(rng, 40, 5 if kind == 4 else 2) + _clouds(rng, 6, 4 if kind == 4 else 2)
    return base.astype(np.float32) + _resized(relief, WIDTH, HEIGHT)[..., None]


def _clouds(rng: np.random.Generator, grain: int, strength: float) -> NDArray[np.float32]:
    """Return smooth noise at half resolution with blotches about ``grain`` pixels wide in the picture."""
    coarse = rng.uniform(-strength, strength, size=(HEIGHT // grain + 2, WIDTH // grain + 2)).astype(np.float32)
    return _resized(coarse, WIDTH // 2, HEIGHT // 2)


def _resized(values: NDArray[np.float32], width: int, height: int) -> NDArray[np.float32]:
    return np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC))


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
