"""Place the items of a scene (shape, colour, size) at random, and make its twin, in which two of them are exchanged.

Boxes are (x1, y1, x2, y2) in pixels, y pointing down.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from examples.scenes.shapes import SHAPES, extent

WIDTH, HEIGHT = 400, 300
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
