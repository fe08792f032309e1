"""Each fault put into a sound image database is named, and nothing else is; so is what does not fit the texts."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.boxes import BoxRule, parse_layout
from data.image_db import ImageDatabaseWriter
from data.records import write_msgpack
from tests.data.inspection.databases import (
    FOLDER,
    IMAGES,
    NBB,
    RULE,
    UNREADABLE,
    Arrays,
    edit,
    inspect,
    put,
    read_record,
    regions,
    write_images,
    write_pair,
)  # fmt: skip
from utils.errors import InputError

REFUSED, NOT_FINITE = "records that are refused: ", "images whose {} has numbers that are not finite"
OUTSIDE, TURNED = "images with boxes outside [0, 1]", "images with boxes of x2 < x1 or y2 < y1"
SHAPES, RISING = (
    "images with boxes whose w h are not x2 - x1 and y2 - y1",
    "images whose boxes are not in descending confidence",
)
SOUND = {name: array.astype(np.float16) for name, array in regions(3, 0).items()}


def last_box(*numbers: float) -> Arrays:
    return {"norm_bb": np.array([*SOUND["norm_bb"][:2], numbers], np.float16)}


def conf(*numbers: float) -> Arrays:
    return {"conf": np.array(numbers, np.float16)}


def with_number(key: str, number: float) -> Arrays:
    array = SOUND[key].copy()
    array.reshape(-1)[1] = number
    return {key: array}


# What is changed in a record, the faults that this is, and how the list of faults shows it after the record's name.
RECORDS: list[tuple[Arrays | bytes, list[str], str]] = [
    (b"\x82\xa1", [REFUSED + "is not a msgpack record ..."], ": is not a msgpack record ("),
    (write_msgpack({"features": SOUND["features"]}), [REFUSED + "has no norm_bb"], ""),
    ({"features": np.ones((3, 8), np.int16)}, [REFUSED + "features has type int16, expected floating-point numbers"], ""),
    (conf(0.5, 0.25), [REFUSED + "conf has shape ..., features has ... rows"], ": conf has shape [2], features has 3 rows"),
    (
        {"norm_bb": SOUND["norm_bb"][:, :5]},
        [REFUSED + "norm_bb has ... columns, expected ...: x1 y1 x2 y2 w h"],
        ": norm_bb has 5",
    ),
    (with_number("features", np.nan), [NOT_FINITE.format("features")], ""),
    (with_number("norm_bb", np.inf), [NOT_FINITE.format("norm_bb")], ""),
    (with_number("conf", np.nan), [NOT_FINITE.format("conf")], ""),
    ({"soft_labels": np.ones((2, 5), np.float16)}, ["images whose soft_labels are not one row per box"], ": shape [2, 5], b"),
    (last_box(0.5, 0.5, 1.25, 1, 0.75, 0.5), [OUTSIDE], ": box 2 has norm_bb 0.5 0.5 1.25 1 0.75 0.5"),
    (last_box(0, -0.25, 1, 0.5, 1, 0.75), [OUTSIDE], ": box 2 has norm_bb 0 -0.25 1 0.5 1 0.75"),
    (last_box(0.5, 0.5, 0.75, 0.25, 0.25, 0.25), [TURNED, SHAPES], ": box 2 has norm_bb 0.5 0.5 0.75 0.25 0.25 0.25"),
    (last_box(0, 0, 0.5, 0.5, 0.5, 0.25), [SHAPES], ": box 2 has norm_bb 0 0 0.5 0.5 0.5 0.25"),
    (conf(0.75, 0.25, 0.5), [RISING], ": box 2 has conf 0.5"),
    (conf(1.5, 0.5, 0.25), ["images with confidences outside [0, 1]"], ": box 0 has conf 1.5"),
    ({"features": SOUND["features"][:, :4]}, ["different numbers of features"] * 2, ""),
]


def test_each_fault_of_a_record_is_named(tmp_path: Path) -> None:
    names = [f"{number:02}.npz" for number in range(len(RECORDS))]
    with ImageDatabaseWriter(tmp_path, BoxRule(**RULE)) as writer:
        for name in names:
            writer.put(name, **regions(3, 0))
    for name, (changed, _, _) in zip(names, RECORDS, strict=True):
        put(tmp_path / FOLDER, name, changed if isinstance(changed, bytes) else write_msgpack({**SOUND, **changed}))
    seen = inspect(tmp_path)
    assert seen.faults == Counter(kind for _, kinds, _ in RECORDS for kind in kinds)
    for name, (_, _, shown) in zip(names, RECORDS, strict=True):
        assert f"'{name}'{shown}" in seen.list
    assert f"4 per box in 1 image, the first of them '{names[-1]}'\n" in seen.list


def test_box_numbers_and_the_list_of_names(tmp_path: Path) -> None:
    folder = write_pair(tmp_path) / "images"
    boxes = {IMAGES[1]: 4, IMAGES[2]: 5, IMAGES[3]: 0, "x.npz": 3}  # 3, 6 and 4 are there
    edit(folder / NBB, lambda numbers: {IMAGES[0]: numbers[IMAGES[0]], **boxes, IMAGES[5]: 2})
    (folder / NBB).write_text((folder / NBB).read_text().replace("{", f'{{"{IMAGES[0]}": 3, ', 1))
    put(folder / FOLDER, "__keys__", json.dumps([IMAGES[0], IMAGES[0], *IMAGES[2:]]).encode())
    put(folder / FOLDER, IMAGES[5], None)
    seen = inspect(folder)
    assert seen.faults == {
        f"keys that {NBB} has more than once": 1,
        f"entries of {NBB} that are not a number of boxes": 1,
        f"images of {NBB} without a record": 2,
        f"images that {NBB} lacks": 2,
        "images that __keys__ lists more than once": 1,
        "images of __keys__ without a record": 1,
        "images that __keys__ lacks": 1,
        f"images with another number of boxes than in {NBB}": 2,
    }
    for line in (f"'{IMAGES[1]}': 3, {NBB} has 4", f"'{IMAGES[2]}': 6, {NBB} has 5", f"'{IMAGES[3]}' has 0", "'x.npz'"):
        assert f" {line}\n" in seen.list


def rename(folder: Path, suffix: str) -> None:
    (folder / FOLDER).rename(folder / f"feat_{suffix}")
    (folder / NBB).rename(folder / f"nbb_{suffix}.json")


@pytest.mark.parametrize(
    ("damage", "kind", "line"),
    [
        (lambda folder: (folder / NBB).unlink(), UNREADABLE, f"{NBB}: no such file"),
        (lambda folder: (folder / FOLDER / "data.mdb").unlink(), UNREADABLE, "data.mdb: no such file"),
        (lambda folder: (folder / f"made_{FOLDER}.json").write_text("1"), UNREADABLE, f"made_{FOLDER}.json: contains"),
        (lambda folder: put(folder / FOLDER, "__keys__", b"[1, 2]"), "lists __keys__ that are not of image names", "[1, 2]"),
        (lambda folder: put(folder / FOLDER, "__keys__", b"\x80"), "lists __keys__ that are not JSON", "decode"),
        (lambda folder: rename(folder, "0.2"), "folders whose name no program reads", "feat_0.2"),
        (lambda folder: rename(folder, "th0.2_max5_min2"), "images with more boxes than the folder's name allows", IMAGES[2]),
    ],
)
def test_faults_of_files(tmp_path: Path, damage: Callable[[Path], object], kind: str, line: str) -> None:
    folder = write_pair(tmp_path) / "images"
    damage(folder)
    seen = inspect(folder)
    assert seen.faults == {kind: 2 if "more boxes" in kind else 1}
    assert line in seen.list


def test_no_more_than_ten_examples_of_a_kind(tmp_path: Path) -> None:
    with ImageDatabaseWriter(tmp_path, BoxRule(**RULE)) as writer:
        for number in range(12):
            writer.put(f"{number:02}.npz", **regions(4, number))
    for number in range(12):
        arrays = {name: array.astype(np.float16) for name, array in regions(4, number).items()}
        arrays["features"][0, 0], arrays["conf"][3], arrays["norm_bb"][2, 0] = np.inf, 1, -1
        put(tmp_path / FOLDER, f"{number:02}.npz", write_msgpack(arrays))
    seen = inspect(tmp_path)
    assert seen.faults == dict.fromkeys((NOT_FINITE.format("features"), OUTSIDE, SHAPES, RISING), 12)
    assert seen.list.count("  and 2 more\n") == 4
    assert re.findall(r"^ +'(\d+)\.npz'$", seen.list, re.MULTILINE) == [f"{number:02}" for number in range(10)]
    assert re.search(r"^ +conf +[\d.]+ +[\d.]+ +1 +0.0%$", seen.output, re.MULTILINE)
    assert "  features  " not in seen.output.partition("smallest")[2]  # no range without a finite array


def test_what_is_no_fault(tmp_path: Path) -> None:
    folder = write_pair(tmp_path) / "images"
    # The detector found fewer than min_bb boxes: published numbers are then min_bb.
    put(folder / FOLDER, IMAGES[5], write_msgpack({name: array[:1] for name, array in SOUND.items()}))
    # Rounded to half precision, which has no number between 1 and 1.001.
    rounded = {name: read_record(folder, IMAGES[0])[name].copy() for name in ("features", "norm_bb")}
    rounded["norm_bb"][0] = [0.10006, 0.20013, 1.0006, 0.7001, 1.0006 - 0.10006, 0.7001 - 0.20013]
    put(folder / FOLDER, IMAGES[0], write_msgpack(rounded))
    put(folder / FOLDER, "__keys__", None)
    seen = inspect(folder)
    assert seen.code == 0
    assert re.search(r"few boxes +1 of 6 images \(16.67%\)", seen.output)
    assert re.search(r"confidences +none in 1 of 6 images \(16.67%\)", seen.output)
    write_images(folder, keep_all=True)
    put(folder / "all", IMAGES[0], write_msgpack(rounded))
    assert inspect(folder).faults == {REFUSED + "has no conf": 1}
    edit(folder / "nbb.json", lambda boxes: boxes.update({IMAGES[5]: 3}))
    assert inspect(folder / "all").faults["images with another number of boxes than in nbb.json"] == 1
    (folder / "nbb.json").unlink()
    assert inspect(folder / "all").faults == {REFUSED + "has no conf": 1}


def test_texts_and_images_that_do_not_fit(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    write_images(pair / "others", conf_th=-1, num_bb=6)
    put(pair / "others/feat_numbb6", IMAGES[1], None)
    put(pair / "others/feat_numbb6", "new.npz", write_msgpack(SOUND))
    put(pair / "others/feat_numbb6", "__keys__", None)
    edit(pair / "texts.db/txt2img.json", lambda images: images.pop("4") and images)
    edit(pair / "texts.db/img2txts.json", lambda texts: texts[IMAGES[2]].remove("4"))
    seen = inspect(pair / "texts.db", pair / "others")
    assert seen.faults == {
        "texts of id2len.json that txt2img.json lacks": 1,
        "texts of id2len.json that img2txts.json lacks": 1,
        "images that texts name and the image database lacks": 1,
        "texts without an image": 3,
    }
    for line in (f"'{IMAGES[1]}', of 2 texts", "'2'", "'3'", "'4'"):
        assert f" {line}\n" in seen.list
    for row in (r"images +5 of 6 images .*83.33%", r"texts +9 of 12 texts .*75.00%", r"no text +1 of 6 images .*16.67%"):
        assert re.search(row, seen.output)
    # A database that cannot be read is one fault, not as many as there are texts.
    (pair / "texts.db/txt2img.json").unlink()
    assert "texts without an image" not in inspect(pair / "texts.db", pair / "images").faults


@pytest.mark.parametrize("rule", [BoxRule(0.0, 36, 36), BoxRule(1e-5), BoxRule(0.125, 50, 1), BoxRule(-1, num_bb=100)])
@pytest.mark.parametrize("suffix", ["", "_compressed"])
def test_layouts_are_the_inverse_of_names(rule: BoxRule, suffix: str) -> None:
    read = parse_layout(rule.folder + suffix)
    assert read.rule is not None
    assert (read.rule.folder, read.rule.fixed, read.compressed) == (rule.folder, rule.fixed, suffix != "")
    assert rule.fixed or (read.rule, read.sidecar) == (rule, f"nbb_{rule.suffix}.json")


@pytest.mark.parametrize("name", ["feat", "feat_th0_max6_min2", "feat_th0.2_max2_min6", "feat_numbb0", "feat_numbb036", "allx"])
def test_no_other_name_is_a_layout(name: str) -> None:
    with pytest.raises(InputError):
        parse_layout(name)
