"""What is in an LMDB folder of an image database, and what is wrong with it.

Legend: K boxes of an image, D numbers per feature.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.boxes import Layout, parse_layout
from data.image_db import check_regions
from data.inspection.faults import Faults
from data.inspection.reading import Reading, read_map, read_object, record_names
from data.inspection.report import Range, Report, share, size_on_disk, spread, table
from data.lmdb_store import LmdbReader
from data.records import all_finite, read_msgpack, read_npz
from data.text_db import is_text_list
from utils.errors import InputError
from utils.files import short_repr

AT_ONCE = 32
# Numbers up to 1 are this far apart at most when rounded to half precision; so is x2 - x1 from w when all three are rounded.
STEP = float(np.finfo(np.float16).eps)


@dataclass
class ImageSummary:
    """What is said of some records; ``widths`` has how many images have features of D numbers, and the first of them."""

    boxes: Counter[int] = field(default_factory=Counter)
    widths: dict[int, tuple[int, str]] = field(default_factory=dict)
    types: Counter[str] = field(default_factory=Counter)
    without_conf: int = 0
    fewer_boxes: int = 0
    ranges: dict[str, Range] = field(default_factory=dict)
    faults: Faults = field(default_factory=Faults)

    def update(self, other: ImageSummary) -> None:
        self.boxes.update(other.boxes)
        for width, (images, first) in other.widths.items():
            self.add_width(width, images, first)
        self.types.update(other.types)
        self.without_conf += other.without_conf
        self.fewer_boxes += other.fewer_boxes
        for name, values in other.ranges.items():
            self.ranges.setdefault(name, Range()).update(values)
        self.faults.update(other.faults)

    def add_width(self, width: int, images: int, first: str) -> None:
        seen, earlier = self.widths.get(width, (0, first))
        self.widths[width] = seen + images, earlier

    def add_range(self, name: str, values: np.ndarray) -> None:
        self.ranges.setdefault(name, Range()).add(values)


@dataclass(frozen=True)
class ImageCheck:
    """Reads records, each given as its name with its number of boxes in the JSON (None where that lacks it)."""

    store: LmdbReader
    layout: Layout

    def __call__(self, records: Sequence[tuple[str, int | None]]) -> ImageSummary:
        summary = ImageSummary()
        with self.store:
            for name, boxes in records:
                try:
                    self._examine(name, boxes, self._read(name), summary)
                except ValueError as error:
                    summary.faults.refuse(name, error)
        return summary

    def _read(self, name: str) -> dict[str, np.ndarray]:
        record = self.store.get(name)
        if self.layout.compressed:  # what the programs don't read is not worth unpacking
            return read_npz(record, ("features", "norm_bb", "conf"))
        return read_msgpack(record, ("features", "norm_bb", "conf", "soft_labels"))

    def _examine(self, name: str, boxes: int | None, arrays: dict[str, np.ndarray], summary: ImageSummary) -> None:
        faults = summary.faults
        for key in ("features", "norm_bb", "conf"):
            if key not in arrays and (key != "conf" or self.layout.rule is None):
                raise ValueError(f"has no {key}")
        labels = arrays.pop("soft_labels", None)
        broken = [key for key, array in arrays.items() if array.dtype.kind == "f" and not all_finite(array)]
        for key in broken:
            faults.add(f"images whose {key} has numbers that are not finite", repr(name))
        check_regions({key: np.nan_to_num(array) if key in broken else array for key, array in arrays.items()})

        features = arrays["features"]
        rows, width = features.shape
        summary.boxes[rows] += 1
        summary.add_width(width, 1, name)
        summary.types[features.dtype.name] += 1
        self._check_number(name, rows, boxes, summary)
        if labels is not None and labels.shape[:1] != (rows,):
            faults.add("images whose soft_labels are not one row a box", f"{name!r}: shape {list(labels.shape)}, {rows} boxes")
        singles = {key: _single(array) for key, array in arrays.items() if key not in broken}
        for key, values in singles.items():
            if key == "norm_bb":
                summary.add_range("x1 y1 x2 y2", values[:, :4])
                summary.add_range("w h", values[:, 4:])
            else:
                summary.add_range(key, values)
        if "norm_bb" in singles:
            for kind, example in _box_faults(singles["norm_bb"]):
                faults.add(kind, f"{name!r}: {example}")
        if "conf" in singles:
            for kind, example in _conf_faults(singles["conf"]):
                faults.add(kind, f"{name!r}: {example}")
        summary.without_conf += "conf" not in arrays

    def _check_number(self, name: str, rows: int, boxes: int | None, summary: ImageSummary) -> None:
        """A filtered record may hold fewer boxes than the JSON says where the detector found fewer than ``min_bb``."""
        if self.layout.rule is not None and self.layout.rule.count(np.full(rows, np.inf)) < rows:
            summary.faults.add("images with more boxes than the folder's name allows", f"{name!r}: {rows}")
        if boxes is None or rows == boxes:
            return
        if self.layout.rule is not None and rows < boxes <= self.layout.rule.min_bb:
            summary.fewer_boxes += 1
        else:
            summary.faults.add(
                f"images with another number of boxes than {self.layout.sidecar} says", f"{name!r}: {rows}, there {boxes}"
            )


def _single(array: np.ndarray) -> np.ndarray:
    """AnchorBatch precision is slow to compute with."""
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _box_faults(boxes: np.ndarray) -> Iterator[tuple[str, str]]:
    """What is wrong with ``x1 y1 x2 y2 w h`` [K, 6], and the first box of each kind."""
    spans = boxes[:, 2:4] - boxes[:, :2]
    for kind, wrong in (
        ("images with boxes outside [0, 1]", (boxes < -STEP) | (boxes > 1 + STEP)),
        ("images with boxes of x2 < x1 or y2 < y1", spans < 0),
        ("images with boxes whose w h are not x2 - x1 and y2 - y1", np.abs(spans - boxes[:, 4:]) > STEP),
    ):
        if wrong.any():
            row = int(wrong.any(axis=1).argmax())
            yield kind, f"box {row} is {' '.join(f'{number:.4g}' for number in boxes[row])}"


def _conf_faults(conf: np.ndarray) -> Iterator[tuple[str, str]]:
    """What is wrong with confidences [K], and the first place of each kind."""
    rises = np.diff(conf) > 0
    if rises.any():
        row = int(rises.argmax())
        yield "images whose boxes are not in falling confidence", f"{conf[row]:.4g} of box {row}, then {conf[row + 1]:.4g}"
    outside = (conf < 0) | (conf > 1)
    if outside.any():
        row = int(outside.argmax())
        yield "images with confidences outside [0, 1]", f"{conf[row]:.4g} of box {row}"


def inspect_images(path: Path, reading: Reading) -> tuple[Report, set[str] | None]:
    """The report of one LMDB folder of an image database, and the names of its images, None where they cannot be read."""
    report = Report("image database", str(path))
    faults = report.faults
    try:
        layout = parse_layout(path.name)
    except InputError as error:
        faults.add("folders that nothing reads", str(error))
        return report, None
    sidecar = path.with_name(layout.sidecar) if layout.sidecar else None
    numbers = None
    if sidecar is not None and (layout.rule is not None or sidecar.exists()):
        numbers = read_map(sidecar, "a number of boxes", lambda n: type(n) is int and n >= 1, faults)
    names = record_names(path, faults)
    if names is not None and not names:
        faults.add("databases without images", path.name)
    if names is not None:
        _compare_names(path, names, numbers, layout, faults)

    records = [(name, (numbers or {}).get(name)) for name in reading.chosen(names or [])]
    seen = ImageSummary(faults=faults)
    for summary in reading.summaries(ImageCheck(LmdbReader(path, readahead=True), layout), records, AT_ONCE, faults):
        seen.update(summary)
    if len(seen.widths) > 1:
        for width, (images, first) in seen.widths.items():
            faults.add("different widths of features", f"{width} numbers in {images:,} images, the first of them {first!r}")

    report.facts["size"] = size_on_disk([path / "data.mdb", *([] if sidecar is None else [sidecar])])
    report.facts["made of"] = layout.describe()
    report.facts["images"] = reading.describe(names)
    if seen.boxes:
        images = seen.boxes.total()
        report.facts["boxes"] = spread(seen.boxes, "an image")
        widths, types = " or ".join(f"{width:,}" for width in sorted(seen.widths)), " or ".join(sorted(seen.types))
        report.facts["features"] = f"{widths} numbers a box, {types}"
        if seen.without_conf:
            report.facts["confidences"] = f"none in {share(seen.without_conf, images, 'images')}"
        if seen.fewer_boxes:
            report.facts["few boxes"] = f"{share(seen.fewer_boxes, images, 'images')} where the detector found less than min_bb"
    if seen.boxes:
        report.histogram = "boxes of an image", seen.boxes
    report.ranges = seen.ranges
    made = path.with_name(f"made_{path.name}.json")
    if made.exists():
        fields = read_object(made, faults) or {}
        report.tables[f"provenance, from {made.name}"] = table(fields)
    return report, None if names is None else set(names)


def _compare_names(path: Path, names: Sequence[str], numbers: Mapping[str, int] | None, layout: Layout, faults: Faults) -> None:
    """Where the records, their list ``__keys__`` and the JSON of box numbers contradict each other."""
    present = set(names)
    if numbers is not None:
        faults.add_names(f"images of {layout.sidecar} without a record", (name for name in numbers if name not in present))
        faults.add_names(f"images that {layout.sidecar} lacks", (name for name in names if name not in numbers))
    with LmdbReader(path, readahead=True) as store:
        if "__keys__" not in store:
            return
        try:
            listed = json.loads(bytes(store.get("__keys__")))
        except (ValueError, RecursionError) as error:
            faults.add("lists __keys__ that are not JSON", str(error))
            return
    if not is_text_list(listed):
        faults.add("lists __keys__ that are not of image names", short_repr(listed))
        return
    times = Counter(listed)
    faults.add_names("images that __keys__ lists more than once", (name for name in times if times[name] > 1))
    faults.add_names("images of __keys__ without a record", (name for name in times if name not in present))
    faults.add_names("images that __keys__ lacks", (name for name in names if name not in times))
