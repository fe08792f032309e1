"""What every reader of region features gives, and what several of them need.

Legend: K boxes of an image, D numbers per feature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.files import short_repr

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


def check_shares(norm_bb: np.ndarray) -> None:
    """``ValueError`` when boxes ``x1 y1 x2 y2 …`` [K, 6] are no shares of a picture's sides, give or take a hundredth."""
    corners = norm_bb[:, :4]
    whole = ((corners > -0.01) & (corners < 1.01)).all(axis=1) & (corners[:, :2] <= corners[:, 2:4]).all(axis=1)
    if not whole.all():
        number = int(whole.argmin())
        raise ValueError(f"box {number} is {corners[number].tolist()}, expected shares x1 <= x2 and y1 <= y2 from 0 to 1")


def _pixels(side: Any) -> float:
    """A number that a detector's file has for a side; NaN for anything else, such as lists that would fill the memory."""
    value = side.item() if isinstance(side, np.ndarray) and side.size == 1 else side
    try:
        return float(value) if isinstance(value, (int, float)) else np.nan
    except OverflowError:
        return np.nan


def as_shares(boxes: np.ndarray, width: Any, height: Any) -> np.ndarray:
    """Boxes [K, 4], ``x1 y1 x2 y2`` in pixels, as shares of the picture's sides: ``x1 y1 x2 y2 w h`` [K, 6].

    Raises ``ValueError`` for a picture without size and for a box that leaves it or is turned round.
    """
    size = np.array([_pixels(width), _pixels(height)])
    if not (np.isfinite(size) & (size > 0)).all():
        raise ValueError(f"the picture is {short_repr(width)} wide and {short_repr(height)} high, expected numbers of pixels")
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
