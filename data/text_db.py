"""Text databases: LMDB of lz4-compressed msgpack maps, one per caption, and four JSON files (see docs/formats.md)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lz4.frame
import msgpack
import numpy as np

from data.checks import IMAGE_NAMES, LENGTHS, TEXT_IDS, read_map, take_text, vocabulary_faults
from data.lmdb_store import LmdbReader, LmdbWriter, check_name
from data.records import MAX_ITEMS, unpack_map
from utils.errors import InputError, counted
from utils.files import read_object, save_json, short_repr

_MAX_RECORD_BYTES = 16 << 20


@dataclass(frozen=True)
class Text:
    """One caption: ``input_ids`` int64 [words] without special tokens; ``extra`` has the record's other fields unchanged."""

    id: str
    input_ids: np.ndarray
    image: str
    extra: dict[str, Any]

    @property
    def caption(self) -> str | None:
        """The text before tokenisation, if the record keeps it as ``raw`` or ``sentence``."""
        kept = (self.extra.get(key) for key in ("raw", "sentence"))
        return next((text for text in kept if isinstance(text, str) and text.strip()), None)


class TextDatabase:
    """The captions of one split.

    Attributes:
        meta: what ``meta.json`` has.
        ids: the texts, in the order of ``id2len.json``; ``index_of`` is the inverse.
        lengths: (texts,) int32, word pieces of each, from the same file.
        images: names of the images that have a text here, in the order of their first texts; ``image_index`` is the inverse.
        image_of: (texts,) int32, index in ``images`` of each text's image.

    Raises ``InputError`` if a file is missing, malformed or contradicts another, and if there is no text.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise InputError(f"{self.path}: no such folder; expected a text database, such as itm_flickr30k_test.db")
        self._store = LmdbReader(self.path)
        self.meta = meta = read_object(self.path / "meta.json")
        for fault in vocabulary_faults(meta, ("CLS", "SEP")):
            raise InputError(f"{self.path / 'meta.json'}: {fault}")
        self.vocab_size, self.cls_id, self.sep_id = int(meta["v_range"][1]), int(meta["CLS"]), int(meta["SEP"])
        lengths = read_map(self.path / "id2len.json", LENGTHS)
        if not lengths:
            raise InputError(f"{self.path}: empty split, id2len.json names no text")
        self.ids = list(lengths)
        self.index_of = {text_id: index for index, text_id in enumerate(self.ids)}
        self.lengths = np.fromiter(lengths.values(), np.int32, len(lengths))
        image_of = self._read_images()
        self.image_index: dict[str, int] = {}
        indices = [self.image_index.setdefault(image_of[text_id], len(self.image_index)) for text_id in self.ids]
        self.images = list(self.image_index)
        self.image_of = np.array(indices, np.int32)

    def fingerprint(self) -> str:
        """Return a checksum of the database: ``LmdbReader.fingerprint``, and the files beside it in full."""
        numbers = json.dumps([self._store.fingerprint(), self.vocab_size, self.cls_id, self.sep_id]).encode()
        beside = [numbers, _joined(self.ids), self.lengths.tobytes(), _joined(self.images), self.image_of.tobytes()]
        return hashlib.sha256(b"".join(beside)).hexdigest()

    def _read_images(self) -> dict[str, str]:
        """Read the image of each text from ``img2txts.json``, with which ``txt2img.json`` must agree on all ``ids``.

        The result shares one string per image; the values of ``txt2img.json`` are one string per text, which would fill memory.
        """
        image_file, texts_file = self.path / "txt2img.json", self.path / "img2txts.json"
        image_of = read_map(image_file, IMAGE_NAMES)
        listed: dict[str, str] = {}
        for image, text_ids in read_map(texts_file, TEXT_IDS).items():
            listed.update(dict.fromkeys(text_ids, image))
            for text_id in text_ids:
                if image_of.get(text_id) != image:
                    wrong = f"lists text {short_repr(text_id)} for image {short_repr(image)}"
                    raise InputError(f"{texts_file}: {wrong}, but txt2img.json has {short_repr(image_of.get(text_id))}")
        for file, known in ((image_file, image_of), (texts_file, listed)):
            for text_id in self.ids:
                if text_id not in known:
                    raise InputError(f"{file}: lacks text {short_repr(text_id)}, which id2len.json names")
        return listed

    def __len__(self) -> int:
        return len(self.ids)

    def absent(self) -> list[str]:
        """Return those of ``ids`` that have no record."""
        return self._store.absent(self.ids)

    def __getitem__(self, text_id: str) -> Text:
        record = self._store.get(text_id)
        index = self.index_of.get(text_id)
        expected = None if index is None else self.images[self.image_of[index]]
        try:
            fields = decode_text(record)
            input_ids, image = take_text(fields, self.vocab_size)
            if image is None or image != expected:
                raise ValueError(f"img_fname is {short_repr(image)}, txt2img.json says {short_repr(expected)}")
        except ValueError as error:
            raise InputError(f"{self.path}: text {text_id!r}: {error}") from error
        return Text(text_id, input_ids, image, fields)

    def close(self) -> None:
        """Release the database; a later look-up opens it again."""
        self._store.close()


def _joined(names: list[str]) -> bytes:
    """The UTF-8 of all names and the int64 offsets that separate them, for a checksum."""
    encoded = [name.encode("utf-8", "surrogatepass") for name in names]  # JSON may hold unpaired surrogates
    return b"".join(encoded) + np.cumsum([0, *map(len, encoded)], dtype=np.int64).tobytes()


def decode_text(record: memoryview | bytes) -> dict[str, Any]:
    """Return the map in a record, with keys as text; at most 16 MiB are unpacked. Raises ``ValueError``."""
    if len(record) > _MAX_RECORD_BYTES:  # lz4 would copy whatever follows the end of the frame
        raise ValueError(f"has {counted(len(record), 'byte')}, expected at most {_MAX_RECORD_BYTES:,}")
    frame = lz4.frame.LZ4FrameDecompressor()
    try:
        packed = frame.decompress(record, max_length=_MAX_RECORD_BYTES)
    except RuntimeError as error:
        raise ValueError(f"is not an lz4 frame ({error})") from error
    if not frame.eof:
        full = len(packed) == _MAX_RECORD_BYTES
        raise ValueError(f"unpacks to over {_MAX_RECORD_BYTES:,} bytes" if full else "is cut short (lz4 frame without end)")
    if frame.unused_data:
        raise ValueError(f"has {counted(len(frame.unused_data), 'byte')} after the end of its lz4 frame")
    fields = unpack_map(packed, unicode_errors="surrogateescape")
    return {key.decode("utf-8", "surrogateescape") if isinstance(key, bytes) else key: value for key, value in fields.items()}


def encode_text(input_ids: Iterable[int], image: str, **fields: Any) -> bytes:
    """Return the record of one caption: word-piece ids without special tokens, its image's name, and any other ``fields``."""
    record = {"input_ids": [int(number) for number in input_ids], "img_fname": image, **fields}
    return lz4.frame.compress(msgpack.packb(record, use_bin_type=True))


class TextDatabaseWriter:
    """Writes a text database whose folder appears when the ``with`` block succeeds.

    ``meta``, as ``WordPieceTokenizer.meta`` makes it, becomes ``meta.json``. Raises ``InputError`` if ``path`` exists, for a
    text id that occurs twice, for a text without word pieces, and if no text was put.
    """

    def __init__(self, path: Path | str, meta: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._meta = dict(meta)
        self._store = LmdbWriter(self.path, self._write_sidecars)
        self._lengths: dict[str, int] = {}
        self._image_of: dict[str, str] = {}
        self._texts_of: dict[str, list[str]] = {}

    def __enter__(self) -> TextDatabaseWriter:
        self._store.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._store.__exit__(*exception)

    def put(self, text_id: str, input_ids: Sequence[int], image: str, **fields: Any) -> None:
        """Add one caption; for the arguments see ``encode_text``."""
        self.put_encoded(text_id, image, encode_text(input_ids, image, **fields), len(input_ids))

    def put_encoded(self, text_id: str, image: str, record: bytes, length: int, where: str = "") -> None:
        """Add a caption that ``encode_text`` has made into a record of ``length`` word pieces, possibly in another process.

        ``where`` it comes from is for messages.
        """
        where = where or str(self.path)
        if not 0 < length <= MAX_ITEMS:
            wrong = f"has {length:,} word pieces, expected at most {MAX_ITEMS:,}" if length else "has no word pieces"
            raise InputError(f"{where}: text {short_repr(text_id)} of {short_repr(image)} {wrong}")
        check_name(text_id, f"{where}: text id {short_repr(text_id)} ")
        check_name(image, f"{where}: image {short_repr(image)} ")
        if text_id in self._lengths:
            raise InputError(f"{where}: text id {text_id!r} occurs twice")
        self._store.put(text_id, record)
        self._lengths[text_id] = length
        self._image_of[text_id] = image
        self._texts_of.setdefault(image, []).append(text_id)

    def _write_sidecars(self) -> None:
        if not self._lengths:
            raise InputError(f"{self.path}: empty split, there is no text to write")
        sidecars = {"meta": self._meta, "id2len": self._lengths, "txt2img": self._image_of, "img2txts": self._texts_of}
        for name, contents in sidecars.items():
            save_json(self._store.folder / f"{name}.json", contents, indent=None)
