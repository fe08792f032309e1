"""What is in a text database, and what is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.checks import is_text_list, take_text, vocabulary_faults
from data.datasets import MAX_TXT_LEN
from data.inspection.reading import Reading, read_map, read_names, read_object
from data.inspection.report import Faults, Report, Summary, share, size_on_disk, spread, table
from data.lmdb_store import LmdbReader
from data.text_db import decode_text
from data.tokenizer import load_tokenizer
from utils.errors import InputError, counted
from utils.files import short_repr

SIDECARS = ("id2len.json", "txt2img.json", "img2txts.json", "meta.json")
_SPECIAL = ("UNK", "CLS", "SEP", "MASK")
_AT_ONCE = 1000


def is_text_database(path: Path) -> bool:
    """Whether a folder has any of the files that a text database has beside its records."""
    return any((path / name).is_file() for name in SIDECARS)


def inspect_texts(path: Path, reading: Reading) -> tuple[Report, dict[str, str] | None]:
    """Report on a text database and return the image of each text, "" if it has none; None if they cannot be read."""
    report = Report("text database", str(path))
    faults = report.faults
    meta = read_object(path / "meta.json", faults)
    vocab_size, unk = (2**63, -1) if meta is None else _read_vocabulary(meta, faults)
    lengths = read_map(path / "id2len.json", "a number of word pieces", lambda n: type(n) is int and 0 <= n < 2**31, faults)
    image_of = read_map(path / "txt2img.json", "an image's name", lambda name: isinstance(name, str), faults)
    texts_of = read_map(path / "img2txts.json", "a list of text ids", is_text_list, faults)
    _compare_sidecars(lengths, image_of, texts_of, faults)
    names, _ = read_names(path, faults)
    if names is not None and lengths is not None:
        present = set(names)
        faults.add_names("texts of id2len.json without a record", (text for text in lengths if text not in present))
        faults.add_names("records that id2len.json lacks", (name for name in names if name not in lengths))
    records = [(name, (lengths or {}).get(name), (image_of or {}).get(name)) for name in reading.chosen(names or [])]
    seen = reading.check(path, partial(_check, vocab_size, unk), records, _AT_ONCE)
    faults.update(seen.faults)

    texts = {text_id: (image_of or {}).get(text_id, "") for text_id in lengths or image_of or {}}
    report.facts["size"] = size_on_disk(path / name for name in ("data.mdb", *SIDECARS))
    report.facts["texts"] = reading.describe(names)
    if of_image := Counter(image for image in texts.values() if image):
        report.facts["images"] = f"{len(of_image):,}, texts: {spread(Counter(of_image.values()), 'per image')}"
    if lengths:
        counts = Counter(lengths.values())
        report.facts["word pieces"] = spread(counts, "per text")
        report.histogram = "word pieces per text", counts
        too_long = share(sum(length > MAX_TXT_LEN for length in lengths.values()), len(lengths), "text")
        report.facts[f"over {MAX_TXT_LEN}"] = f"{too_long}, left out by --max_txt_len {MAX_TXT_LEN}"
    if seen.counts["word pieces"]:
        report.facts["[UNK]"] = share(seen.counts["unknown"], seen.counts["word pieces"], "word piece")
    if caption := seen.examples.get("caption"):
        report.tables["first caption"] = _decoded(caption, meta or {})
    if meta:
        report.tables["provenance and vocabulary, from meta.json"] = table(meta)
    return report, None if image_of is None else texts


def _check(vocab_size: int, unk: int, store: LmdbReader, records: Sequence[tuple[str, int | None, str | None]]) -> Summary:
    """Check records, given as id, length and image by the sidecar files, None if they lack it."""
    summary = Summary()
    for text_id, length, image in records:
        try:
            fields = decode_text(store.get(text_id))
            ids, named = take_text(fields, vocab_size)
        except ValueError as error:
            summary.faults.refuse(text_id, error)
            continue
        if image is not None and named != image:
            example = f"{text_id!r}: img_fname is {short_repr(named)}, txt2img.json has {image!r}"
            summary.faults.add("records of another image than in txt2img.json", example)
        if length is not None and len(ids) != length:
            example = f"{text_id!r}: {counted(len(ids), 'word piece')}, id2len.json has {length}"
            summary.faults.add("records of another length than in id2len.json", example)
        summary.counts.update({"word pieces": len(ids), "unknown": int(np.count_nonzero(ids == unk))})
        if not summary.examples:
            kept = {key: value for key in ("raw", "sentence") if isinstance(value := fields.get(key), str) and value}
            pieces = fields.get("toked_caption")
            if is_text_list(pieces) and pieces:
                kept["toked_caption"] = " ".join(pieces)
            summary.examples["caption"] = {"text": text_id, "image": str(named), **kept, "input_ids": ids.tolist()}
    return summary


def _read_vocabulary(meta: Mapping[str, Any], faults: Faults) -> tuple[int, int]:
    """The size of the vocabulary and the id of [UNK], or values that no text violates."""
    wrong = list(vocabulary_faults(meta, _SPECIAL))
    for fault in wrong:
        faults.add("entries of meta.json that are wrong", fault)
    size = 2**63 if any(fault.startswith("v_range") for fault in wrong) else meta["v_range"][1]
    return size, meta["UNK"] if type(meta.get("UNK")) is int else -1


def _compare_sidecars(
    lengths: Mapping[str, int] | None,
    image_of: Mapping[str, str] | None,
    texts_of: Mapping[str, list[str]] | None,
    faults: Faults,
) -> None:
    """Find contradictions between the JSON files; None stands for one that cannot be read."""
    if lengths is not None and not lengths:
        faults.add("databases without texts", "id2len.json names none")
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


def _decoded(caption: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, str]:
    """Rows for a caption: its fields, and the text of its word pieces."""
    rows = table(caption)
    if "bert-base-cased" in (meta.get("toker"), meta.get("bert")):
        try:
            rows["decoded"] = load_tokenizer().decode(caption["input_ids"])
        except (InputError, IndexError) as error:  # no vocabulary here, or not the one that meta.json names
            rows["decoded"] = f"not possible ({error})"
    return rows
