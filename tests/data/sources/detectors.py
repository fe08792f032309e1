"""Files of region features, written as the detectors' own programs write them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

WIDTH, HEIGHT, D = 640, 480, 12
SIZE = (WIDTH, HEIGHT)


class Detected:
    """Boxes in pixels, features and confidences of one picture, in single precision."""

    def __init__(self, seed: int, boxes: int = 15) -> None:
        rng = np.random.default_rng(seed)
        corner = rng.random((boxes, 2)) * [WIDTH - 200, HEIGHT - 200]
        self.boxes = np.concatenate([corner, corner + 1 + rng.random((boxes, 2)) * 199], axis=1).astype(np.float32)
        self.features = rng.standard_normal((boxes, D)).astype(np.float32)
        self.conf = rng.permutation(np.linspace(0.05, 0.95, boxes)).astype(np.float32)

    def shares(self) -> np.ndarray:
        corners = self.boxes / np.array([WIDTH, HEIGHT, WIDTH, HEIGHT], np.float32)
        return np.concatenate([corners, corners[:, 2:] - corners[:, :2]], axis=1)


def b64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array)).decode()


def butd_row(name: str, found: Detected) -> dict[str, Any]:
    sizes = {"image_id": name, "image_w": WIDTH, "image_h": HEIGHT, "num_boxes": len(found.boxes)}
    return {**sizes, "boxes": b64(found.boxes), "features": b64(found.features)}


def airsplay_row(name: str, found: Detected) -> dict[str, Any]:
    ids = np.zeros(len(found.boxes), np.int64)
    kinds = {"objects_id": b64(ids), "objects_conf": b64(found.conf), "attrs_id": b64(ids), "attrs_conf": b64(found.conf)}
    arrays = {"num_boxes": len(found.boxes), "boxes": b64(found.boxes), "features": b64(found.features)}
    return {"img_id": name, "img_h": HEIGHT, "img_w": WIDTH, **kinds, **arrays}


def vinvl_row(name: str, found: Detected) -> dict[str, Any]:
    objects = [
        {"rect": box.tolist(), "class": "dog", "conf": float(conf), "feature": b64(feature)}
        for box, conf, feature in zip(found.boxes, found.conf, found.features, strict=True)
    ]
    return {"key": name, "objects": json.dumps({"image_h": HEIGHT, "image_w": WIDTH, "objects": objects})}


ROWS: dict[str, Callable[[str, Detected], dict[str, Any]]] = {"butd": butd_row, "airsplay": airsplay_row, "vinvl": vinvl_row}


def line(row: dict[str, Any]) -> bytes:
    return "\t".join(map(str, row.values())).encode() + b"\r\n"


def save_uniter(path: Path, found: Detected, **changes: Any) -> None:
    arrays = {"features": found.features, "norm_bb": found.shares(), "conf": found.conf}
    np.savez(path, **{**arrays, "soft_labels": np.ones((len(found.conf), 5), np.float32), **changes})


def save_milvlg(path: Path, found: Detected, **changes: Any) -> None:
    info = {"objects_id": np.zeros(len(found.conf)), "objects_conf": found.conf, "attrs_conf": found.conf}
    arrays = {"x": found.features, "bbox": found.boxes, "num_bbox": len(found.boxes), "image_h": HEIGHT, "image_w": WIDTH}
    np.savez_compressed(path, **{**arrays, "info": info, **changes})


def save_mmf(path: Path, found: Detected, **changes: Any) -> None:
    scores = np.stack([found.conf, found.conf / 2, found.conf / 3], axis=1)
    np.save(path, np.concatenate([found.features, np.zeros((3, D), np.float32)]))  # padded, as MMF does
    info = {"bbox": found.boxes, "num_boxes": len(found.boxes), "objects": scores.argmax(axis=1), "cls_prob": scores}
    beside = {"image_width": WIDTH, "image_height": HEIGHT, "image_id": path.stem}
    np.save(path.with_name(f"{path.stem}_info.npy"), {**info, **beside, **changes})
