"""scripts/inspect_db.py: every fault put into a sound database is named, and nothing else is."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import lz4.frame
import msgpack
import numpy as np
import pytest
from PIL import Image as Picture

from data.boxes import BoxRule, parse_layout
from data.image_db import ImageDatabaseWriter
from data.inspection import reading
from data.inspection.report import bins
from data.lmdb_store import LmdbReader
from data.records import read_msgpack, write_msgpack
from data.text_db import TextDatabaseWriter, encode_text
from data.tokenizer import load_tokenizer
from scripts.inspect_db import main
from tests.conftest import BUNDLED
from utils.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "feat_th0.2_max6_min2"
NBB = "nbb_th0.2_max6_min2.json"
RULE = {"conf_th": 0.2, "max_bb": 6, "min_bb": 2, "num_bb": 4}
ROWS = [6, 3, 6, 4, 5, 2]
IMAGES = [f"made_{number:012d}.npz" for number in range(len(ROWS))]
CAPTIONS = ["Two dogs run.", "A red circle is left of a small blue square."]

Arrays = dict[str, np.ndarray]


def regions(rows: int, seed: int) -> Arrays:
    random = np.random.default_rng(seed)
    corners = np.sort(random.random((rows, 2, 2)), axis=1)
    return {
        "features": np.maximum(random.standard_normal((rows, 8)), 0),
        "norm_bb": np.concatenate([corners[:, 0], corners[:, 1], corners[:, 1] - corners[:, 0]], axis=1),
        "conf": np.linspace(0.9, 0.3, rows),
        "soft_labels": random.random((rows, 5)),
    }


def write_images(path: Path, *, keep_all: bool = False, compressed: bool = False, **options: Any) -> None:
    with ImageDatabaseWriter(path, None if keep_all else BoxRule(**{**RULE, **options}), compressed=compressed) as writer:
        for number, name in enumerate(IMAGES):
            writer.put(name, **regions(ROWS[number], number))


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair of databases in which nothing is wrong."""
    folder = tmp_path_factory.mktemp("sound")
    write_images(folder / "images")
    tokenizer = load_tokenizer()
    with TextDatabaseWriter(folder / "texts.db", {**tokenizer.meta(), "annotations": "made.json"}) as writer:
        for number in range(2 * len(IMAGES)):
            raw = CAPTIONS[number % 2]
            ids = tokenizer.encode(raw)
            writer.put(str(number), ids, IMAGES[number // 2], raw=raw, toked_caption=tokenizer.tokens(ids))
    return folder


@pytest.fixture
def pair(sound: Path, tmp_path: Path) -> Path:
    """A copy of it to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "pair"))


class Inspection:
    """How the program ended, what it printed, and how often it found each kind of fault."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> None:
        capsys.readouterr()
        self.code: Any = 0
        try:
            main(["--nproc", "1", *map(str, arguments)])
        except SystemExit as stop:
            self.code = stop.code
        self.output, self.errors = capsys.readouterr()
        _, _, self.list = self.output.partition("\nWRONG\n")
        found = re.findall(r"^ {4} *([\d,]+)  (\S.*)$", self.list, re.MULTILINE)
        self.faults = {kind: int(count) for count, kind in found}
        assert self.code == 2 or bool(self.faults) == (self.code == 1)
        assert ("\nNothing is wrong.\n" in self.output) == (self.code == 0)


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Callable[..., Inspection]:
    return lambda *arguments: Inspection(capsys, *arguments)


def put(folder: Path, key: str, value: bytes | None) -> None:
    """Replace a record, or remove it."""
    with lmdb.open(str(folder), map_size=1 << 26, lock=False) as environment, environment.begin(write=True) as transaction:
        if value is None:
            assert transaction.delete(key.encode())
        else:
            transaction.put(key.encode(), value)


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    """Change what a JSON file holds, in place or to what ``change`` returns."""
    contents = json.loads(file.read_text())
    changed = change(contents)
    file.write_text(json.dumps(contents if changed is None else changed))


# ---- sound databases


def test_what_is_in_a_sound_pair(pair: Path, inspect: Callable[..., Inspection]) -> None:
    (pair / "images" / f"made_{FOLDER}.json").write_text('{"source": "npz", "options": {"conf_th": 0.2}, "left_out": []}')
    seen = inspect(pair / "images", pair / "texts.db")
    assert seen.code == 0
    words = re.sub(r" +", " ", seen.output)
    for line in (
        "texts 12",
        "images 6, with 2 texts each",
        "word pieces 4 to 11 a text, 7.5 on average",
        "over 60 0 of 12 texts (0.00%), left out by --max_txt_len 60",
        "[UNK] 0 of 90 word pieces (0.00%)",
        "raw Two dogs run.",
        "toked_caption Two dogs run .",
        "decoded Two dogs run .",
        "annotations made.json",
        "made of boxes of confidence over 0.2, 2 to 6 an image, as msgpack",
        "images 6",
        "boxes 2 to 6 an image, 4.3 on average",
        "features 8 numbers a box, float16",
        "source npz",
        "options.conf_th 0.2",
        "left_out []",
        "images there 6 of 6 images that the texts name (100.00%)",
        "texts fit 12 of 12 texts have their image (100.00%)",
    ):
        assert f" {line}\n" in words, line
    stored = [read_record(pair, name) for name in IMAGES]
    for label, arrays in (
        ("features", [record["features"] for record in stored]),
        ("x1 y1 x2 y2", [record["norm_bb"][:, :4] for record in stored]),
        ("w h", [record["norm_bb"][:, 4:] for record in stored]),
        ("conf", [record["conf"] for record in stored]),
    ):
        values = np.concatenate([array.ravel() for array in arrays]).astype(np.float64)
        row = f"{values.min():.4g} {values.mean():.4g} {values.max():.4g} {(values == 0).mean():.1%}"
        assert f" {label} {row}\n" in words
    assert re.search(r"^ +4 +6 +50\.0%  █+$", seen.output, re.MULTILINE)


def read_record(pair: Path, name: str) -> Arrays:
    with LmdbReader(pair / "images" / FOLDER) as store:
        return read_msgpack(bytes(store.get(name)), ("features", "norm_bb", "conf", "soft_labels"))


def test_golden_databases_are_sound(inspect: Callable[..., Inspection]) -> None:
    for arguments in ([BUNDLED.text_db, BUNDLED.image_db], [BUNDLED.text_db], [BUNDLED.image_db]):
        assert inspect(*arguments).code == 0
    folder = next(BUNDLED.image_db.glob("feat*"))
    assert f"IMAGE DATABASE  {folder}\n" in inspect(folder, BUNDLED.text_db).output


def test_every_database_of_a_folder_is_inspected(tmp_path: Path, inspect: Callable[..., Inspection]) -> None:
    layouts: list[dict[str, Any]] = [{}, {"conf_th": -1}, {"keep_all": True}]
    for layout in layouts:
        write_images(tmp_path, **layout)
        write_images(tmp_path, **layout, compressed=True)
    seen = inspect(tmp_path)
    assert seen.code == 0
    assert re.findall(r"^IMAGE DATABASE  .*/(.*)$", seen.output, re.MULTILINE) == [
        name + suffix for name in ("all", "feat_numbb4", FOLDER) for suffix in ("", "_compressed")
    ]
    for line in ("every box, as compressed .npz", "the 4 most confident boxes, as msgpack"):
        assert f" {line}\n" in seen.output
    put(tmp_path / "feat_numbb4_compressed", IMAGES[2], b"PK")
    assert inspect(tmp_path).faults == {"records that are refused: is not an .npz ...": 1}
    assert inspect(tmp_path / "feat_numbb4").code == 0


@pytest.mark.parametrize(
    "rule", [BoxRule(), BoxRule(0.0, 36, 36), BoxRule(1e-5), BoxRule(0.125, 50, 1), BoxRule(-1, num_bb=100)]
)
def test_layouts_are_the_inverse_of_names(rule: BoxRule) -> None:
    for suffix in ("", "_compressed"):
        read = parse_layout(rule.folder + suffix)
        assert read.rule is not None
        assert (read.rule.folder, read.rule.fixed, read.compressed) == (rule.folder, rule.fixed, suffix != "")
        if not rule.fixed:
            assert read.rule == rule
            assert read.sidecar == f"nbb_{rule.suffix}.json"


@pytest.mark.parametrize("name", ["feat", "feat_th0_max6_min2", "feat_th0.2_max2_min6", "feat_numbb0", "feat_numbb036", "allx"])
def test_no_other_name_is_a_layout(name: str) -> None:
    with pytest.raises(InputError):
        parse_layout(name)


def test_bins() -> None:
    assert bins({7: 2}) == [(7, 7, 2)]
    assert bins({3: 1, 5: 4}) == [(3, 3, 1), (4, 4, 0), (5, 5, 4)]
    counts = {number: number for number in range(10, 101)}
    gathered = bins(counts)
    assert [first for first, *_ in gathered] == list(range(10, 101, 5))
    assert sum(total for *_, total in gathered) == sum(counts.values())


# ---- faults of a text database


def text(**changes: Any) -> bytes:
    """The record of text 3, changed."""
    return encode_text(**{"input_ids": load_ids(1), "image": IMAGES[1], **changes})


def load_ids(number: int) -> list[int]:
    return load_tokenizer().encode(CAPTIONS[number])


def same(value: Any) -> Callable[[Path], None]:
    return lambda folder: put(folder, "3", value)


def json_edit(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / name, change)


def overwrite(name: str, contents: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(contents)


def repeat_key(folder: Path) -> None:
    file = folder / "id2len.json"
    file.write_text(file.read_text().replace('{"0": 4', '{"5": 4, "0": 4'))


META = "entries of meta.json that are wrong"
REFUSED = "records that are refused: "
UNREADABLE = "files that cannot be read"

TEXT_FAULTS: dict[str, tuple[Callable[[Path], object], dict[str, int], str]] = {
    **{
        f"no {name}": (lambda folder, name=name: (folder / name).unlink(), {UNREADABLE: 1}, f"{name}: no such file")
        for name in ("data.mdb", "id2len.json", "txt2img.json", "img2txts.json", "meta.json")
    },
    "not JSON": (overwrite("txt2img.json", "{"), {UNREADABLE: 1}, "txt2img.json: not JSON"),
    "no object": (overwrite("img2txts.json", "[]"), {UNREADABLE: 1}, "img2txts.json: expected a JSON object"),
    "key twice": (repeat_key, {"keys that id2len.json has more than once": 1}, "        '5'\n"),
    "no split": (
        overwrite("id2len.json", "{}"),
        {"splits without a text": 1, "records that id2len.json lacks": 12},
        "  '7'\n          and 2 more\n",
    ),
    "no length": (
        json_edit("id2len.json", lambda lengths: lengths.update({"3": "11"})),
        {"entries of id2len.json that are not a number of word pieces": 1, "records that id2len.json lacks": 1},
        "'3' has '11'",
    ),
    "other length": (
        json_edit("id2len.json", lambda lengths: lengths.update({"3": 12})),
        {"records of another length than id2len.json says": 1},
        "'3': 11 word pieces, there 12",
    ),
    "no record": (same(None), {"texts of id2len.json without a record": 1}, "        '3'\n"),
    "not of id2len": (
        json_edit("id2len.json", lambda lengths: {key: value for key, value in lengths.items() if key != "3"}),
        {"records that id2len.json lacks": 1},
        "        '3'\n",
    ),
    "not of txt2img": (
        json_edit("txt2img.json", lambda images: {key: value for key, value in images.items() if key != "3"}),
        {
            "texts of id2len.json that txt2img.json lacks": 1,
            "texts that img2txts.json lists for another image than txt2img.json": 1,
        },
        f"'3': '{IMAGES[1]}', in txt2img.json None",
    ),
    "not of img2txts": (
        json_edit("img2txts.json", lambda texts: texts[IMAGES[1]].remove("3")),
        {"texts of id2len.json that img2txts.json lacks": 1},
        "        '3'\n",
    ),
    "listed twice": (
        json_edit("img2txts.json", lambda texts: texts[IMAGES[1]].append("3")),
        {"texts that img2txts.json lists more than once": 1},
        "        '3'\n",
    ),
    "listed for two images": (
        json_edit("img2txts.json", lambda texts: texts[IMAGES[0]].append("3")),
        {
            "texts that img2txts.json lists more than once": 1,
            "texts that img2txts.json lists for another image than txt2img.json": 1,
        },
        f"'3': '{IMAGES[0]}', in txt2img.json '{IMAGES[1]}'",
    ),
    "other image": (
        lambda folder: put(folder, "3", text(image="other.npz")),
        {"records of another image than txt2img.json says": 1},
        f"'3': img_fname is 'other.npz', there '{IMAGES[1]}'",
    ),
    "outside the vocabulary": (
        lambda folder: put(folder, "3", text(input_ids=[5, 28996])),
        {REFUSED + "word piece ... is outside the vocabulary of ...": 1},
        "'3': word piece 28996 is outside the vocabulary of 28996",
    ),
    "empty": (
        lambda folder: put(folder, "3", text(input_ids=[])),
        {REFUSED + "input_ids is missing, empty or not a list of integers": 1},
        "        '3'\n",
    ),
    "not lz4": (same(b"no frame"), {REFUSED + "is not an lz4 frame ...": 1}, "'3': is not an lz4 frame (LZ4F"),
    "not a map": (
        same(lz4.frame.compress(msgpack.packb([1]))),
        {REFUSED + "is a msgpack list, expected a map": 1},
        "        '3'\n",
    ),
    "no range": (json_edit("meta.json", lambda meta: meta.update(v_range=[106])), {META: 1}, "v_range is [106], expected"),
    "no MASK": (json_edit("meta.json", lambda meta: meta.pop("MASK") and meta), {META: 1}, "MASK is None, expected"),
    "no meta": (overwrite("meta.json", "{}"), {META: 5}, "CLS is None, expected"),
}


@pytest.mark.parametrize("fault", TEXT_FAULTS)
def test_text_fault_is_named(pair: Path, inspect: Callable[..., Inspection], fault: str) -> None:
    damage, kinds, line = TEXT_FAULTS[fault]
    damage(pair / "texts.db")
    seen = inspect(pair / "texts.db")
    assert seen.code == 1
    assert seen.faults == kinds
    assert line in seen.list
    assert f"  text database {pair / 'texts.db'}\n" in seen.list


# ---- faults of an image database


def change_record(key: str, change: Callable[[np.ndarray], np.ndarray | None]) -> Callable[[Path], None]:
    """Change an array of the second image, in place or to what ``change`` returns."""

    def damage(folder: Path) -> None:
        record = {name: array.copy() for name, array in read_record(folder.parent, IMAGES[1]).items()}
        changed = change(record[key])
        record[key] = record[key] if changed is None else changed
        put(folder / FOLDER, IMAGES[1], write_msgpack(record))

    return damage


def without(key: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        record = read_record(folder.parent, IMAGES[1])
        del record[key]
        put(folder / FOLDER, IMAGES[1], write_msgpack(record))

    return damage


def cell(*place: int, to: float) -> Callable[[np.ndarray], None]:
    return lambda array: array.__setitem__(place, to)


def put_keys(value: Any) -> Callable[[Path], None]:
    return lambda folder: put(folder / FOLDER, "__keys__", value if isinstance(value, bytes) else json.dumps(value).encode())


def numbers(change: Callable[[dict[str, int]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / NBB, change)


NOT_FINITE = "images whose {} has numbers that are not finite"
OTHER_NUMBER = f"images with another number of boxes than {NBB} says"
SHAPES = "boxes whose w h are not x2 - x1 and y2 - y1"

IMAGE_FAULTS: dict[str, tuple[Callable[[Path], object], dict[str, int], str]] = {
    "no numbers": (lambda folder: (folder / NBB).unlink(), {UNREADABLE: 1}, f"{NBB}: no such file"),
    "no data": (lambda folder: (folder / FOLDER / "data.mdb").unlink(), {UNREADABLE: 1}, "data.mdb: no such file"),
    "name twice": (
        lambda folder: (folder / NBB).write_text((folder / NBB).read_text().replace("{", f'{{"{IMAGES[1]}": 3, ', 1)),
        {f"keys that {NBB} has more than once": 1},
        f"        '{IMAGES[1]}'\n",
    ),
    "no number": (
        numbers(lambda boxes: boxes.update({IMAGES[1]: 0})),
        {f"entries of {NBB} that are not a number of boxes": 1, f"images that {NBB} lacks": 1},
        f"'{IMAGES[1]}' has 0",
    ),
    "unnumbered": (numbers(lambda boxes: boxes.pop(IMAGES[1]) and boxes), {f"images that {NBB} lacks": 1}, f"'{IMAGES[1]}'\n"),
    "numbered in vain": (
        numbers(lambda boxes: boxes.update({"x.npz": 3})),
        {f"images of {NBB} without a record": 1},
        "        'x.npz'\n",
    ),
    "fewer than numbered": (
        numbers(lambda boxes: boxes.update({IMAGES[1]: 4})),
        {OTHER_NUMBER: 1},
        f"'{IMAGES[1]}': 3, there 4",
    ),
    "more than numbered": (
        numbers(lambda boxes: boxes.update({IMAGES[1]: 2})),
        {OTHER_NUMBER: 1},
        f"'{IMAGES[1]}': 3, there 2",
    ),
    "no record": (
        lambda folder: put(folder / FOLDER, IMAGES[1], None),
        {f"images of {NBB} without a record": 1, "images of __keys__ without a record": 1},
        f"        '{IMAGES[1]}'\n",
    ),
    "not listed": (put_keys(IMAGES[1:]), {"images that __keys__ lacks": 1}, f"        '{IMAGES[0]}'\n"),
    "listed twice": (
        put_keys([*IMAGES, IMAGES[4]]),
        {"images that __keys__ lists more than once": 1},
        f"        '{IMAGES[4]}'\n",
    ),
    "list of numbers": (put_keys([1, 2]), {"lists __keys__ that are not of image names": 1}, "[1, 2]"),
    "list not JSON": (put_keys(b"\x80\x04"), {"lists __keys__ that are not JSON": 1}, "decode"),
    "not msgpack": (
        lambda folder: put(folder / FOLDER, IMAGES[1], b"\x82\xa1"),
        {REFUSED + "is not a msgpack record ...": 1},
        f"'{IMAGES[1]}': is not a msgpack record (",
    ),
    "no boxes": (without("norm_bb"), {REFUSED + "has no norm_bb": 1}, f"        '{IMAGES[1]}'\n"),
    "integers": (
        change_record("features", lambda array: array.astype(np.int16)),
        {REFUSED + "features has type int16, expected floating numbers": 1},
        f"        '{IMAGES[1]}'\n",
    ),
    "other rows": (
        change_record("conf", lambda array: array[:2]),
        {REFUSED + "conf has shape ..., features has ... rows": 1},
        f"'{IMAGES[1]}': conf has shape [2], features has 3 rows",
    ),
    "five columns": (
        change_record("norm_bb", lambda array: array[:, :5]),
        {REFUSED + "norm_bb has ... columns, expected ...: x1 y1 x2 y2 w h": 1},
        f"'{IMAGES[1]}': norm_bb has 5 columns",
    ),
    "features NaN": (
        change_record("features", cell(1, 2, to=np.nan)),
        {NOT_FINITE.format("features"): 1},
        f"        '{IMAGES[1]}'\n",
    ),
    "boxes infinite": (
        change_record("norm_bb", cell(1, 2, to=np.inf)),
        {NOT_FINITE.format("norm_bb"): 1},
        f"        '{IMAGES[1]}'\n",
    ),
    "conf NaN": (change_record("conf", cell(1, to=np.nan)), {NOT_FINITE.format("conf"): 1}, f"        '{IMAGES[1]}'\n"),
    "soft labels": (
        change_record("soft_labels", lambda array: array[:2]),
        {"images whose soft_labels are not one row a box": 1},
        f"'{IMAGES[1]}': shape [2, 5], 3 boxes",
    ),
    "outside": (
        change_record("norm_bb", lambda array: np.array([*array[:2], [0.5, 0.5, 1.25, 1, 0.75, 0.5]], np.float16)),
        {"images with boxes outside [0, 1]": 1},
        f"'{IMAGES[1]}': box 2 is 0.5 0.5 1.25 1 0.75 0.5",
    ),
    "negative": (
        change_record("norm_bb", lambda array: np.array([[0, -0.25, 1, 0.5, 1, 0.75], *array[1:]], np.float16)),
        {"images with boxes outside [0, 1]": 1},
        f"'{IMAGES[1]}': box 0 is 0 -0.25 1 0.5 1 0.75",
    ),
    "turned round": (
        change_record("norm_bb", lambda array: np.array([*array[:2], [0.5, 0.5, 0.75, 0.25, 0.25, 0.25]], np.float16)),
        {"images with boxes of x2 < x1 or y2 < y1": 1, f"images with {SHAPES}": 1},
        f"'{IMAGES[1]}': box 2 is 0.5 0.5 0.75 0.25 0.25 0.25",
    ),
    "other width": (
        change_record("norm_bb", lambda array: np.array([*array[:2], [0, 0, 0.5, 0.5, 0.5, 0.25]], np.float16)),
        {f"images with {SHAPES}": 1},
        f"'{IMAGES[1]}': box 2 is 0 0 0.5 0.5 0.5 0.25",
    ),
    "unsorted": (
        change_record("conf", lambda array: np.array([0.75, 0.25, 0.5], np.float16)),
        {"images whose boxes are not in falling confidence": 1},
        f"'{IMAGES[1]}': 0.25 of box 1, then 0.5",
    ),
    "too sure": (
        change_record("conf", lambda array: np.array([1.5, 0.5, 0.25], np.float16)),
        {"images with confidences outside [0, 1]": 1},
        f"'{IMAGES[1]}': 1.5 of box 0",
    ),
    "other features": (
        change_record("features", lambda array: array[:, :4]),
        {"different widths of features": 2},
        f"4 numbers in 1 images, the first of them '{IMAGES[1]}'",
    ),
    "more than the name says": (
        lambda folder: [
            (folder / FOLDER).rename(folder / "feat_th0.2_max5_min2"),
            (folder / NBB).rename(folder / "nbb_th0.2_max5_min2.json"),
        ],
        {"images with more boxes than the folder's name allows": 2},
        f"'{IMAGES[2]}': 6",
    ),
    "name of no layout": (
        lambda folder: (folder / FOLDER).rename(folder / "feat_0.2"),
        {"folders that nothing reads": 1},
        "feat_0.2: no name of an image database",
    ),
    "provenance": (overwrite(f"made_{FOLDER}.json", "1"), {UNREADABLE: 1}, f"made_{FOLDER}.json: expected a JSON object"),
}


@pytest.mark.parametrize("fault", IMAGE_FAULTS)
def test_image_fault_is_named(pair: Path, inspect: Callable[..., Inspection], fault: str) -> None:
    damage, kinds, line = IMAGE_FAULTS[fault]
    damage(pair / "images")
    seen = inspect(pair / "images")
    assert seen.code == 1
    assert seen.faults == kinds
    assert line in seen.list


def test_all_faults_of_a_record_are_listed_and_no_more_than_ten_examples(
    pair: Path, inspect: Callable[..., Inspection]
) -> None:
    with ImageDatabaseWriter(pair / "many", BoxRule(**RULE)) as writer:
        for number in range(12):
            arrays = regions(4, number)
            writer.put(f"{number:02}.npz", **arrays)
    for number in range(12):
        arrays = {name: array.astype(np.float16) for name, array in regions(4, number).items()}
        arrays["features"][0, 0], arrays["conf"][3], arrays["norm_bb"][2, 0] = np.inf, 1, -1
        put(pair / "many" / FOLDER, f"{number:02}.npz", write_msgpack(arrays))
    seen = inspect(pair / "many")
    assert seen.faults == {
        NOT_FINITE.format("features"): 12,
        "images with boxes outside [0, 1]": 12,
        f"images with {SHAPES}": 12,
        "images whose boxes are not in falling confidence": 12,
    }
    assert seen.list.count("  and 2 more\n") == 4
    assert re.findall(r"^ +'(\d+)\.npz'$", seen.list, re.MULTILINE) == [f"{number:02}" for number in range(10)]
    assert re.search(r"^ +conf +[\d.]+ +[\d.]+ +1 +0.0%$", seen.output, re.MULTILINE)
    assert "    features  " not in seen.output.partition("smallest")[2]  # no range without a finite array


def test_what_is_no_fault(pair: Path, inspect: Callable[..., Inspection]) -> None:
    folder = pair / "images"
    # The detector found fewer than min_bb boxes: published numbers are then min_bb.
    single = {name: array.astype(np.float16) for name, array in regions(1, 3).items()}
    put(folder / FOLDER, IMAGES[5], write_msgpack(single))
    # Rounded to half precision, which has no number between 1 and 1.001.
    rounded = {name: array.copy() for name, array in read_record(pair, IMAGES[0]).items()}
    rounded["norm_bb"][0] = [0.10006, 0.20013, 1.0006, 0.7001, 1.0006 - 0.10006, 0.7001 - 0.20013]
    del rounded["conf"], rounded["soft_labels"]
    put(folder / FOLDER, IMAGES[0], write_msgpack(rounded))
    put(folder / FOLDER, "__keys__", None)
    seen = inspect(folder)
    assert seen.code == 0
    assert "few boxes    1 of 6 images (16.67%)" in seen.output
    assert "confidences  none in 1 of 6 images (16.67%)" in seen.output
    write_images(folder, keep_all=True)
    put(folder / "all", IMAGES[0], write_msgpack(rounded))
    assert inspect(folder).faults == {REFUSED + "has no conf": 1}
    edit(folder / "nbb.json", lambda boxes: boxes.update({IMAGES[5]: 3}))
    assert inspect(folder / "all").faults["images with another number of boxes than nbb.json says"] == 1
    (folder / "nbb.json").unlink()
    assert inspect(folder / "all").faults == {REFUSED + "has no conf": 1}


# ---- pairs


def test_images_that_are_missing(pair: Path, inspect: Callable[..., Inspection]) -> None:
    write_images(pair / "others", conf_th=-1)
    put(pair / "others/feat_numbb4", IMAGES[1], None)
    put(pair / "others/feat_numbb4", "new.npz", write_msgpack(read_record(pair, IMAGES[0])))
    put(pair / "others/feat_numbb4", "__keys__", json.dumps([IMAGES[0], *IMAGES[2:], "new.npz"]).encode())
    seen = inspect(pair / "texts.db", pair / "others")
    assert seen.faults == {
        "images with more boxes than the folder's name allows": 1,
        "images that texts name and the image database lacks": 1,
        "texts without an image": 2,
    }
    assert f"'{IMAGES[1]}', of 2 texts\n" in seen.list
    assert "'2'\n" in seen.list
    assert "'3'\n" in seen.list
    assert "images there  5 of 6 images that the texts name (83.33%)" in seen.output
    assert "no text       1 of 6 images (16.67%)" in seen.output


def test_a_text_of_no_image_and_an_image_without_texts(pair: Path, inspect: Callable[..., Inspection]) -> None:
    edit(pair / "texts.db/txt2img.json", lambda images: images.pop("3") and images)
    edit(pair / "texts.db/img2txts.json", lambda texts: texts[IMAGES[1]].remove("3"))
    seen = inspect(pair / "texts.db", pair / "images")
    assert seen.faults.pop("texts without an image") == 1
    assert set(seen.faults) == {"texts of id2len.json that txt2img.json lacks", "texts of id2len.json that img2txts.json lacks"}
    # A database that cannot be read is one fault, not as many as there are texts.
    (pair / "images" / FOLDER / "data.mdb").write_bytes(b"")
    (pair / "texts.db/txt2img.json").unlink()
    assert "texts without an image" not in inspect(pair / "texts.db", pair / "images").faults


# ---- damaged pages, and workers that are killed


def test_damaged_pages_are_a_fault(pair: Path, inspect: Callable[..., Inspection]) -> None:
    file = pair / "texts.db/data.mdb"
    data = bytearray(file.read_bytes())
    for page in range(2, len(data) // 4096):
        data[4096 * page + 10 : 4096 * page + 12] = b"\xff\xff"  # the flags, which say of what kind it is
    file.write_bytes(data)
    seen = inspect(pair / "texts.db")
    assert seen.faults == {UNREADABLE: 1}
    assert f"{file}: page " in seen.list
    assert "texts        cannot be read\n" in seen.output


def test_a_worker_that_is_killed_is_a_fault(
    tmp_path: Path, inspect: Callable[..., Inspection], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ImageDatabaseWriter(tmp_path, BoxRule(**RULE)) as writer:
        for number in range(70):
            writer.put(f"{number:012d}.npz", **{**regions(4, number), "features": np.ones((4, 1024))})
    file = tmp_path / FOLDER / "data.mdb"
    # A value that claims two gigabytes: who reads it leaves the file.
    node = struct.pack("<IHH", len(read_value(tmp_path / FOLDER, f"{40:012d}.npz")), 1, 16) + f"{40:012d}.npz".encode()
    data = file.read_bytes()
    assert node in data
    file.write_bytes(data.replace(node, struct.pack("<I", 2**31 - 1) + node[4:]))
    monkeypatch.setattr(reading, "check_pages", lambda file: None)
    seen = inspect(tmp_path, "--nproc", 2)
    assert seen.faults == {"records that could not be read to the end": 1}
    assert re.search(r"after \d+ of 70: --nproc: a worker was killed", seen.list)


def read_value(folder: Path, key: str) -> bytes:
    with LmdbReader(folder) as store:
        return bytes(store.get(key))


# ---- options


def test_sample(pair: Path, inspect: Callable[..., Inspection]) -> None:
    for name in IMAGES:
        put(pair / "images" / FOLDER, name, b"")
    for options, read in (([], 6), (["--sample", 6], 6), (["--sample", 4], 4)):
        seen = inspect(pair / "images", pair / "texts.db", *options)
        assert sum(seen.faults.values()) == read
        assert inspect(pair / "texts.db", pair / "images", *options).list == seen.list
    assert re.search(r"^  images +6, of which a sample of 4 was read$", seen.output, re.MULTILINE)
    assert re.search(r"^  texts +12, of which a sample of 4 was read$", seen.output, re.MULTILINE)
    assert "6 of 6 images that the texts name" in seen.output
    edit(pair / "images" / NBB, lambda boxes: boxes.pop(IMAGES[1]) and boxes)
    assert inspect(pair / "images", "--sample", 1).faults[f"images that {NBB} lacks"] == 1


def test_plot(pair: Path, inspect: Callable[..., Inspection]) -> None:
    plot = pair / "seen.png"
    plot.write_text("an older one")
    put(pair / "texts.db", "3", b"")
    assert inspect(pair / "texts.db", pair / "images", "--plot", plot).code == 1
    with Picture.open(plot) as picture:
        assert picture.format == "PNG"
        assert picture.size[0] > 1000
        colours = np.asarray(picture.convert("RGB"))
    drawn = (colours == (0x31, 0x68, 0x8E)).all(axis=2)
    half = len(drawn) // 2
    assert drawn[:half].mean() > 0.05  # lengths above, boxes and ranges below
    assert drawn[half:].mean() > 0.05
    assert [file.name for file in pair.iterdir() if file.name.startswith(".")] == []
    # Nothing to draw is drawn as well.
    (pair / "images" / FOLDER / "data.mdb").unlink()
    assert inspect(pair / "images", "--plot", plot).code == 1
    with Picture.open(plot) as picture:
        assert picture.size[0] > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: neither a text database nor an image database; the folder does not exist"),
        (["."], ": neither a text database nor an image database; the folder has bare.db, images, texts.db"),
        (["texts.db", "texts.db"], "texts.db: two text databases, expected a text and an image database"),
        (["images", f"images/{FOLDER}"], f"{FOLDER}: two image databases, expected a text and an image database"),
        (["texts.db", "images", "--sample", "0"], "--sample 0: expected at least 1"),
        (["texts.db", "--plot", "nowhere/seen.png"], "nowhere/seen.png: cannot be written (No such file or directory)"),
        (["bare.db"], "bare.db: no name of an image database, expected one like feat_th0.2_max100_min10"),
    ],
)
def test_refusals(pair: Path, inspect: Callable[..., Inspection], words: list[str], message: str) -> None:
    (pair / "bare.db").mkdir()
    shutil.copy(pair / "texts.db/data.mdb", pair / "bare.db")
    seen = inspect(*(word if word.startswith("--") or word.isdigit() else pair / word for word in words))
    assert seen.code == 2
    assert message in seen.errors
    assert seen.errors.count("\n") == 1
    assert seen.output == ""


def test_program_in_ascii_and_in_several_processes(pair: Path, inspect: Callable[..., Inspection]) -> None:
    ids = load_ids(1)
    with TextDatabaseWriter(pair / "many.db", load_tokenizer().meta()) as writer:
        for number in range(2500):
            writer.put(f"{number:04}", ids[: 1 + number % 11], f"é{number // 5}.npz", raw="Un café,\x1b[31m s'il vous plaît.")
    put(pair / "many.db", "0002", b"")
    put(pair / "many.db", "2499", b"")
    edit(pair / "many.db/id2len.json", lambda lengths: lengths.update({"1500": 40}))
    done = subprocess.run(
        [sys.executable, "scripts/inspect_db.py", str(pair / "many.db"), "--nproc", "2"],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "72"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, b"")
    report, _, faults = done.stdout.decode("ascii").partition("\nWRONG\n")
    assert "raw        Un caf\\xe9, [31m s'il vous pla\\xeet.\n" in report
    assert re.search(r"^ +1-4 +911 +36\.4%  #{37}$", report, re.MULTILINE)
    assert max(map(len, re.sub(r"\S*many\.db", "", report).splitlines())) <= 72
    assert re.findall(r"\d+  .*|'\d+'.*", faults) == [
        "2  records that are refused: is cut short ...",
        "'0002': is cut short (lz4 frame without end)",
        "'2499': is cut short (lz4 frame without end)",
        "1  records of another length than id2len.json says",
        "'1500': 5 word pieces, there 40",
    ]
    in_one_process = inspect(pair / "many.db")
    assert in_one_process.list.splitlines()[1:] == faults.splitlines()[1:]
