"""What is in a text database, and what is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.datasets import MAX_TXT_LEN
from data.inspection.faults import Faults
from data.inspection.reading import Reading, read_map, read_object, record_names
from data.inspection.report import Report, share, size_on_disk, spread, table
from data.lmdb_store import LmdbReader
from data.text_db import decode_text, input_ids_of, is_text_list
from data.tokenizer import load_tokenizer
from utils.errors import InputError
from utils.files import short_repr

SIDECARS = ("id2len.json", "txt2img.json", "img2txts.json", "meta.json")
SPECIAL = ("UNK", "CLS", "SEP", "MASK")
AT_ONCE = 1000


@dataclass
class TextSummary:
    """What is said of some records; ``caption`` has the first sound one's fields."""

    texts: int = 0
    pieces: int = 0
    unknown: int = 0
    caption: dict[str, Any] = field(default_factory=dict)
    faults: Faults = field(default_factory=Faults)

    def update(self, other: TextSummary) -> None:
        self.texts += other.texts
        self.pieces += other.pieces
        self.unknown += other.unknown
        self.caption = self.caption or other.caption
        self.faults.update(other.faults)


@dataclass(frozen=True)
class Vocabulary:
    """Which word pieces there are, and which of them stands for what is not there; the defaults are for one unknown."""

    vocab_size: int = 2**63
    unk: int = -1


@dataclass(frozen=True)
class TextCheck:
    """Reads records, each given as its id with its length and its image in the files beside (None where they lack it)."""

    store: LmdbReader
    vocabulary: Vocabulary

    def __call__(self, records: Sequence[tuple[str, int | None, str | None]]) -> TextSummary:
        summary = TextSummary()
        with self.store:
            for text_id, length, image in records:
                try:
                    self._examine(text_id, length, image, summary)
                except ValueError as error:
                    summary.faults.refuse(text_id, error)
        return summary

    def _examine(self, text_id: str, length: int | None, image: str | None, summary: TextSummary) -> None:
        fields = decode_text(self.store.get(text_id))
        numbers = input_ids_of(fields, self.vocabulary.vocab_size)
        named = fields.get("img_fname")
        named = named.decode() if isinstance(named, bytes) else named
        if image is not None and named != image:
            summary.faults.add(
                "records of another image than txt2img.json says",
                f"{text_id!r}: img_fname is {short_repr(named)}, there {image!r}",
            )
        if length is not None and len(numbers) != length:
            summary.faults.add(
                "records of another length than id2len.json says", f"{text_id!r}: {len(numbers)} word pieces, there {length}"
            )
        summary.texts += 1
        summary.pieces += len(numbers)
        summary.unknown += int(np.count_nonzero(numbers == self.vocabulary.unk))
        if not summary.caption:
            kept = {key: value for key in ("raw", "sentence") if isinstance(value := fields.get(key), str) and value}
            pieces = fields.get("toked_caption")
            if is_text_list(pieces) and pieces:
                kept["toked_caption"] = " ".join(pieces)
            summary.caption = {"text": text_id, "image": str(named), **kept, "input_ids": numbers.tolist()}


def inspect_texts(path: Path, reading: Reading) -> tuple[Report, dict[str, str] | None]:
    """The report of a text database, and the image of each text ("" if it has none), None where they cannot be read."""
    report = Report("text database", str(path))
    faults = report.faults
    meta = read_object(path / "meta.json", faults)
    vocabulary = Vocabulary() if meta is None else _read_vocabulary(meta, faults)
    lengths = read_map(path / "id2len.json", "a number of word pieces", lambda n: type(n) is int and 0 <= n < 2**31, faults)
    image_of = read_map(path / "txt2img.json", "an image's name", lambda name: isinstance(name, str), faults)
    texts_of = read_map(path / "img2txts.json", "a list of text ids", is_text_list, faults)
    _compare(lengths, image_of, texts_of, faults)
    names = record_names(path, faults)
    _compare_records(names, lengths, faults)

    chosen = reading.chosen(names or [])
    records = [(name, (lengths or {}).get(name), (image_of or {}).get(name)) for name in chosen]
    seen = TextSummary(faults=faults)
    for summary in reading.summaries(TextCheck(LmdbReader(path), vocabulary), records, AT_ONCE, faults):
        seen.update(summary)

    texts = {text_id: (image_of or {}).get(text_id, "") for text_id in lengths or image_of or {}}
    report.facts["size"] = size_on_disk(path / name for name in ("data.mdb", *SIDECARS))
    report.facts["texts"] = reading.describe(names)
    if of_image := Counter(image for image in texts.values() if image):
        report.facts["images"] = f"{len(of_image):,}, with {spread(Counter(of_image.values()), 'texts each')}"
    if lengths:
        counts = Counter(lengths.values())
        report.facts["word pieces"] = spread(counts, "a text")
        report.histogram = "word pieces of a text", counts
        longest = MAX_TXT_LEN
        over = sum(length > longest for length in lengths.values())
        report.facts[f"over {longest}"] = f"{share(over, len(lengths), 'texts')}, left out by --max_txt_len {longest}"
    if seen.pieces:
        report.facts["[UNK]"] = share(seen.unknown, seen.pieces, "word pieces")
    if seen.caption:
        report.tables["a caption"] = _decoded(seen.caption, meta or {})
    if meta:
        report.tables["provenance and vocabulary, from meta.json"] = table(meta)
    return report, None if image_of is None else texts


def _read_vocabulary(meta: Mapping[str, Any], faults: Faults) -> Vocabulary:
    """What ``meta.json`` says of word pieces."""
    kind, v_range = "entries of meta.json that are wrong", meta.get("v_range")
    size = Vocabulary.vocab_size
    if isinstance(v_range, list) and len(v_range) == 2 and all(type(n) is int for n in v_range) and v_range[1] > 0:
        size = v_range[1]
    else:
        faults.add(kind, f"v_range is {short_repr(v_range)}, expected [first ordinary word piece, size of the vocabulary]")
    special = {name: meta.get(name) for name in SPECIAL}
    for name, number in special.items():
        if type(number) is not int or not 0 <= number < size:
            faults.add(kind, f"{name} is {short_repr(number)}, expected a word piece's number")
    return Vocabulary(size, special["UNK"] if type(special["UNK"]) is int else -1)


def _compare(
    lengths: Mapping[str, int] | None,
    image_of: Mapping[str, str] | None,
    texts_of: Mapping[str, list[str]] | None,
    faults: Faults,
) -> None:
    """Where the files beside the records contradict each other; one that is None cannot be read."""
    if lengths is not None and not lengths:
        faults.add("splits without a text", "id2len.json names none")
    if lengths and image_of is not None:
        faults.add_names("texts of id2len.json that txt2img.json lacks", (text for text in lengths if text not in image_of))
    if texts_of is None:
        return
    times = Counter(text for texts in texts_of.values() for text in texts)
    faults.add_names("texts that img2txts.json lists more than once", (text for text in times if times[text] > 1))
    if lengths:
        faults.add_names("texts of id2len.json that img2txts.json lacks", (text for text in lengths if text not in times))
    if image_of is not None:
        for image, texts in texts_of.items():
            for text in texts:
                if image_of.get(text) != image:
                    example = f"{text!r}: {image!r}, in txt2img.json {image_of.get(text)!r}"
                    faults.add("texts that img2txts.json lists for another image than txt2img.json", example)


def _compare_records(names: Sequence[str] | None, lengths: Mapping[str, int] | None, faults: Faults) -> None:
    """Which texts have no record, and the other way round."""
    if names is None or lengths is None:
        return
    present = set(names)
    faults.add_names("texts of id2len.json without a record", (text for text in lengths if text not in present))
    faults.add_names("records that id2len.json lacks", (name for name in names if name not in lengths))


def _decoded(caption: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, str]:
    """A caption in every form that there is of it."""
    rows = table(caption)
    if "bert-base-cased" in (meta.get("toker"), meta.get("bert")):
        try:
            rows["decoded"] = load_tokenizer().decode(caption["input_ids"])
        except (InputError, IndexError) as error:  # no vocabulary here, or not the one that meta.json names
            rows["decoded"] = f"not possible ({error})"
    return rows
