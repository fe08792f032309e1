"""Image databases: LMDB folders of region features and boxes, filtered by confidence (see docs/formats.md).

Shapes: K boxes per image, D numbers per feature (2048 in the published databases).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from data.boxes import PUBLISHED_RULE, BoxRule, Layout, parse_layout
from data.checks import BOX_COUNTS, all_finite, check_regions, is_text_list, read_map
from data.lmdb_store import LmdbReader, LmdbWriter, check_name
from data.records import read_msgpack, read_npz, write_msgpack, write_npz
from utils.errors import InputError
from utils.files import save_json, short_repr


@dataclass(frozen=True)
class Image:
    """Regions of one image, in decreasing confidence.

    ``features`` [K, D] as stored (usually float16, read-only); ``boxes`` float32 [K, 7] = ``[x1, y1, x2, y2, w, h, w * h]``
    with the product taken in float32.
    """

    name: str
    features: np.ndarray
    boxes: np.ndarray


class ImageDatabase:
    """The images of one set: the filtered database that fits the rule, or else ``all/``, filtered record by record.

    Opening reads at most the small JSON of box counts. Raises ``InputError`` if no database fits, if a filtered one lacks that
    JSON, and, on a look-up, for a missing or corrupt record or one that would need pickle.
    """

    def __init__(self, path: Path | str, rule: BoxRule = PUBLISHED_RULE, *, compressed: bool = False) -> None:
        if not isinstance(path, str | Path):
            raise InputError(f"path is {short_repr(path)}, expected the folder of an image database")
        self.path = Path(path)
        self.rule = rule
        self._read = read_npz if compressed else read_msgpack
        self._kept: dict[str, int] | None = None
        names = [Layout(rule, compressed).folder for rule in (self.rule, None)]
        try:
            name = next((name for name in names if (self.path / name).is_dir()), None)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be opened ({error.strerror})") from error
        if name is None:
            raise InputError(f"{self.path}: no such image database, looked for {' and '.join(names)}; {contents_of(self.path)}")
        self._filtered = name == names[0]
        if self._filtered and not self.rule.fixed:
            self._kept = read_map(self.path / Layout(self.rule, compressed).sidecar, BOX_COUNTS)
        self._store = LmdbReader(self.path / name)

    def describe(self) -> dict[str, object]:
        """Return where the images come from, for the results made of them."""
        return {"path": str(self._store.path), "images": len(self), **asdict(self.rule)}

    def fingerprint(self) -> str:
        """Return a checksum of the database, as ``LmdbReader.fingerprint``, and of which boxes are read."""
        taken = [asdict(self.rule), self._kept]
        return hashlib.sha256((self._store.fingerprint() + json.dumps(taken)).encode()).hexdigest()

    def names(self) -> list[str]:
        """Return the names of all images, in the order of the database's own list if it has one."""
        listed = listed_names(self._store)
        return self._store.keys() if listed is None else listed

    def __len__(self) -> int:
        return len(self._store)

    def __contains__(self, name: str) -> bool:
        return isinstance(name, str) and not self.absent([name])

    def absent(self, names: Collection[str]) -> list[str]:
        """Return those of ``names`` that have no record or no box count."""
        uncounted = [] if self._kept is None else [name for name in names if name not in self._kept]
        return list(dict.fromkeys(self._store.absent(names) + uncounted))

    def most_boxes(self, names: Iterable[str]) -> int:
        """Return an upper bound on the boxes that these images have together."""
        most = self.rule.num_bb if self.rule.fixed else self.rule.max_bb
        return sum(most if self._kept is None else self._kept.get(name, 0) for name in names)

    def __getitem__(self, name: str) -> Image:
        if not isinstance(name, str):
            raise InputError(f"{self.path}: image {short_repr(name)}: expected the name of an image")
        record = self._store.get(name)
        wanted = ("features", "norm_bb") if self._filtered else ("features", "norm_bb", "conf")
        try:
            if self._kept is not None and name not in self._kept:
                raise ValueError(f"{Layout(self.rule, False).sidecar} does not name it")
            arrays = self._read(record, wanted)
            check_regions(arrays, wanted)
        except ValueError as error:
            raise InputError(f"{self._store.path}: image {name!r}: {error}") from error
        if not self._filtered:
            kept = self.rule.count(arrays["conf"])
        else:  # may be more than are stored: the detector may have found fewer than min_bb
            kept = self.rule.num_bb if self._kept is None else self._kept[name]
        return Image(name, arrays["features"][:kept], _seven_numbers(arrays["norm_bb"][:kept]))

    def close(self) -> None:
        """Release the database; a later look-up opens it again."""
        self._store.close()


def _seven_numbers(norm_bb: np.ndarray) -> np.ndarray:
    """Boxes as the model takes them: [K, 6] of any precision -> float32 [K, 7], the last being w * h in float32."""
    boxes = np.empty((len(norm_bb), 7), np.float32)
    boxes[:, :6] = norm_bb
    np.multiply(boxes[:, 4], boxes[:, 5], out=boxes[:, 6])
    return boxes


def listed_names(store: LmdbReader) -> list[str] | None:
    """Return the database's own list of its images, ``__keys__``, or None if it has none. Raises ``InputError``."""
    if "__keys__" not in store:
        return None
    try:
        names = json.loads(bytes(store.get("__keys__")))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{store.path}: __keys__ is not JSON ({error})") from error
    if not is_text_list(names):
        raise InputError(f"{store.path}: __keys__ is not a list of image names")
    return names


def contents_of(path: Path) -> str:
    """Describe what is in a folder, for an error message, with the options that read the first image database in it."""
    if not path.is_dir():
        return "the folder does not exist"
    names, hint = sorted(entry.name for entry in path.iterdir()), ""
    for name in reversed(names):
        with suppress(InputError):
            hint = f"; {parse_layout(name).options} reads {name}"
    return f"the folder has {', '.join(names[:8])}{', …' if len(names) > 8 else ''}{hint}" if names else "the folder is empty"


def encode_image(
    features: np.ndarray,
    norm_bb: np.ndarray,
    conf: np.ndarray | None = None,
    *,
    rule: BoxRule | None,
    compressed: bool,
    **extra: np.ndarray,
) -> tuple[bytes, int]:
    """Return the record of one image, in decreasing confidence and half precision, and the number of boxes in it.

    The boxes are ``features`` [K, D], ``norm_bb`` [K, 6], ``conf`` [K], and ``extra`` arrays of one row per box; ``rule`` None
    keeps all. Without ``conf`` they are taken to be in order and confident enough, and the record has no confidences. Raises
    ``ValueError`` for what ``check_regions`` refuses, confidences outside [0, 1], and numbers too large for float16.
    """
    if rule is None and conf is None:
        raise ValueError("has no confidences, which filtering needs when the database is read")
    arrays = {"features": features, "norm_bb": norm_bb, **({} if conf is None else {"conf": conf}), **extra}
    check_regions(arrays)
    if conf is not None and not ((conf >= 0) & (conf < 1.01)).all():
        raise ValueError(f"conf goes from {conf.min():g} to {conf.max():g}, expected confidences from 0 to 1")
    confidence = np.full(len(features), np.inf) if conf is None else conf
    kept = len(features) if rule is None else rule.count(confidence)
    order = np.argsort(-confidence, kind="stable")[:kept]
    with np.errstate(over="ignore"):
        halves = {name: array[order].astype("<f2") for name, array in arrays.items()}
    for name, array in halves.items():
        if not all_finite(array):
            raise ValueError(f"{name} has numbers too large for half precision")
    return (write_npz if compressed else write_msgpack)(halves), kept


class ImageDatabaseWriter:
    """Writes one LMDB folder of an image database and its JSON of box counts; both appear when the ``with`` block succeeds.

    ``rule`` None writes every box into ``all/``. ``made``, set before the block ends, is the provenance to write to
    ``made_<folder>.json``. Raises ``InputError`` if the folder exists, for a name that occurs twice, for arrays that
    ``encode_image`` refuses, if no image was put, and if the JSON that is already there belongs to other images.
    """

    def __init__(self, path: Path | str, rule: BoxRule | None = PUBLISHED_RULE, *, compressed: bool = False) -> None:
        self.path = Path(path)
        self.layout = Layout(rule, compressed)
        self.lmdb_path = self.path / self.layout.folder
        self.made: Mapping[str, object] | None = None
        self._sidecar = self.path / self.layout.sidecar if self.layout.sidecar else None
        self._twin = self.path / Layout(rule, not compressed).folder
        self._note = self.path / f"made_{self.layout.folder}.json"
        self._store = LmdbWriter(self.lmdb_path, self._finish)
        self._kept: dict[str, int] = {}
        self._agreed: dict[str, int] | None = None

    def __enter__(self) -> ImageDatabaseWriter:
        # The compressed and the plain database share one JSON; it may be replaced if neither of them exists any more.
        if self._sidecar and self._sidecar.exists() and self._twin.is_dir():
            self._agreed = read_map(self._sidecar, BOX_COUNTS)
        self._store.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        new = [file for file in (self._sidecar, self._note) if file is not None and not file.exists()]
        try:
            self._store.__exit__(*exception)
        except BaseException:
            for file in new:
                file.unlink(missing_ok=True)
            raise

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    def put(self, name: str, *arrays: np.ndarray, **named: Any) -> None:
        """Add one image; for the arrays see ``encode_image``."""
        try:
            record, kept = encode_image(*arrays, **named, rule=self.layout.rule, compressed=self.layout.compressed)
        except ValueError as error:
            raise InputError(f"{self.lmdb_path}: image {name!r}: {error}") from error
        self.put_encoded(name, record, kept)

    def put_encoded(self, name: str, record: bytes, kept: int) -> None:
        """Add an image that ``encode_image`` has made into a record of ``kept`` boxes, possibly in another process."""
        check_name(name, f"{self.lmdb_path}: image {name!r} ")
        if name in self:
            raise InputError(f"{self.lmdb_path}: image {name!r} occurs twice")
        if self._agreed is not None and self._agreed.get(name) != kept:
            self._disagree()
        self._store.put(name, record)
        self._kept[name] = kept

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
        raise InputError(
            f"{self._sidecar}: belongs to {self._twin.name}, which has other images or numbers of boxes; choose another output"
        )
