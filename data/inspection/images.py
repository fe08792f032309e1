"""What is in an LMDB folder of an image database, and what is wrong with it.

Legend: K boxes per image, D features per box.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from data.boxes import Layout, parse_layout
from data.checks import HALF_STEP, all_finite, check_regions, is_text_list, wrong_sizes
from data.image_db import contents_of
from data.inspection.reading import Reading, read_map, read_names, read_object
from data.inspection.report import Faults, Range, Report, Summary, share, size_on_disk, spread, table
from data.lmdb_store import LmdbReader
from data.records import read_msgpack, read_npz
from utils.errors import InputError, counted
from utils.files import short_repr

_AT_ONCE = 32


def lmdb_folders(path: Path) -> list[Path]:
    """The LMDB folders of an image database, or ``path`` itself if it is one. Raises ``InputError`` if there are none."""
    if (path / "data.mdb").is_file():
        parse_layout(path.name)
        return [path]
    folders = []
    if path.is_dir():
        folders = sorted(
            entry for entry in path.iterdir() if entry.is_dir() and re.match(r"feat_|all(_compressed)?$", entry.name)
        )
    if not folders:
        raise InputError(f"{path}: neither a text database nor an image database; {contents_of(path)}")
    return folders


def inspect_images(path: Path, reading: Reading) -> tuple[Report, set[str] | None]:
    """Report on an LMDB folder of an image database and return the names of its images, None if they cannot be read."""
    report = Report("image database", str(path))
    faults = report.faults
    try:
        layout = parse_layout(path.name)
    except InputError as error:
        faults.add("folders whose name no program reads", str(error))
        return report, None
    sidecar = path.with_name(layout.sidecar) if layout.sidecar else None
    numbers = None
    if sidecar is not None and (layout.rule is not None or sidecar.exists()):
        numbers = read_map(sidecar, "a number of boxes", lambda n: type(n) is int and n >= 1, faults)
    names, listed = read_names(path, faults)
    if names is not None:
        _compare_names(path, names, listed, numbers, layout, faults)
    records = [(name, (numbers or {}).get(name)) for name in reading.chosen(names or [])]
    seen = reading.check(path, partial(_check, layout), records, _AT_ONCE)
    faults.update(seen.faults)
    boxes, widths, types = (seen.counts_of(thing) for thing in ("boxes", "width", "type"))
    if len(widths) > 1:
        for width, images in widths.items():
            example = f"{width} per box in {counted(images, 'image')}, the first of them {seen.examples[width]!r}"
            faults.add("different numbers of features", example)

    report.facts["size"] = size_on_disk([path / "data.mdb", *([] if sidecar is None else [sidecar])])
    report.facts["contents"] = layout.describe()
    report.facts["images"] = reading.describe(names)
    if boxes:
        report.facts["boxes"] = spread(boxes, "per image")
        report.facts["features"] = (
            f"{' or '.join(f'{width:,}' for width in sorted(widths))} per box, {' or '.join(sorted(types))}"
        )
        if without := seen.counts["without conf"]:
            report.facts["confidences"] = f"none in {share(without, boxes.total(), 'image')}"
        if few := seen.counts["few boxes"]:
            report.facts["few boxes"] = f"{share(few, boxes.total(), 'image')} where the detector found fewer than min_bb"
        report.histogram = "boxes per image", boxes
    report.ranges = seen.ranges
    made = path.with_name(f"made_{path.name}.json")
    if made.exists():
        report.tables[f"provenance, from {made.name}"] = table(read_object(made, faults) or {})
    return report, None if names is None else set(names)


def _compare_names(
    path: Path, names: Sequence[str], listed: bytes | None, numbers: Mapping[str, int] | None, layout: Layout, faults: Faults
) -> None:
    """Find contradictions between the records, their list ``__keys__`` and the JSON of box numbers."""
    present = set(names)
    if not names:
        faults.add("databases without images", path.name)
    if numbers is not None:
        faults.add_names(f"images of {layout.sidecar} without a record", (name for name in numbers if name not in present))
        faults.add_names(f"images that {layout.sidecar} lacks", (name for name in names if name not in numbers))
    if listed is None:
        return
    try:
        contents = json.loads(listed)
    except (ValueError, RecursionError) as error:
        faults.add("lists __keys__ that are not JSON", str(error))
        return
    if not is_text_list(contents):
        faults.add("lists __keys__ that are not of image names", short_repr(contents))
        return
    times = Counter(contents)
    faults.add_names("images that __keys__ lists more than once", (name for name in times if times[name] > 1))
    faults.add_names("images of __keys__ without a record", (name for name in times if name not in present))
    faults.add_names("images that __keys__ lacks", (name for name in names if name not in times))


def _check(layout: Layout, store: LmdbReader, records: Sequence[tuple[str, int | None]]) -> Summary:
    """Check records, given as name and number of boxes by the sidecar file, None if it lacks it."""
    summary = Summary()
    for name, boxes in records:
        try:
            _check_image(name, boxes, _read(layout, store.get(name)), layout, summary)
        except ValueError as error:
            summary.faults.refuse(name, error)
    return summary


def _read(layout: Layout, record: memoryview) -> dict[str, np.ndarray]:
    if layout.compressed:  # soft_labels, which no program reads, are not worth unpacking
        return read_npz(record, ("features", "norm_bb", "conf"))
    return read_msgpack(record, ("features", "norm_bb", "conf", "soft_labels"))


def _check_image(name: str, boxes: int | None, arrays: dict[str, np.ndarray], layout: Layout, summary: Summary) -> None:
    faults = summary.faults
    for key in ("features", "norm_bb", "conf"):
        if key not in arrays and (key != "conf" or layout.rule is None):
            raise ValueError(f"has no {key}")
    labels = arrays.pop("soft_labels", None)
    not_finite = [key for key, array in arrays.items() if array.dtype.kind == "f" and not all_finite(array)]
    for key in not_finite:
        faults.add(f"images whose {key} has numbers that are not finite", repr(name))
    check_regions({key: np.nan_to_num(array) if key in not_finite else array for key, array in arrays.items()})

    features = arrays["features"]
    rows, width = features.shape
    summary.counts.update([("boxes", rows), ("width", width), ("type", features.dtype.name)])
    summary.examples.setdefault(width, name)
    summary.counts["without conf"] += "conf" not in arrays
    if layout.rule is not None and layout.rule.count(np.full(rows, np.inf)) < rows:
        faults.add("images with more boxes than the folder's name allows", f"{name!r}: {rows}")
    if boxes is not None and rows != boxes:
        if layout.rule is not None and rows < boxes <= layout.rule.min_bb:  # the detector found fewer than min_bb
            summary.counts["few boxes"] += 1
        else:
            example = f"{name!r}: {rows}, {layout.sidecar} has {boxes}"
            faults.add(f"images with another number of boxes than in {layout.sidecar}", example)
    if labels is not None and labels.shape[:1] != (rows,):
        faults.add("images whose soft_labels are not one row per box", f"{name!r}: shape {list(labels.shape)}, boxes: {rows}")
    for key, array in arrays.items():
        if key in not_finite:
            continue
        values = array.astype(np.float32) if array.dtype == np.float16 else array  # half precision computes slowly
        parts = {"x1 y1 x2 y2": values[:, :4], "w h": values[:, 4:]} if key == "norm_bb" else {key: values}
        for label, part in parts.items():
            summary.add_range(label, Range.of(part))
        for kind, example in _value_faults(key, values):
            faults.add(kind, f"{name!r}: {example}")


def _value_faults(key: str, values: np.ndarray) -> Iterator[tuple[str, str]]:
    """Each kind of fault in boxes ``x1 y1 x2 y2 w h`` (K, 6) or confidences (K,), with the first box that has it."""
    checks: dict[str, np.ndarray] = {}
    if key == "norm_bb":
        checks["images with boxes outside [0, 1]"] = (values < -HALF_STEP) | (values > 1 + HALF_STEP)
        checks["images with boxes of x2 < x1 or y2 < y1"] = values[:, 2:4] < values[:, :2]
        checks["images with boxes whose w h are not x2 - x1 and y2 - y1"] = wrong_sizes(values)
    elif key == "conf":
        checks["images whose boxes are not in descending confidence"] = np.diff(values, prepend=np.inf) > 0
        checks["images with confidences outside [0, 1]"] = (values < 0) | (values > 1)
    for kind, wrong in checks.items():
        if wrong.any():
            row = int(np.argwhere(wrong)[0, 0])
            yield kind, f"box {row} has {key} {' '.join(f'{number:.4g}' for number in np.atleast_1d(values[row]))}"


def compare(texts_path: Path, image_of: Mapping[str, str], images_path: Path, images: Collection[str]) -> Report:
    """Report how the texts, whose images are ``image_of`` ("" if none), and the ``images`` of two databases fit each other."""
    report = Report("fit", f"{texts_path.name} with {images_path.parent.name}/{images_path.name}")
    named = Counter(image for image in image_of.values() if image)
    absent = {image: texts for image, texts in named.items() if image not in images}
    for image, texts in absent.items():
        report.faults.add("images that texts name and the image database lacks", f"{image!r}, of {counted(texts, 'text')}")
    alone = [text for text, image in image_of.items() if image not in images]
    report.faults.add_names("texts without an image", alone)
    without = sum(image not in named for image in images)
    if named:
        report.facts["images"] = f"{share(len(named) - len(absent), len(named), 'image')} of the texts found"
    if image_of:
        report.facts["texts"] = f"{share(len(image_of) - len(alone), len(image_of), 'text')} with an image"
    if images:
        report.facts["no text"] = f"{share(without, len(images), 'image')}, normal if they are of other splits"
    return report
