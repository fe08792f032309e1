"""Draw a scene with Pillow: a soft texture, soft shadows, anti-aliased shapes."""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from examples.scenes.layout import COLOURS, HEIGHT, WIDTH, Item, Scene, silhouette


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
