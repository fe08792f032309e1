"""Detectors' files, written as the detectors' own programs write them, arrive as the arrays of an image database."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.boxes import BoxRule
from data.image_db import ImageDatabase
from data.sources import region_files, region_tsv
from data.sources.regions import naming, normalise_boxes
from scripts.convert_imgdir import main
from tests.data.sources.detectors import HEIGHT, ROWS, SIZE, WIDTH, Detected, line, save_milvlg, save_mmf, save_uniter
from utils.errors import InputError

FILES = {
    "uniter": (".npz", save_uniter),
    "milvlg": (".npz", save_milvlg),
    "mmf": (".npy", save_mmf),
    "npz": (".npz", lambda path, _, **arrays: np.savez(path, **arrays)),
}


def convert(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code and stderr of a conversion in this process."""
    try:
        main(["--nproc", "1", *map(str, arguments)])
    except SystemExit as stop:
        return int(stop.code or 0), capsys.readouterr().err
    return 0, capsys.readouterr().err


# 12 of the 15 confidences are above 0.2.
@pytest.mark.parametrize("kind", ["butd", "airsplay", "vinvl", "uniter", "milvlg", "mmf"])
@pytest.mark.parametrize("flags", [[], ["--conf_th", "-1", "--num_bb", "7"], ["--keep_all", "--compress"]])
def test_every_kind_becomes_a_database(tmp_path: Path, kind: str, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = {f"picture.{number}": Detected(number) for number in range(3)}
    source: list[object] = ["--img_dir", tmp_path / "in"]
    (tmp_path / "in").mkdir()
    if kind in ROWS:
        rows = [line(ROWS[kind](f"{name}.jpg", one)) for name, one in found.items()]
        (tmp_path / "0.tsv").write_bytes(b"".join(rows[:2]))
        (tmp_path / "1.tsv").write_bytes(rows[2])
        (tmp_path / "hw.tsv").write_text("".join(f'{name}.jpg\t[{{"height": {HEIGHT}, "width": {WIDTH}}}]\n' for name in found))
        source = ["--tsv", *sorted(tmp_path.glob("[01].tsv")), *(["--sizes", tmp_path / "hw.tsv"] if kind == "vinvl" else [])]
    for name, one in found.items():
        if kind in FILES:
            suffix, save = FILES[kind]
            save(tmp_path / f"in/{name}{suffix}", one)
    code, errors = convert(capsys, *source, "--output", tmp_path / "db", *flags)
    if kind == "butd" and "--keep_all" in flags:
        assert code == 2
        assert "--keep_all: bottom-up-attention's TSV has no confidences" in errors
        assert not (tmp_path / "db").exists()
        return
    assert code == 0
    assert ("UNITER's weights were trained on other features" in errors) == (kind in ("vinvl", "mmf"))
    conf_th, number = (-1, 7) if "-1" in flags else (0.2, 15 if kind == "butd" else 12)
    database = ImageDatabase(tmp_path / "db", BoxRule(conf_th=conf_th, num_bb=7), compressed="--compress" in flags)
    assert database.names() == [f"{name}.npz" for name in found]
    for name, one in found.items():
        order = np.arange(number) if kind == "butd" else np.argsort(-one.conf, kind="stable")[:number]
        image, half = database[f"{name}.npz"], one.shares()[order].astype(np.float16)
        np.testing.assert_array_equal(image.features, one.features[order].astype(np.float16))
        assert image.features.dtype == np.float16
        np.testing.assert_allclose(image.boxes[:, :6], half, atol=0 if kind == "uniter" else 5e-4, rtol=0)
        np.testing.assert_array_equal(image.boxes[:, 6], image.boxes[:, 4] * image.boxes[:, 5])
    database.close()
    noted = json.loads(next((tmp_path / "db").glob("made_*.json")).read_text())
    assert (noted["images"], noted["left_out"]) == (3, [])
    assert noted["made_by"]["program"] == "scripts/convert_imgdir.py"


def test_names_by_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = ["COCO_val2014_000000000042", "42", "77", "dog"]
    (tmp_path / "a.tsv").write_bytes(b"".join(line(ROWS["butd"](name, Detected(0))) for name in ids))
    source = ("--tsv", tmp_path / "a.tsv", "--prefix", "coco_val2014_")
    code, errors = convert(capsys, *source, "--output", tmp_path / "db")
    assert code == 1
    assert "row 2 ('42'): image 'coco_val2014_000000000042.npz' occurs twice; the first one is kept\n" in errors
    assert "row 4 ('dog'): its id 'dog' has no number, which --prefix needs\n" in errors
    database = ImageDatabase(tmp_path / "db")
    assert database.names() == ["coco_val2014_000000000042.npz", "coco_val2014_000000000077.npz"]
    database.close()


def test_names_of_annotations(tmp_path: Path) -> None:
    rows = [("cat_1.jpg", "a"), ("7.jpg", "b"), ("x/dog_2.jpg", "c"), ("cow.jpg", "d")]
    (tmp_path / "a.csv").write_text("image,caption,split\n" + "".join(f"{name},{text},test\n" for name, text in rows))
    picture = {"filename": "COCO_train2014_000000000077.jpg", "split": "train", "sentences": [{"sentid": 1, "raw": "a"}]}
    (tmp_path / "coco.json").write_text(json.dumps({"dataset": "coco", "images": [picture]}))
    name_of, coco_name_of = naming(None, tmp_path / "a.csv"), naming(None, tmp_path / "coco.json")
    assert coco_name_of("77") == "coco_train2014_000000000077.npz"
    assert [name_of(name) for name in ("cat_1", "cat_1.npz", "7", "000007", "dog_2.jpg")] == [
        "cat_1.npz", "cat_1.npz", "7.npz", "7.npz", "dog_2.npz",
    ]  # fmt: skip
    for other in ("bat_1.npz", "dog_1", "8", "7" * 5000):
        with pytest.raises(ValueError, match=r"a\.csv names no such picture"):
            name_of(other)
    with pytest.raises(ValueError, match="has no number"):
        naming("p_", None)("1" * 100_000 + "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_boxes": 14}, "features: has 720 bytes, expected 14 x D numbers of 4"),
        ({"num_boxes": "many"}, "num_boxes is 'many', expected a whole number above 0"),
        ({"num_boxes": "inf"}, "num_boxes is 'inf'"),
        ({"img_w": 0}, "img_w is '0'"),
        ({"img_w": HEIGHT, "img_h": WIDTH}, "leaves the picture, which is 480 wide and 640 high"),
        ({"boxes": "AAAA"}, "boxes: has 3 bytes, expected 15 x 4 numbers of 4"),
        ({"boxes": "A*"}, "boxes: is not base64"),
        ({"objects_conf": "A" * 76}, "objects_conf: has 57 bytes, expected 15 numbers of 4"),
        ({"objects": "{"}, "its second column is not JSON"),
        ({"objects": "[" * 100_000}, "its second column is not JSON"),
        ({"objects": '{"objects": []}'}, "has no list of objects"),
        ({"objects": '{"objects": [5]}'}, "object 0: has no rect, conf and feature"),
        ({"objects": '[{"rect": [1, 2, 3, 4], "conf": "x", "feature": "AAAA"}]'}, "not made of numbers"),
        ({"objects": '[{"rect": [1, 2, 3, 4], "conf": 1, "feature": 5}]'}, "feature: is not base64"),
        ({"objects": '[{"rect": [1, 2, 3], "conf": 1, "feature": "AAAAAA=="}]'}, "boxes have shape"),
        ({"key": "unknown"}, "size is not in the file of --sizes"),
    ],
)
def test_bad_rows_are_named(change: dict[str, Any], message: str) -> None:
    kind = "vinvl" if {"objects", "key"} & set(change) else "airsplay"
    row = line(ROWS[kind]("a", Detected(0)) | change)
    columns = region_tsv.VINVL if kind == "vinvl" else region_tsv.AIRSPLAY
    with pytest.raises(ValueError, match=message):
        region_tsv.load_row(row, columns, SIZE if "key" not in change else None)


def test_bad_tsv_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tsv"
    for contents, message in (
        ("a\tb\tc\n", "its first row has 3 columns"),
        ("a", "its first row has 1 column,"),
        ("\n", "has no row"),
    ):
        path.write_text(contents)
        with pytest.raises(InputError, match=rf"a\.tsv: {message}"):
            region_tsv.kind_of(path)
    monkeypatch.setattr(region_tsv, "MAX_ROW_BYTES", 4000)
    good = line(ROWS["butd"]("good", Detected(0)))
    path.write_bytes(good + b"long\t" + b"x" * 20_000 + b"\n\n" + good[:-20] + b"\n" + good.rstrip())
    sources = list(region_tsv.sources_of(path, region_tsv.BUTD, {}))
    assert [source.place.rsplit("row ", 1)[1] for source in sources] == ["1 ('good')", "2 ('long')", "4 ('good')", "5 ('good')"]
    with pytest.raises(ValueError, match="is longer than 4,000 bytes"):
        sources[1].load()
    with pytest.raises(ValueError, match="features: "):
        sources[2].load()
    np.testing.assert_array_equal(sources[3].load()["features"], Detected(0).features)


def test_sizes(tmp_path: Path) -> None:
    path = tmp_path / "hw.tsv"
    path.write_text('a\t480 640\nb\t[{"height": 480, "width": 640}]\nc\t{"height": 480, "width": 640}\n')
    assert region_tsv.read_sizes(path) == dict.fromkeys("abc", SIZE)
    for text in ("a\n", "a\t5\n", "a\t0 5\n", 'a\t{"width": 5}\n', 'a\t[{"width": 5, "height": 0}]\n', "a\t" + "[" * 100_000):
        path.write_text(text)
        with pytest.raises(InputError, match=r"hw\.tsv row 1: expected key, tab"):
            region_tsv.read_sizes(path)


def test_boxes_are_normalised() -> None:
    boxes = normalise_boxes(np.array([[160, 60, 480, 240], [-0.4, 0, 640.9, 480]]), WIDTH, HEIGHT)
    np.testing.assert_array_equal(boxes, [[0.25, 0.125, 0.75, 0.5, 0.5, 0.375], [0, 0, 1, 1, 1, 1]])
    for wrong, size, message in [
        ([[0, 0, 700, 10]], SIZE, r"box 0, \[0, 0, 700, 10\], leaves the picture"),
        ([[0, 0, 9, 9], [9, 0, 8, 9]], SIZE, "box 1, .* has x2 < x1"),
        ([[0, 0, np.nan, 9]], SIZE, "leaves the picture"),
        ([[0, 0, 9, 9]], (0, 5), "0 wide and 5 high"),
        ([[0, 0, 9, 9]], (None, 5), "None wide"),
        ([0, 0, 9, 9], SIZE, "boxes have shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            normalise_boxes(np.array(wrong), *size)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("npz", {"y": np.zeros(3)}, r"has no features \(UNITER\) and no x"),
        ("npz", {"x": np.zeros(3)}, "has no bbox"),
        ("milvlg", {"info": {"objects_id": 5}}, "info has no array objects_conf"),
        ("milvlg", {"info": {"objects_conf": [[0.5] * 15] * 3}}, "info has no array objects_conf"),
        ("milvlg", {"info": np.zeros(3)}, r"info: has shape \[3\] and type float64, expected one pickled dict"),
        ("milvlg", {"info": {"objects_conf": Detected(0).conf, "x": print}}, r"info: is .* \(would call 'builtins\.print'"),
        ("milvlg", {"num_bbox": 16}, "num_bbox is 16, expected a number of boxes from 1 to 15"),
        ("milvlg", {"image_w": 100}, "leaves the picture"),
        ("mmf", {"image_width": 10**400}, r"a_info\.npy: the picture is 10+\.\.\.0+ wide"),
        ("mmf", {"num_boxes": [[3]]}, r"num_boxes is \[\[3\]\], expected a number of boxes"),
        ("mmf", {"bbox": None}, r"a_info\.npy: has no array bbox"),
        ("mmf", {"image_width": "wide"}, r"a_info\.npy: the picture is 'wide' wide"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, kind: str, changes: dict[str, Any], message: str) -> None:
    suffix, save = FILES[kind]
    save(tmp_path / f"a{suffix}", Detected(0), **changes)
    with pytest.raises(ValueError, match=message):
        region_files.sources_of(tmp_path)[0].load()


def test_incomplete_npy_pairs_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    for name in "abcd":
        save_mmf(tmp_path / f"in/{name}.npy", Detected(0))
    np.save(
        tmp_path / "in/b_info.npy", {"bbox": Detected(1).boxes, "image_width": WIDTH, "image_height": HEIGHT, "num_boxes": 15}
    )
    (tmp_path / "in/c_info.npy").unlink()
    (tmp_path / "in/d.npy").unlink()
    code, errors = convert(capsys, "--img_dir", tmp_path / "in", "--output", tmp_path / "db", "--keep_all")
    assert code == 1
    left_out = json.loads((tmp_path / "db/made_all.json").read_text())["left_out"]
    expected = ("b.npy: has no confidences", "c.npy: has no c_info.npy beside it", "d.npy: no such file")
    for reason, beginning in zip(left_out, expected, strict=True):
        assert reason.startswith(f"{tmp_path}/in/{beginning}")
        assert f"  {reason}\n" in errors
