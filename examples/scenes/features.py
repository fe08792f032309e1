"""Region features of a picture from its pixels by fixed rules: a stand-in for an object detector, with nothing learned.

Like a detector it knows the colours and shapes by name, by comparison with a template of each. It also keeps what a template
leaves out: the exact colour, the silhouette, the surroundings.

Shapes: K boxes, S = ``PATCH`` pixels, D length of the descriptor. All arithmetic is in float64.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from examples.scenes.scene import COLOURS, HEIGHT, SHAPES, WIDTH, Scene, extent, silhouette

Array = NDArray[np.float64]

FEATURE_SIZE = 2048
PATCH = 40
CONTEXT = 0.08  # margin around the box that the descriptor includes, as a share of the box's sides
SIZE_LEVELS = np.array([22.5, 45.0, 90.0, 180.0])  # pixels, one octave apart
TEMPLATE_ANGLES = (-0.1, 0.0, 0.1)  # radians
PROJECTION_SEED = 20210
THRESHOLD = 0.6  # of the rectifier; leaves about a third of the features above zero, as in a detector


def propose_boxes(scene: Scene, rng: np.random.Generator) -> tuple[Array, Array]:
    """Propose boxes as a detector would: every item, a little off, then parts of items and patches of background.

    Return boxes (K, 4) in pixels and confidences (K,) in descending order, 10 <= K <= 14.
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
    """Pass the descriptor through one fixed random layer with a rectifier: (K, 2048), non-negative."""
    described = descriptor(picture, boxes)  # (K, D)
    return np.maximum(described @ _random_layer(described.shape[1]) - THRESHOLD, 0).astype(np.float16)


def normalised(boxes: Array) -> NDArray[np.float16]:
    """Return x1, y1, x2, y2, width and height as shares of the picture's width and height: (K, 6)."""
    corners = boxes / [WIDTH, HEIGHT, WIDTH, HEIGHT]
    return np.concatenate([corners, corners[:, 2:] - corners[:, :2]], axis=1).astype(np.float16)


def descriptor(picture: Image.Image, boxes: Array) -> Array:
    """Describe colour, shape and size of what stands out from the box's border, and the border's colour: (K, D)."""
    patches = _patches(picture, boxes)  # (K, S, S, 3), 0..1
    surroundings = np.median(_border(patches), axis=1)  # (K, 3)
    distance = np.linalg.norm(patches - surroundings[:, None, None], axis=-1)
    mask = np.clip((distance - 0.12) / 0.08, 0, 1)  # (K, S, S); textures stay below 0.12, items above 0.2
    # Close to 0 if there is little to see, or if it is cut off by the box.
    seen = np.clip(mask.mean(axis=(1, 2)) / 0.15, 0, 1)
    cut = np.clip(4 * _border(mask[..., None]).mean(axis=(1, 2)), 0, 1)
    presence = (seen * (1 - cut))[:, None]
    appearance = np.concatenate([_colour(patches, mask), _shape(mask), _size(boxes)], axis=1)
    return np.concatenate([presence * appearance, 1 - presence, surroundings - 0.6], axis=1)


def _border(patches: Array) -> Array:
    """Return the outermost two rows and columns of (K, S, S, C) as (K, pixels, C)."""
    strips = (patches[:, :2], patches[:, -2:], patches[:, :, :2], patches[:, :, -2:])
    return np.concatenate([strip.reshape(len(patches), -1, patches.shape[-1]) for strip in strips], axis=1)


def _patches(picture: Image.Image, boxes: Array) -> Array:
    """Resample each box, with some context around it, to S x S: (K, S, S, 3)."""
    pixels = []
    for x1, y1, x2, y2 in boxes.tolist():
        dx, dy = CONTEXT * (x2 - x1), CONTEXT * (y2 - y1)
        window = (max(x1 - dx, 0), max(y1 - dy, 0), min(x2 + dx, WIDTH), min(y2 + dy, HEIGHT))
        pixels.append(np.asarray(picture.resize((PATCH, PATCH), Image.Resampling.BOX, box=window)))
    return np.stack(pixels) / 255.0


def _colour(patches: Array, mask: Array) -> Array:
    """Return the similarity of the mean masked pixel to each named colour, and that mean: (K, 10 + 3)."""
    weight = np.where(mask > 0.9, 1.0, 0.0)  # leaves out the blended rim
    mean = np.einsum("kij,kijc->kc", weight, patches) / (weight.sum(axis=(1, 2))[:, None] + 1.0)
    distance = np.linalg.norm(mean[:, None] - np.array(list(COLOURS.values())) / 255, axis=-1)
    return np.concatenate([_softmax(-0.5 * (distance / 0.1) ** 2), 0.5 * (mean - 0.5)], axis=1)


def _shape(mask: Array) -> Array:
    """Return the similarity of the mask to the template of each shape, and the mask at 5 x 5: (K, 8 + 25)."""
    flat = mask.reshape(len(mask), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True) + 1.0
    coarse = mask.reshape(len(mask), 5, PATCH // 5, 5, PATCH // 5).mean(axis=(2, 4)).reshape(len(mask), -1)
    likeness = (flat @ _templates().T).reshape(len(mask), len(SHAPES), len(TEMPLATE_ANGLES)).max(axis=-1)
    return np.concatenate([_softmax(30 * likeness), 0.2 * (coarse - 0.5)], axis=1)


def _size(boxes: Array) -> Array:
    """Return the similarity of the box's longer side to each size level: (K, 4)."""
    longer = (boxes[:, 2:] - boxes[:, :2]).max(axis=1, keepdims=True)
    return np.exp(-0.5 * (np.log2(longer / SIZE_LEVELS) / 0.4) ** 2)


@lru_cache(maxsize=1)
def _templates() -> Array:
    """Draw each shape at each angle in a box with its context: (shapes * angles, S * S), mean 0, length 1."""
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
    """Shift boxes so that each shows one side or corner of an item, and about as much of what lies beside it."""
    sides = boxes[:, 2:] - boxes[:, :2]
    shift = sides * rng.choice([-1, 1], size=sides.shape) * rng.uniform(0.35, 0.6, size=sides.shape)
    shift *= rng.permuted(np.tile([1.0, 0.3], (len(boxes), 1)), axis=1)
    return boxes + np.tile(shift, 2)


def _patch(items: Array, rng: np.random.Generator) -> Array:
    """Return the one of twenty random boxes that covers the least of the items: (1, 4)."""
    sides = rng.uniform(36, 120, size=(20, 2))
    corner = rng.uniform(0, 1, size=(20, 2)) * ([WIDTH, HEIGHT] - sides)
    boxes = np.concatenate([corner, corner + sides], axis=1)
    low = np.maximum(boxes[:, None, :2], items[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], items[None, :, 2:])
    covered = np.prod(np.clip(high - low, 0, None), axis=-1).sum(axis=1) / np.prod(sides, axis=1)
    return boxes[[np.argmin(covered)]]


@lru_cache(maxsize=1)
def _random_layer(size: int) -> Array:
    """Return the weights (D, 2048), which do not depend on the seed of the dataset."""
    return np.random.default_rng(PROJECTION_SEED).standard_normal((size, FEATURE_SIZE))
