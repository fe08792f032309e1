"""Random databases of Flickr30k's sizes: images of 36 regions on average, 10 to 100, and texts of 5 to 30 word pieces."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from data.image_db import ImageDatabaseWriter
from data.text_db import TextDatabaseWriter
from model.config import UniterConfig

CLASSES = 1601  # of the published detector, whose scores are a large part of a record and are never needed


def write_data(folder: Path, config: UniterConfig, images: int, texts: int) -> None:
    """Write ``folder``/images and ``folder``/texts.db, the texts going round the images."""
    rng = np.random.default_rng(0)
    with ImageDatabaseWriter(folder / "images") as writer:
        for number in range(images):
            writer.put(image_name(number), **random_regions(rng, config.img_dim))
    specials = {"CLS": 101, "SEP": 102, "MASK": 103, "UNK": 100, "v_range": [106, config.vocab_size]}
    with TextDatabaseWriter(folder / "texts.db", specials) as writer:
        for number in range(texts):
            pieces = rng.integers(106, config.vocab_size, int(rng.integers(5, 31)))
            writer.put(str(number), pieces, image_name(number % images))


def random_regions(rng: np.random.Generator, width: int) -> dict[str, np.ndarray]:
    """The arrays of an image; half of its features are 0, as a rectifier leaves them."""
    regions = int(np.clip(rng.poisson(36), 10, 100))
    corner, size = rng.random((regions, 2)) / 2, rng.random((regions, 2)) / 2
    return {
        "features": rng.standard_normal((regions, width), np.float32).clip(0).astype(np.float16),
        "norm_bb": np.concatenate([corner, corner + size, size], axis=1).astype(np.float16),
        "conf": np.full(regions, 0.9, np.float16),
        "soft_labels": rng.random((regions, CLASSES), np.float32).astype(np.float16),
    }


def image_name(number: int) -> str:
    """The name of a random image."""
    return f"random_{number:012d}.npz"
