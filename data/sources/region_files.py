"""Read a folder of region features: ``.npz`` of UNITER's or MILVLG's extractor, or pairs of ``.npy`` of MMF's (Pythia's)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.records import read_members, read_npy, read_npz
from data.sources.plain_pickle import read_pickled_dict
from data.sources.regions import Arrays, Source, check_normalised, normalise_boxes
from utils.errors import InputError
from utils.files import read_file, short_repr

MAX_FILE_BYTES = 256 << 20
_INFO = "_info.npy"
_read = partial(read_file, limit=MAX_FILE_BYTES)


def sources_of(folder: Path) -> list[Source]:
    """The images of a folder, sorted by name. Raises ``InputError`` if there are none."""
    try:
        paths = list(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}), expected a folder") from error
    loaders: dict[Path, Callable[[Path], Arrays]] = {}
    for path in paths:
        if path.suffix.lower() == ".npz":
            loaders[path] = load_npz
        elif path.suffix.lower() == ".npy":
            # An info file without features counts as an image too, one that fails.
            is_info = path.name.endswith(_INFO)
            loaders[path.with_name(path.name.removesuffix(_INFO) + ".npy") if is_info else path] = load_npy_pair
    if not loaders:
        raise InputError(f"{folder}: no .npz or .npy file in it")
    return [Source(path.name, str(path), partial(load, path)) for path, load in sorted(loaders.items())]


def load_npz(path: Path) -> Arrays:
    """Read UNITER's ``features norm_bb conf soft_labels [nbb]`` or MILVLG's ``x bbox num_bbox image_w image_h info``.

    Raises ``ValueError`` and ``OSError``.
    """
    data = _read(path)
    arrays = read_npz(data, ("features", "norm_bb", "conf", "soft_labels", "nbb"))
    if "features" not in arrays:
        return _from_milvlg(read_members(data, ("x", "bbox", "num_bbox", "image_w", "image_h", "info")))
    for name in ("norm_bb", "conf"):
        if name not in arrays:
            raise ValueError(f"has no {name}")
    arrays = _without_padding(arrays, "nbb", arrays.pop("nbb", None))
    if arrays["norm_bb"].ndim == 2 and arrays["norm_bb"].shape[1] == 6:
        check_normalised(arrays["norm_bb"])
    return arrays


def _from_milvlg(members: dict[str, bytes]) -> Arrays:
    if "x" not in members:
        raise ValueError("has no features (UNITER) and no x (bottom-up-attention.pytorch)")
    for name in ("bbox", "image_w", "image_h", "info"):
        if name not in members:
            raise ValueError(f"has no {name}, which bottom-up-attention.pytorch writes beside x")
    try:
        conf = read_pickled_dict(members.pop("info"), ["objects_conf"]).get("objects_conf")
    except ValueError as error:
        raise ValueError(f"info: {error}") from error
    if not isinstance(conf, np.ndarray):
        raise ValueError("info has no array objects_conf, the confidence of each box")
    arrays = {name: read_npy(members.pop(name)) for name in list(members)}  # pop: hold each array only once
    regions = {"features": arrays["x"], "boxes": arrays["bbox"], "conf": conf}
    regions = _without_padding(regions, "num_bbox", arrays.get("num_bbox"))
    return _normalised(regions, arrays["image_w"], arrays["image_h"])


def load_npy_pair(path: Path) -> Arrays:
    """Read MMF's ``<image>.npy``, the features, and ``<image>_info.npy``, a pickled dict with boxes, sizes and class scores.

    Raises ``ValueError`` and ``OSError``.
    """
    features = read_npy(_read(path))
    beside = path.with_name(path.stem + _INFO)
    if not beside.exists():
        raise ValueError(f"has no {beside.name} beside it")
    try:
        info = read_pickled_dict(_read(beside), ("bbox", "cls_prob", "num_boxes", "image_width", "image_height"))
        regions = {"features": features, "boxes": _array_of(info, "bbox")}
        if "cls_prob" in info:
            scores = _array_of(info, "cls_prob")
            regions["conf"] = scores.max(axis=1) if scores.ndim == 2 and scores.shape[1] else scores
        regions = _without_padding(regions, "num_boxes", info.get("num_boxes"))
        return _normalised(regions, info.get("image_width"), info.get("image_height"))
    except ValueError as error:
        raise ValueError(f"{beside.name}: {error}") from error


def _array_of(info: dict[str, Any], name: str) -> np.ndarray:
    if not isinstance(info.get(name), np.ndarray):
        raise ValueError(f"has no array {name}")
    return info[name]


def _without_padding(arrays: Arrays, name: str, number: Any) -> Arrays:
    """The first ``number`` rows, which the file states as ``name``; all of them if None."""
    if number is None:
        return arrays
    rows = min(len(array) if array.ndim else 0 for array in arrays.values())
    count = number.item() if isinstance(number, np.ndarray) and number.size == 1 else number
    if type(count) is not int or not 1 <= count <= rows:
        raise ValueError(f"{name} is {short_repr(count)}, expected a number of boxes from 1 to {rows}")
    return {key: array[:count] for key, array in arrays.items()}


def _normalised(regions: Arrays, width: Any, height: Any) -> Arrays:
    norm_bb = normalise_boxes(regions.pop("boxes"), width, height)
    return {**regions, "norm_bb": norm_bb}
