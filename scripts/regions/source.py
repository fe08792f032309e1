"""What every reader of region features gives, and what several of them need.

Legend: K boxes of an image, D numbers per feature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAX_FILE_BYTES = 256 << 20
_SLACK = 1.0  # pixels by which a box may leave its picture: detectors differ in whether the last pixel is w or w - 1

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Source:
    """One image to convert.

    ``id`` is what the source calls it, ``place`` where it is found, for messages. ``load``, which is called in a worker, gives
    ``features`` [K, D], ``norm_bb`` [K, 6] and, where the detector wrote them, ``conf`` [K] and ``soft_labels`` [K, C]; it
    raises ``ValueError`` or ``OSError``.
    """

    id: str
    place: str
    load: Callable[[], Arrays]


def read_file(path: Path) -> bytes:
    """The contents of one image's file; raises ``ValueError`` and ``OSError``."""
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise ValueError("is not a regular file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"is larger than {MAX_FILE_BYTES:,} bytes")
    return path.read_bytes()


def as_shares(boxes: np.ndarray, width: Any, height: Any) -> np.ndarray:
    """Boxes [K, 4], ``x1 y1 x2 y2`` in pixels, as shares of the picture's sides: ``x1 y1 x2 y2 w h`` [K, 6].

    Raises ``ValueError`` for a picture without size and for a box that leaves it or is turned round.
    """
    try:
        size = np.array([width, height], np.float64).reshape(2)
    except (TypeError, ValueError):
        size = np.zeros(2)
    if not (np.isfinite(size) & (size > 0)).all():
        raise ValueError(f"the picture is {width} wide and {height} high, expected numbers of pixels")
    if boxes.ndim != 2 or boxes.shape[1] != 4 or boxes.dtype.kind not in "fiu":
        raise ValueError(f"boxes have shape {list(boxes.shape)} and type {boxes.dtype}, expected x1 y1 x2 y2 of each")
    corners = boxes.astype(np.float64).reshape(-1, 2, 2)  # (boxes, corners, axes)
    inside = ((corners >= -_SLACK) & (corners <= size + _SLACK)).all(axis=(1, 2))
    whole = (corners[:, 0] <= corners[:, 1]).all(axis=1)
    if not (inside & whole).all():
        number = int((inside & whole).argmin())
        wrong = "leaves the picture" if not inside[number] else "has x2 < x1 or y2 < y1"
        raise ValueError(f"box {number}, {boxes[number].tolist()}, {wrong}, which is {size[0]:g} wide and {size[1]:g} high")
    shares = (corners / size).clip(0, 1)
    return np.concatenate([shares.reshape(-1, 4), shares[:, 1] - shares[:, 0]], axis=1)
