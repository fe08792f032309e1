"""Region features of a picture: a stand-in for an object detector, computed from pixels by fixed rules, with nothing learned.

Like a detector it knows the colours and shapes by name: it compares what it sees with one template of each. It also sees
what a template leaves out: the exact colour, the silhouette, the surroundings.

Legend: K boxes, S = ``PATCH`` pixels, D = length of the hand-made descriptor, all arithmetic in float64.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from examples.scenes.layout import COLOURS, HEIGHT, WIDTH, Scene
from examples.scenes.shapes import SHAPES, extent, silhouette

Array = NDArray[np.float64]

FEATURE_SIZE = 2048
PATCH = 40
CONTEXT = 0.08  # how far beyond the box the descriptor looks, as a share of the box's sides
SIZE_LEVELS = np.array([22.5, 45.0, 90.0, 180.0])  # pixels, one octave apart
TEMPLATE_ANGLES = (-0.1, 0.0, 0.1)  # radians
PROJECTION_SEED = 20210
THRESHOLD = 0.6  # of the rectifier; leaves about a third of the features above zero, as a detector's are


def propose_boxes(scene: Scene, rng: np.random.Generator) -> tuple[Array, Array]:
    """What a detector would return: every item, a little off, then parts of items and patches of background.

    Returns boxes (K, 4) in pixels and confidences (K,), falling; 10 <= K <= 14.
    """
    truth = np.array([item.box for item in scene.items])  # (items, 4)
    sides = np.tile(truth[:, 2:] - truth[:, :2], 2)
    found = truth + sides * rng.uniform(-0.04, 0.04, size=truth.shape)
    parts = _parts(truth[rng.permutation(len(truth))[: rng.integers(1, 3)]], rng)
    wanted = int(rng.integers(10, 15)) - len(found) - len(parts)
    boxes = np.concatenate([found, parts, *(_patch(truth, rng) for _ in range(wanted))])
    conf = np.concatenate([rng.uniform(0.7, 0.99, len(found)), rng.uniform(0.15, 0.5, len(parts) + wanted)])
    order = np.argsort(-conf, kind="stable")
    return boxes[order].clip(0, [WIDTH, HEIGHT, WIDTH, HEIGHT]), conf[order]


def region_features(picture: Image.Image, boxes: Array) -> NDArray[np.float16]:
    """(K, 2048), non-negative: the descriptor through one fixed random layer with a rectifier."""
    described = descriptor(picture, boxes)  # (K, D)
    return np.maximum(described @ _random_layer(described.shape[1]) - THRESHOLD, 0).astype(np.float16)


def normalised(boxes: Array) -> NDArray[np.float16]:
    """(K, 6): x1, y1, x2, y2, width, height as shares of the picture's."""
    corners = boxes / [WIDTH, HEIGHT, WIDTH, HEIGHT]
    return np.concatenate([corners, corners[:, 2:] - corners[:, :2]], axis=1).astype(np.float16)


def descriptor(picture: Image.Image, boxes: Array) -> Array:
    """(K, D): colour, shape and size of what stands out from the box's border, and the border's colour."""
    patches = _patches(picture, boxes)  # (K, S, S, 3), 0..1
    surroundings = np.median(_border(patches), axis=1)  # (K, 3)
    distance = np.linalg.norm(patches - surroundings[:, None, None], axis=-1)
    mask = np.clip((distance - 0.12) / 0.08, 0, 1)  # (K, S, S); textures stay below 0.12, items above 0.2
    # faint where there is little to see, and where what there is runs out of the box
    seen = np.clip(mask.mean(axis=(1, 2)) / 0.15, 0, 1)
    cut = np.clip(4 * _border(mask[..., None]).mean(axis=(1, 2)), 0, 1)
    presence = (seen * (1 - cut))[:, None]
    groups = [
        presence * _colour(patches, mask),
        presence * _shape(mask),
        presence * _size(boxes),
        1 - presence,
        surroundings - 0.6,
    ]
    return np.concatenate(groups, axis=1)


def _border(patches: Array) -> Array:
    """The outermost two rows and columns of (K, S, S, C), as (K, P, C)."""
    strips = (patches[:, :2], patches[:, -2:], patches[:, :, :2], patches[:, :, -2:])
    return np.concatenate([strip.reshape(len(patches), -1, patches.shape[-1]) for strip in strips], axis=1)


def _patches(picture: Image.Image, boxes: Array) -> Array:
    """Each box with some context around it, resampled to S x S."""
    pixels = []
    for x1, y1, x2, y2 in boxes.tolist():
        dx, dy = CONTEXT * (x2 - x1), CONTEXT * (y2 - y1)
        window = (max(x1 - dx, 0), max(y1 - dy, 0), min(x2 + dx, WIDTH), min(y2 + dy, HEIGHT))
        pixels.append(np.asarray(picture.resize((PATCH, PATCH), Image.Resampling.BOX, box=window)))
    return np.stack(pixels) / 255.0


def _colour(patches: Array, mask: Array) -> Array:
    """(K, 10 + 3): how near the masked pixels' mean is to each named colour, and that mean."""
    weight = np.where(mask > 0.9, 1.0, 0.0)  # leaves out the blended rim
    mean = np.einsum("kij,kijc->kc", weight, patches) / (weight.sum(axis=(1, 2))[:, None] + 1.0)
    distance = np.linalg.norm(mean[:, None] - np.array(list(COLOURS.values())) / 255, axis=-1)
    return np.concatenate([_softmax(-0.5 * (distance / 0.1) ** 2), 0.5 * (mean - 0.5)], axis=1)


def _shape(mask: Array) -> Array:
    """(K, 8 + 25): how near the mask is to the template of each shape, and the mask itself at 5 x 5."""
    flat = mask.reshape(len(mask), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True) + 1.0
    coarse = mask.reshape(len(mask), 5, PATCH // 5, 5, PATCH // 5).mean(axis=(2, 4)).reshape(len(mask), -1)
    likeness = (flat @ _templates().T).reshape(len(mask), len(SHAPES), len(TEMPLATE_ANGLES)).max(axis=-1)
    return np.concatenate([_softmax(30 * likeness), 0.2 * (coarse - 0.5)], axis=1)


def _size(boxes: Array) -> Array:
    """(K, 4): how near the box's longer side is to each size level."""
    longer = (boxes[:, 2:] - boxes[:, :2]).max(axis=1, keepdims=True)
    return np.exp(-0.5 * (np.log2(longer / SIZE_LEVELS) / 0.4) ** 2)


@lru_cache(maxsize=1)
def _templates() -> Array:
    """(shapes * angles, S * S): each shape, filling a box seen with the usual context; mean 0, length 1."""
    drawn = []
    for shape, angle in product(SHAPES, TEMPLATE_ANGLES):
        width, height = (PATCH / 2 / (1 + 2 * CONTEXT) / half for half in extent(shape, angle))
        mask = silhouette(shape, angle, (PATCH, PATCH), (PATCH / 2, PATCH / 2), (width, height))
        drawn.append(np.asarray(mask, dtype=np.float64).ravel())
    flat = np.stack(drawn) - np.mean(drawn, axis=1, keepdims=True)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def _softmax(logits: Array) -> Array:
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def _parts(boxes: Array, rng: np.random.Generator) -> Array:
    """Boxes that show one side or corner of an item and as much of what lies beside it."""
    sides = boxes[:, 2:] - boxes[:, :2]
    shift = sides * rng.choice([-1, 1], size=sides.shape) * rng.uniform(0.35, 0.6, size=sides.shape)
    shift *= rng.permuted(np.tile([1.0, 0.3], (len(boxes), 1)), axis=1)
    return boxes + np.tile(shift, 2)


def _patch(items: Array, rng: np.random.Generator) -> Array:
    """(1, 4): of twenty random boxes the one that covers the least of any item."""
    sides = rng.uniform(36, 120, size=(20, 2))
    corner = rng.uniform(0, 1, size=(20, 2)) * ([WIDTH, HEIGHT] - sides)
    boxes = np.concatenate([corner, corner + sides], axis=1)
    low = np.maximum(boxes[:, None, :2], items[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], items[None, :, 2:])
    covered = np.prod(np.clip(high - low, 0, None), axis=-1).sum(axis=1) / np.prod(sides, axis=1)
    return boxes[[np.argmin(covered)]]


@lru_cache(maxsize=1)
def _random_layer(size: int) -> Array:
    """Weights (D, 2048), the same in every run whatever the dataset's seed."""
    return np.random.default_rng(PROJECTION_SEED).standard_normal((size, FEATURE_SIZE))
