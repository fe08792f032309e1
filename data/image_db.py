"""Image databases: LMDB folders of region features and boxes, filtered by confidence (see docs/formats.md).

Shapes: K boxes of an image, D numbers per feature (2048 in the published databases).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import numpy as np

from data.boxes import BoxRule, Layout
from data.lmdb_store import LmdbReader, LmdbWriter, check_name
from data.records import all_finite, read_msgpack, read_npz, write_msgpack, write_npz
from utils.errors import InputError
from utils.files import read_json, save_json, short_repr

_DIMENSIONS = {"features": 2, "norm_bb": 2, "conf": 1}


@dataclass(frozen=True)
class Image:
    """Regions of one image, in falling confidence.

    ``features`` [K, D] as stored (float16 as a rule, read-only); ``boxes`` float32 [K, 7] = ``[x1, y1, x2, y2, w, h, w * h]``
    with the product taken in float32.
    """

    name: str
    features: np.ndarray
    boxes: np.ndarray


class ImageDatabase:
    """The images of one set: the filtered database that fits the rule, or else ``all/``, filtered record by record.

    Opening reads at most the small JSON of box numbers. Raises ``InputError`` when no database fits, when a filtered one lacks
    that JSON, and, on a look-up, for a missing or corrupt record or one that would need pickle.
    """

    def __init__(
        self,
        path: Path | str,
        rule: BoxRule = BoxRule(),  # noqa: B008 - immutable
        *,
        compressed: bool = False,
    ) -> None:
        self.path = Path(path)
        self.rule = rule
        self._read = read_npz if compressed else read_msgpack
        self._kept: dict[str, int] | None = None
        names = [Layout(rule, compressed).folder for rule in (self.rule, None)]
        try:
            name = next((name for name in names if (self.path / name).is_dir()), None)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be entered ({error.strerror})") from error
        if name is None:
            raise InputError(f"{self.path}: no such image database, looked for {' and '.join(names)}; {contents_of(self.path)}")
        self._filtered = name == names[0]
        if self._filtered and not self.rule.fixed:
            self._kept = _read_box_numbers(self.path / Layout(self.rule, compressed).sidecar)
        self._store = LmdbReader(self.path / name)

    def describe(self) -> dict[str, object]:
        """What results should say about where their images came from."""
        return {"path": str(self._store.path), "images": len(self), **asdict(self.rule)}

    def fingerprint(self) -> str:
        """A checksum of what this database holds, as ``LmdbReader.fingerprint`` has it, and of which boxes are taken."""
        taken = [asdict(self.rule), self._kept]
        return hashlib.sha256((self._store.fingerprint() + json.dumps(taken)).encode()).hexdigest()

    def names(self) -> list[str]:
        """Names of all images, in the order of the database's own list if it has one."""
        if "__keys__" not in self._store:
            return list(self._store.keys())
        try:
            names = json.loads(bytes(self._store.get("__keys__")))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self._store.path}: __keys__ is not JSON ({error})") from error
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{self._store.path}: __keys__ is not a list of image names")
        return names

    def __len__(self) -> int:
        return len(self._store)

    def __contains__(self, name: str) -> bool:
        return not self.absent([name])

    def absent(self, names: Collection[str]) -> list[str]:
        """Those of ``names`` that have no record, or no number of boxes."""
        unnumbered = [] if self._kept is None else [name for name in names if name not in self._kept]
        return list(dict.fromkeys(self._store.absent(names) + unnumbered))

    def most_boxes(self, names: Iterable[str]) -> int:
        """How many boxes these images have, or could have: their numbers are known where the database is a filtered one."""
        if self._kept is not None:
            return sum(self._kept.get(name, 0) for name in names)
        return sum(self.rule.num_bb if self.rule.fixed else self.rule.max_bb for _ in names)

    def __getitem__(self, name: str) -> Image:
        record = self._store.get(name)
        try:
            return self._decode(name, record)
        except ValueError as error:
            raise InputError(f"{self._store.path}: image {name!r}: {error}") from error

    def _decode(self, name: str, record: memoryview) -> Image:
        wanted = ("features", "norm_bb") if self._filtered else ("features", "norm_bb", "conf")
        arrays = self._read(record, wanted)
        for key in wanted:
            if key not in arrays:
                raise ValueError(f"has no {key}")
        check_regions(arrays)
        features, norm_bb = arrays["features"], arrays["norm_bb"]
        if not self._filtered:
            kept = self.rule.count(arrays["conf"])
        elif self.rule.fixed:
            kept = min(self.rule.num_bb, len(features))
        else:
            assert self._kept is not None
            if name not in self._kept:
                raise ValueError(f"{Layout(self.rule, False).sidecar} does not name it")
            # The number may be larger than what is stored, where the detector found fewer than min_bb boxes.
            kept = min(self._kept[name], len(features))
        return Image(name, features[:kept], _seven_numbers(norm_bb[:kept]))

    def close(self) -> None:
        """Let go of the database; a later look-up opens it again."""
        self._store.close()


def _seven_numbers(norm_bb: np.ndarray) -> np.ndarray:
    """Boxes as the model takes them: [K, 6] of any precision -> float32 [K, 7], the last being w * h in float32."""
    boxes = np.empty((len(norm_bb), 7), np.float32)
    boxes[:, :6] = norm_bb
    np.multiply(boxes[:, 4], boxes[:, 5], out=boxes[:, 6])
    return boxes


def check_regions(arrays: Mapping[str, np.ndarray]) -> None:
    """``ValueError`` unless the arrays are floating and finite, and have one row for each of at least one box."""
    rows = arrays["features"].shape[:1]
    for name, array in arrays.items():
        if array.dtype.kind != "f":
            raise ValueError(f"{name} has type {array.dtype}, expected floating numbers")
        if array.ndim != _DIMENSIONS.get(name, array.ndim) or 0 in array.shape:
            expected = f"{_DIMENSIONS[name]} dimensions, none" if name in _DIMENSIONS else "no dimension"
            raise ValueError(f"{name} has shape {list(array.shape)}, expected {expected} of them empty")
        if array.shape[:1] != rows:
            raise ValueError(f"{name} has shape {list(array.shape)}, features has {rows[0]} rows")
        if not all_finite(array):
            raise ValueError(f"{name} has numbers that are not finite")
    if arrays["norm_bb"].shape[1] != 6:
        raise ValueError(f"norm_bb has {arrays['norm_bb'].shape[1]} columns, expected 6: x1 y1 x2 y2 w h")


def contents_of(path: Path) -> str:
    """What is in a folder, for a message."""
    if not path.is_dir():
        return "the folder does not exist"
    names = sorted(entry.name for entry in path.iterdir())
    return f"the folder has {', '.join(names[:8])}{', …' if len(names) > 8 else ''}" if names else "the folder is empty"


def _read_box_numbers(file: Path) -> dict[str, int]:
    numbers = read_json(file)
    if not isinstance(numbers, dict):
        raise InputError(f"{file}: expected a JSON object")
    for name, number in numbers.items():
        if type(number) is not int or number < 1:
            raise InputError(f"{file}: {short_repr(name)} has {short_repr(number)}, expected a number of boxes")
    return numbers


def encode_image(
    features: np.ndarray,
    norm_bb: np.ndarray,
    conf: np.ndarray | None = None,
    *,
    rule: BoxRule | None,
    compressed: bool,
    **extra: np.ndarray,
) -> tuple[bytes, int]:
    """The record of one image and the number of boxes in it: in falling confidence, filtered by ``rule``, in half precision.

    ``rule`` None keeps all. ``features`` [K, D], ``norm_bb`` [K, 6], ``conf`` [K] and every ``extra`` have a row for each box.
    Without ``conf`` the first boxes count as the most confident, and all as confident enough; the record then has none.
    Raises ``ValueError``.
    """
    if rule is None and conf is None:
        raise ValueError("has no confidences, which filtering needs when the database is read")
    arrays = {"features": features, "norm_bb": norm_bb, **({} if conf is None else {"conf": conf}), **extra}
    check_regions(arrays)
    confidence = np.full(len(features), np.inf) if conf is None else conf
    if conf is not None and not ((conf >= 0) & (conf < 1.01)).all():
        raise ValueError(f"conf goes from {conf.min():g} to {conf.max():g}, expected confidences from 0 to 1")
    kept = len(features) if rule is None else rule.count(confidence)
    order = np.argsort(-confidence, kind="stable")[:kept]
    with np.errstate(over="ignore"):
        halves = {name: array[order].astype("<f2") for name, array in arrays.items()}
    for name, array in halves.items():
        if not all_finite(array):
            raise ValueError(f"{name} has numbers too large for half precision")
    return (write_npz if compressed else write_msgpack)(halves), kept


class ImageDatabaseWriter:
    """Writes one LMDB folder of an image database, and its JSON of box numbers; they appear when the ``with`` block succeeds.

    ``rule`` None writes every box into ``all/``; ``made``, which may be set meanwhile, is where the database comes from, for
    ``made_<folder>.json``. Raises ``InputError`` when the folder exists, for a name that occurs twice, for
    arrays that are not what ``encode_image`` takes, when no image was put, and when the JSON already there belongs to other
    images.
    """

    def __init__(
        self,
        path: Path | str,
        rule: BoxRule | None = BoxRule(),  # noqa: B008 - immutable
        *,
        compressed: bool = False,
    ) -> None:
        self.path = Path(path)
        self.layout = Layout(rule, compressed)
        self.lmdb_path = self.path / self.layout.folder
        self.made: Mapping[str, object] | None = None
        self._sidecar = self.path / self.layout.sidecar if self.layout.sidecar else None
        self._note = self.path / f"made_{self.layout.folder}.json"
        self._store = LmdbWriter(self.lmdb_path)
        self._kept: dict[str, int] = {}
        self._agreed: dict[str, int] | None = None

    def __enter__(self) -> ImageDatabaseWriter:
        # The compressed and the plain database share one JSON; one that is left of neither may be replaced.
        if self._sidecar and self._sidecar.exists() and (self.path / self.layout.twin.folder).is_dir():
            self._agreed = _read_box_numbers(self._sidecar)
        self._store.__enter__()
        return self

    def put(
        self, name: str, features: np.ndarray, norm_bb: np.ndarray, conf: np.ndarray | None = None, **extra: np.ndarray
    ) -> None:
        """Add one image; the arrays are as for ``encode_image``."""
        try:
            record, kept = encode_image(
                features, norm_bb, conf, rule=self.layout.rule, compressed=self.layout.compressed, **extra
            )
        except ValueError as error:
            raise InputError(f"{self.lmdb_path}: image {name!r}: {error}") from error
        self.put_encoded(name, record, kept)

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    def put_encoded(self, name: str, record: bytes, kept: int) -> None:
        """Add one image that ``encode_image`` has made into a record of ``kept`` boxes, maybe in another process."""
        try:
            check_name(name)
        except ValueError as error:
            raise InputError(f"{self.lmdb_path}: image {name!r} {error}") from error
        if name in self:
            raise InputError(f"{self.lmdb_path}: image {name!r} occurs twice")
        if self._agreed is not None and self._agreed.get(name) != kept:
            self._disagree()
        self._store.put(name, record)
        self._kept[name] = kept

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        new = [file for file in (self._sidecar, self._note) if file is not None and not file.exists()]
        try:
            if kind is None:
                try:
                    self._finish()
                except BaseException as failure:
                    self._store.__exit__(type(failure), failure, failure.__traceback__)
                    raise
            self._store.__exit__(kind, error, trace)
        except BaseException:
            for file in new:
                file.unlink(missing_ok=True)
            raise

    def _finish(self) -> None:
        if not self._kept:
            raise InputError(f"{self.lmdb_path}: there is no image to write")
        self._store.put("__keys__", json.dumps(list(self._kept)).encode())
        if self._agreed not in (None, self._kept):
            self._disagree()
        if self._sidecar:
            save_json(self._sidecar, self._kept, indent=None)
        if self.made is not None:
            save_json(self._note, self.made)

    def _disagree(self) -> NoReturn:
        raise InputError(f"{self._sidecar}: belongs to {self.layout.twin.folder}, which has other images or numbers of boxes")
