"""Folders with a file or two an image: ``.npz`` of UNITER's extractor or of MILVLG's, ``.npy`` pairs of MMF's (Pythia's)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.records import read_members, read_npy, read_npz
from data.sources.plain_pickle import read_pickled_map
from data.sources.region_source import Arrays, Source, as_shares, check_shares, read_file
from utils.errors import InputError
from utils.files import short_repr

_INFO = "_info.npy"


def sources_of(folder: Path) -> list[Source]:
    """The images of a folder, by name; ``InputError`` when there are none."""
    try:
        paths = list(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}), expected a folder") from error
    loaders: dict[Path, Callable[[Path], Arrays]] = {}
    for path in paths:
        if path.suffix.lower() == ".npz":
            loaders[path] = load_npz
        elif path.suffix.lower() == ".npy":
            # An info without its features is an image too, one that fails.
            of_info = path.name.endswith(_INFO)
            loaders[path.with_name(path.name.removesuffix(_INFO) + ".npy") if of_info else path] = load_npy_pair
    if not loaders:
        raise InputError(f"{folder}: no .npz or .npy file in it")
    return [Source(path.name, str(path), partial(load, path)) for path, load in sorted(loaders.items())]


def is_mmf(sources: list[Source]) -> bool:
    """Whether a folder's images are MMF's."""
    return any(source.id.endswith(".npy") for source in sources)


def load_npz(path: Path) -> Arrays:
    """UNITER's ``features norm_bb conf soft_labels``, perhaps with ``nbb``, or MILVLG's ``x bbox image_w image_h info``."""
    data = read_file(path)
    uniter = ("features", "norm_bb", "conf", "soft_labels", "nbb")
    arrays = read_npz(data, uniter)
    if "features" not in arrays:
        milvlg = read_members(data, ("x", "bbox", "num_bbox", "image_w", "image_h", "info"))
        if "x" not in milvlg:
            raise ValueError("has no features (UNITER) and no x (bottom-up-attention.pytorch)")
        return _from_milvlg(milvlg)
    for name in ("norm_bb", "conf"):
        if name not in arrays:
            raise ValueError(f"has no {name}")
    arrays = _first(arrays, "nbb", arrays.pop("nbb", None))
    if arrays["norm_bb"].ndim == 2 and arrays["norm_bb"].shape[1] == 6:
        check_shares(arrays["norm_bb"])
    return arrays


def _from_milvlg(members: dict[str, bytes]) -> Arrays:
    for name in ("bbox", "image_w", "image_h", "info"):
        if name not in members:
            raise ValueError(f"has no {name}, which bottom-up-attention.pytorch writes beside x")
    try:
        conf = read_pickled_map(members.pop("info")).get("objects_conf")
    except ValueError as error:
        raise ValueError(f"info: {error}") from error
    if not isinstance(conf, np.ndarray):
        raise ValueError("info has no objects_conf, the confidence of each box")
    arrays = {name: read_npy(members.pop(name)) for name in list(members)}  # and none is held twice
    number = arrays.pop("num_bbox", None)
    width, height = arrays["image_w"], arrays["image_h"]
    boxes = _first({"features": arrays["x"], "boxes": arrays["bbox"], "conf": conf}, "num_bbox", number)
    return {"features": boxes["features"], "norm_bb": as_shares(boxes["boxes"], width, height), "conf": boxes["conf"]}


def load_npy_pair(path: Path) -> Arrays:
    """MMF's ``<image>.npy``, features, and ``<image>_info.npy``, a pickled map of boxes, sizes and class scores."""
    features = read_npy(read_file(path))
    beside = path.with_name(path.stem + _INFO)
    if not beside.exists():
        raise ValueError(f"has no {beside.name} beside it")
    try:
        info = read_pickled_map(read_file(beside))
        boxes = {"features": features, "boxes": _array_of(info, "bbox")}
        if "cls_prob" in info:
            scores = _array_of(info, "cls_prob")
            boxes["conf"] = scores.max(axis=1) if scores.ndim == 2 and scores.shape[1] else scores
        boxes = _first(boxes, "num_boxes", info.get("num_boxes"))
        norm_bb = as_shares(boxes.pop("boxes"), info.get("image_width"), info.get("image_height"))
    except ValueError as error:
        raise ValueError(f"{beside.name}: {error}") from error
    return {**boxes, "norm_bb": norm_bb}


def _array_of(info: dict[str, Any], name: str) -> np.ndarray:
    if not isinstance(info.get(name), np.ndarray):
        raise ValueError(f"has no array {name}")
    return info[name]


def _first(arrays: Arrays, name: str, number: Any) -> Arrays:
    """The rows of real boxes; ``number`` of them, called ``name``, leaves padding behind. None means all."""
    if number is None:
        return arrays
    rows = min(len(array) if array.ndim else 0 for array in arrays.values())
    count = number.item() if isinstance(number, np.ndarray) and number.size == 1 else number
    if type(count) is not int or not 1 <= count <= rows:
        raise ValueError(f"{name} is {short_repr(count)}, expected a number of boxes from 1 to {rows}")
    return {key: array[:count] for key, array in arrays.items()}
