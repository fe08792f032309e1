"""Each fault put into a sound text database is named, and nothing else is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import lz4.frame
import msgpack
import pytest

from data.text_db import encode_text
from tests.data.inspection.databases import IMAGES, UNREADABLE, edit, inspect, put, write_pair

REFUSED, META = "records that are refused: ", "entries of meta.json that are wrong"
IDS = [146] * 4  # as many as a text of even number has

# The record, the fault that it is, and how the list of faults shows it after the text's id.
RECORDS: list[tuple[bytes, str, str]] = [
    (encode_text(IDS, "x.npz"), "records of another image than in txt2img.json", ": img_fname is 'x.npz', txt2img.json has 'm"),
    (encode_text(IDS[1:], IMAGES[1]), "records of another length than in id2len.json", ": 3 word pieces, id2len.json has 4"),
    (encode_text([5, 28996], IMAGES[2]), REFUSED + "word piece ... is outside the vocabulary of ...", ": word piece 28996"),
    (encode_text([], IMAGES[3]), REFUSED + "input_ids is missing, empty or not a list of integers", ""),
    (b"no frame", REFUSED + "is not an lz4 frame ...", ": is not an lz4 frame (LZ4F"),
    (lz4.frame.compress(msgpack.packb([1])), REFUSED + "is a msgpack list, expected a map", ""),
]


def test_each_fault_of_a_record_is_named(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    for number, (record, _, _) in enumerate(RECORDS):
        put(pair / "texts.db", str(2 * number), record)
    seen = inspect(pair / "texts.db")
    assert seen.faults == Counter(kind for _, kind, _ in RECORDS)
    for number, (_, _, shown) in enumerate(RECORDS):
        assert f"'{2 * number}'{shown}" in seen.list


def test_files_that_contradict_each_other(tmp_path: Path) -> None:
    folder = write_pair(tmp_path) / "texts.db"

    def change_lists(texts: dict[str, list[str]]) -> None:
        texts[IMAGES[1]] = ["2"]  # of 2 and 3
        texts[IMAGES[2]].append("4")
        texts[IMAGES[0]].append("6")

    edit(folder / "img2txts.json", change_lists)
    edit(folder / "txt2img.json", lambda images: images.pop("7") and images)
    edit(folder / "id2len.json", lambda lengths: lengths.pop("8") and {**lengths, "9": "11", "new": 4})
    (folder / "id2len.json").write_text((folder / "id2len.json").read_text().replace('{"0": 4', '{"5": 4, "0": 4'))
    put(folder, "1", None)
    seen = inspect(folder)
    assert seen.faults == {
        "keys that id2len.json has more than once": 1,
        "entries of id2len.json that are not a number of word pieces": 1,
        "texts of id2len.json that txt2img.json lacks": 2,
        "texts of id2len.json that img2txts.json lacks": 2,
        "texts that img2txts.json lists more than once": 2,
        "texts that img2txts.json lists for another image than txt2img.json": 2,
        "texts of id2len.json without a record": 2,
        "records that id2len.json lacks": 2,
    }
    named = ["'5'", "'9' has '11'", "'7'", "'new'", "'3'", "'4'", "'1'"]
    other = [f"'6': '{IMAGES[0]}', in txt2img.json '{IMAGES[3]}'", f"'7': '{IMAGES[3]}', in txt2img.json None"]
    assert {*named, *other} <= {line.strip() for line in seen.list.split("\n")}


VOCABULARY = '{"v_range": [106, 28996], "UNK": 1, "CLS": 2, "SEP": 3, "MASK": 4}'


@pytest.mark.parametrize(
    ("name", "contents", "faults", "line"),
    [
        ("id2len.json", None, {UNREADABLE: 1}, "id2len.json: no such"),
        ("txt2img.json", None, {UNREADABLE: 1}, "txt2img.json: no such"),
        ("img2txts.json", None, {UNREADABLE: 1}, "img2txts.json: no such"),
        ("meta.json", None, {UNREADABLE: 1}, "meta.json: no such"),
        ("data.mdb", None, {UNREADABLE: 1}, "data.mdb: no such file"),
        ("txt2img.json", "{", {UNREADABLE: 1}, "txt2img.json: not JSON"),
        ("img2txts.json", "[]", {UNREADABLE: 1}, "img2txts.json: contains a JSON list, expected a JSON object"),
        ("id2len.json", "{}", {"databases without texts": 1, "records that id2len.json lacks": 12}, "and 2 more\n"),
        ("meta.json", "{}", {META: 5}, "CLS is None, expected"),
        ("meta.json", VOCABULARY.replace(", 28996", ""), {META: 1}, "v_range is [106], expected"),
        ("meta.json", VOCABULARY.replace("4", "-4"), {META: 1}, "MASK is -4, expected"),
    ],
)
def test_faults_of_files(tmp_path: Path, name: str, contents: str | None, faults: dict[str, int], line: str) -> None:
    file = write_pair(tmp_path) / "texts.db" / name
    file.unlink()
    if contents is not None:
        file.write_text(contents)
    seen = inspect(file.parent)
    assert seen.faults == faults
    assert line in seen.list
