"""Text databases: LMDB of lz4-compressed msgpack maps, one a caption, with four JSON files beside it (see docs/formats.md)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import lz4.frame
import msgpack
import numpy as np

from data.lmdb_store import LmdbReader, LmdbWriter, check_name
from data.records import MAX_ITEMS, unpack_map
from utils.errors import InputError
from utils.files import read_json, save_json, short_repr

_MAX_RECORD_BYTES = 16 << 20


@dataclass(frozen=True)
class Text:
    """One caption: ``input_ids`` int64 [words] without special tokens; ``extra`` has the record's other fields as they are."""

    id: str
    input_ids: np.ndarray
    image: str
    extra: dict[str, Any]

    @property
    def caption(self) -> str | None:
        """What was tokenised, where the record has kept it, as ``raw`` or as ``sentence``."""
        kept = (self.extra.get(key) for key in ("raw", "sentence"))
        return next((text for text in kept if isinstance(text, str) and text.strip()), None)


class TextDatabase:
    """The captions of one split.

    Attributes:
        ids: the texts, in the order of ``id2len.json``; ``index_of`` is the inverse.
        lengths: (texts,) int32, word pieces of each, from the same file.
        images: names of the images that have a text here, in the order of their first ones.
        image_of: (texts,) int32, index in ``images`` of each text's image; ``image_index`` maps a name to its index.

    Raises:
        InputError: a file is missing, malformed or contradicts another, or there is no text.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise InputError(f"{self.path}: no such text database")
        self._store = LmdbReader(self.path)
        self._read_meta(self.path / "meta.json")
        lengths = _read_map(self.path / "id2len.json", "a number of word pieces", lambda n: type(n) is int and 0 <= n < 2**31)
        if not lengths:
            raise InputError(f"{self.path}: empty split, id2len.json names no text")
        self.ids = list(lengths)
        self.index_of = {text_id: index for index, text_id in enumerate(self.ids)}
        self.lengths = np.fromiter(lengths.values(), np.int32, len(lengths))
        image_of = self._read_images(lengths)
        self.image_index: dict[str, int] = {}
        indices = [self.image_index.setdefault(image_of[text_id], len(self.image_index)) for text_id in lengths]
        self.images = list(self.image_index)
        self.image_of = np.array(indices, np.int32)

    def fingerprint(self) -> str:
        """A checksum of what this database holds, as ``LmdbReader.fingerprint`` has it, and of the files beside it in full."""
        numbers = json.dumps([self._store.fingerprint(), self.vocab_size, self.cls_id, self.sep_id]).encode()
        beside = [numbers, _joined(self.ids), self.lengths.tobytes(), _joined(self.images), self.image_of.tobytes()]
        return hashlib.sha256(b"".join(beside)).hexdigest()

    def _read_meta(self, file: Path) -> None:
        meta = read_json(file)
        if not isinstance(meta, dict):
            raise InputError(f"{file}: expected a JSON object")
        v_range = meta.get("v_range")
        if not (isinstance(v_range, list) and len(v_range) == 2 and all(type(n) is int for n in v_range) and v_range[1] > 0):
            raise InputError(
                f"{file}: v_range is {short_repr(v_range)}, expected [first ordinary word piece, size of the vocabulary]"
            )
        self.vocab_size: int = v_range[1]
        for key in ("CLS", "SEP"):
            if type(meta.get(key)) is not int or not 0 <= meta[key] < self.vocab_size:
                raise InputError(
                    f"{file}: {key} is {short_repr(meta.get(key))}, expected a word piece's number under {self.vocab_size}"
                )
        self.cls_id: int = meta["CLS"]
        self.sep_id: int = meta["SEP"]

    def _read_images(self, texts: Collection[str]) -> dict[str, str]:
        """``txt2img.json``, which ``img2txts.json`` must agree with on all ``texts``."""
        image_file, texts_file = self.path / "txt2img.json", self.path / "img2txts.json"
        image_of: dict[str, str] = _read_map(image_file, "an image's name", lambda name: isinstance(name, str))
        missing = next((text_id for text_id in texts if text_id not in image_of), None)
        if missing is not None:
            raise InputError(f"{image_file}: has no text {short_repr(missing)}, which id2len.json names")
        listed = set()
        for image, of_image in _read_map(texts_file, "a list of text ids", is_text_list).items():
            for text_id in of_image:
                if image_of.get(text_id) != image:
                    raise InputError(
                        f"{texts_file}: lists text {short_repr(text_id)} for {short_repr(image)}, the other files do not"
                    )
            listed.update(of_image)
        missing = next((text_id for text_id in texts if text_id not in listed), None)
        if missing is not None:
            raise InputError(
                f"{texts_file}: does not list text {short_repr(missing)} for its image {short_repr(image_of[missing])}"
            )
        return image_of

    def __len__(self) -> int:
        return len(self.ids)

    def absent(self) -> list[str]:
        """Those of ``ids`` that have no record."""
        return self._store.absent(self.ids)

    def __getitem__(self, text_id: str) -> Text:
        record = self._store.get(text_id)
        try:
            fields = decode_text(record)
            return Text(text_id, input_ids_of(fields, self.vocab_size), self._image(text_id, fields), fields)
        except ValueError as error:
            raise InputError(f"{self.path}: text {text_id!r}: {error}") from error

    def _image(self, text_id: str, fields: dict[str, Any]) -> str:
        image = fields.pop("img_fname", None)
        if isinstance(image, bytes):
            image = image.decode()
        index = self.index_of.get(text_id)
        expected = None if index is None else self.images[self.image_of[index]]
        if image is None or image != expected:
            raise ValueError(f"img_fname is {short_repr(image)}, txt2img.json says {short_repr(expected)}")
        return image

    def close(self) -> None:
        """Let go of the database; a later look-up opens it again."""
        self._store.close()


def _joined(names: list[str]) -> bytes:
    """The UTF-8 of all names and the int64 offsets that separate them, to be hashed."""
    encoded = [name.encode("utf-8", "surrogatepass") for name in names]  # JSON may hold unpaired surrogates
    return b"".join(encoded) + np.cumsum([0, *map(len, encoded)], dtype=np.int64).tobytes()


def input_ids_of(fields: dict[str, Any], vocab_size: int) -> np.ndarray:
    """Takes ``input_ids``, int64 [words], out of a record's map; raises ``ValueError`` when they are not word pieces."""
    numbers = fields.pop("input_ids", None)
    if not isinstance(numbers, list) or not numbers or not all(type(number) is int for number in numbers):
        raise ValueError("input_ids is missing, empty or not a list of integers")
    if min(numbers) < 0 or max(numbers) >= vocab_size:
        wrong = min(numbers) if min(numbers) < 0 else max(numbers)
        raise ValueError(f"word piece {wrong} is outside the vocabulary of {vocab_size}")
    return np.array(numbers, dtype=np.int64)


def is_text_list(value: Any) -> bool:
    """Whether JSON or msgpack has a list of texts."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _read_map(file: Path, meaning: str, fits: Callable[[Any], bool]) -> dict[str, Any]:
    """A JSON object of which every value passes ``fits``; ``meaning`` says what such a value is."""
    contents = read_json(file)
    if not isinstance(contents, dict):
        raise InputError(f"{file}: expected a JSON object")
    for key, value in contents.items():
        if not fits(value):
            raise InputError(f"{file}: {short_repr(key)} has {short_repr(value)}, expected {meaning}")
    return contents


def decode_text(record: memoryview | bytes) -> dict[str, Any]:
    """The map in a record, keys as text; raises ``ValueError``. At most 16 MiB are unpacked."""
    if len(record) > _MAX_RECORD_BYTES:  # whatever is behind the frame's end would be copied
        raise ValueError(f"has {len(record):,} bytes, expected at most {_MAX_RECORD_BYTES:,}")
    frame = lz4.frame.LZ4FrameDecompressor()
    try:
        packed = frame.decompress(record, max_length=_MAX_RECORD_BYTES)
    except RuntimeError as error:
        raise ValueError(f"is not an lz4 frame ({error})") from error
    if not frame.eof:
        full = len(packed) == _MAX_RECORD_BYTES
        raise ValueError(f"unpacks to over {_MAX_RECORD_BYTES:,} bytes" if full else "is cut short (lz4 frame without end)")
    if frame.unused_data:
        raise ValueError(f"has {len(frame.unused_data)} bytes after the end of its lz4 frame")
    fields = unpack_map(packed, unicode_errors="surrogateescape")
    return {key.decode("utf-8", "surrogateescape") if isinstance(key, bytes) else key: value for key, value in fields.items()}


def encode_text(input_ids: Iterable[int], image: str, **fields: Any) -> bytes:
    """The record of one caption: its word pieces without special tokens, its image's name, and fields to keep beside them."""
    record = {"input_ids": [int(number) for number in input_ids], "img_fname": image, **fields}
    return lz4.frame.compress(msgpack.packb(record, use_bin_type=True))


class TextDatabaseWriter:
    """Writes a text database whose folder appears when the ``with`` block succeeds.

    ``meta`` becomes ``meta.json``; it needs ``CLS``, ``SEP``, ``MASK``, ``UNK`` and ``v_range``. Raises ``InputError`` when
    ``path`` exists, for a text id that occurs twice or a text without word pieces, and when no text was put.
    """

    def __init__(self, path: Path | str, meta: Mapping[str, Any]) -> None:
        missing = {"CLS", "SEP", "MASK", "UNK", "v_range"} - set(meta)
        assert not missing, f"meta lacks {missing}"
        self.path = Path(path)
        self._meta = dict(meta)
        self._store = LmdbWriter(self.path)
        self._lengths: dict[str, int] = {}
        self._image_of: dict[str, str] = {}
        self._texts_of: dict[str, list[str]] = {}

    def __enter__(self) -> TextDatabaseWriter:
        self._store.__enter__()
        return self

    def put(self, text_id: str, input_ids: Sequence[int], image: str, **fields: Any) -> None:
        """Add one caption; the others are as for ``encode_text``."""
        self.put_encoded(text_id, image, encode_text(input_ids, image, **fields), len(input_ids))

    def put_encoded(self, text_id: str, image: str, record: bytes, length: int) -> None:
        """Add one caption that ``encode_text`` has made into a record of ``length`` word pieces, maybe in another process."""
        if not length:
            raise InputError(f"{self.path}: text {short_repr(text_id)} of {short_repr(image)} has no word pieces")
        if length > MAX_ITEMS:
            raise InputError(
                f"{self.path}: text {short_repr(text_id)} has {length:,} word pieces, expected at most {MAX_ITEMS:,}"
            )
        for kind, name in (("text id", text_id), ("image", image)):
            try:
                check_name(name)
            except ValueError as error:
                raise InputError(f"{self.path}: {kind} {short_repr(name)} {error}") from error
        if text_id in self._lengths:
            raise InputError(f"{self.path}: text id {text_id!r} occurs twice")
        self._store.put(text_id, record)
        self._lengths[text_id] = length
        self._image_of[text_id] = image
        self._texts_of.setdefault(image, []).append(text_id)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            try:
                self._write_sidecars()
            except BaseException as failure:
                self._store.__exit__(type(failure), failure, failure.__traceback__)
                raise
        self._store.__exit__(kind, error, trace)

    def _write_sidecars(self) -> None:
        if not self._lengths:
            raise InputError(f"{self.path}: empty split, there is no text to write")
        save_json(self._store.folder / "meta.json", self._meta, indent=None)
        save_json(self._store.folder / "id2len.json", self._lengths, indent=None)
        save_json(self._store.folder / "txt2img.json", self._image_of, indent=None)
        save_json(self._store.folder / "img2txts.json", self._texts_of, indent=None)
