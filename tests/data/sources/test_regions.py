"""Detectors' files, written as the detectors' own programs write them, arrive as the arrays of an image database."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.boxes import BoxRule
from data.image_db import ImageDatabase
from data.sources import region_files, region_tsv
from data.sources.plain_pickle import MAX_BYTES, read_pickled_map, read_plain
from data.sources.region_names import naming
from data.sources.region_source import as_shares
from scripts.convert_imgdir import main
from utils.errors import InputError

WIDTH, HEIGHT, D = 640, 480, 12
SIZE = (WIDTH, HEIGHT)


class Detected:
    """What a detector found in one picture, in the numbers that detectors write."""

    def __init__(self, seed: int, boxes: int = 15) -> None:
        rng = np.random.default_rng(seed)
        corner = rng.random((boxes, 2)) * [WIDTH - 200, HEIGHT - 200]
        self.boxes = np.concatenate([corner, corner + 1 + rng.random((boxes, 2)) * 199], axis=1).astype(np.float32)
        self.features = rng.standard_normal((boxes, D)).astype(np.float32)
        self.conf = rng.permutation(np.linspace(0.05, 0.95, boxes)).astype(np.float32)

    def shares(self) -> np.ndarray:
        x1, y1, x2, y2 = (
            self.boxes[:, [0]] / WIDTH,
            self.boxes[:, [1]] / HEIGHT,
            self.boxes[:, [2]] / WIDTH,
            self.boxes[:, [3]] / HEIGHT,
        )
        return np.concatenate([x1, y1, x2, y2, x2 - x1, y2 - y1], axis=1)


def b64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array)).decode()


def butd_row(name: str, found: Detected) -> dict[str, Any]:
    sizes = {"image_id": name, "image_w": WIDTH, "image_h": HEIGHT, "num_boxes": len(found.boxes)}
    return {**sizes, "boxes": b64(found.boxes), "features": b64(found.features)}


def airsplay_row(name: str, found: Detected) -> dict[str, Any]:
    ids = np.zeros(len(found.boxes), np.int64)
    kinds = {"objects_id": b64(ids), "objects_conf": b64(found.conf), "attrs_id": b64(ids), "attrs_conf": b64(found.conf)}
    return {
        "img_id": name, "img_h": HEIGHT, "img_w": WIDTH, **kinds, "num_boxes": len(found.boxes),
        "boxes": b64(found.boxes), "features": b64(found.features),
    }  # fmt: skip


def vinvl_row(name: str, found: Detected) -> dict[str, Any]:
    objects = [
        {"rect": box.tolist(), "class": "dog", "conf": float(conf), "feature": b64(feature)}
        for box, conf, feature in zip(found.boxes, found.conf, found.features, strict=True)
    ]
    return {"key": name, "objects": json.dumps({"image_h": HEIGHT, "image_w": WIDTH, "objects": objects})}


ROWS: dict[str, Callable[[str, Detected], dict[str, Any]]] = {"butd": butd_row, "airsplay": airsplay_row, "vinvl": vinvl_row}


def write_tsv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with open(path, "w", newline="") as file:
        if "objects" in rows[0]:
            file.writelines(f"{row['key']}\t{row['objects']}\n" for row in rows)
        else:
            csv.DictWriter(file, delimiter="\t", fieldnames=list(rows[0])).writerows(rows)
    return path


def line(row: dict[str, Any]) -> bytes:
    return "\t".join(map(str, row.values())).encode() + b"\r\n"


def save_milvlg(path: Path, found: Detected, **changes: Any) -> None:
    info = {"objects_id": np.zeros(len(found.conf)), "objects_conf": found.conf, "attrs_conf": found.conf}
    arrays = {"x": found.features, "bbox": found.boxes, "num_bbox": len(found.boxes), "image_h": HEIGHT, "image_w": WIDTH}
    np.savez_compressed(path, **{**arrays, "info": info, **changes})


def save_mmf(path: Path, found: Detected, **changes: Any) -> None:
    scores = np.stack([found.conf, found.conf / 2, found.conf / 3], axis=1)
    np.save(path, np.concatenate([found.features, np.zeros((3, D), np.float32)]))  # padded, as MMF does
    info = {"bbox": found.boxes, "num_boxes": len(found.boxes), "objects": scores.argmax(axis=1), "cls_prob": scores}
    beside = {"image_width": WIDTH, "image_height": HEIGHT, "image_id": path.stem}
    np.save(path.with_name(f"{path.stem}_info.npy"), {**info, **beside, **changes})


def check(database: ImageDatabase, name: str, found: Detected, order: np.ndarray) -> None:
    """The image is what the detector found, in this order of boxes."""
    image = database[name]
    np.testing.assert_array_equal(image.features, found.features[order].astype(np.float16))
    np.testing.assert_allclose(image.boxes[:, :6], found.shares()[order], atol=5e-4)


def confident(found: Detected, boxes: int) -> np.ndarray:
    return np.argsort(-found.conf, kind="stable")[:boxes]


# 12 of the 15 confidences are above 0.2.
@pytest.mark.parametrize("kind", ["butd", "airsplay", "vinvl", "milvlg", "mmf"])
@pytest.mark.parametrize("flags", [[], ["--conf_th", "-1", "--num_bb", "7"], ["--keep_all", "--compress"]])
def test_every_kind_becomes_a_database(tmp_path: Path, kind: str, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = {f"picture.{number}": Detected(number) for number in range(3)}
    source: list[str] = ["--img_dir", str(tmp_path / "in")]
    (tmp_path / "in").mkdir()
    if kind in ROWS:
        halves = [list(found.items())[:2], list(found.items())[2:]]
        files = [
            write_tsv(tmp_path / f"{number}.tsv", [ROWS[kind](f"{name}.jpg", one) for name, one in half])
            for number, half in enumerate(halves)
        ]
        (tmp_path / "hw.tsv").write_text("".join(f'{name}.jpg\t[{{"height": {HEIGHT}, "width": {WIDTH}}}]\n' for name in found))
        source = ["--tsv", *map(str, files), *(["--sizes", str(tmp_path / "hw.tsv")] if kind == "vinvl" else [])]
    for name, one in found.items():
        if kind == "milvlg":
            save_milvlg(tmp_path / "in" / f"{name}.npz", one)
        elif kind == "mmf":
            save_mmf(tmp_path / "in" / f"{name}.npy", one)
    arguments = [*source, "--output", str(tmp_path / "db"), "--nproc", "1", *flags]
    if kind == "butd" and "--keep_all" in flags:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert "--keep_all: bottom-up-attention's TSV has no confidences" in capsys.readouterr().err
        assert not (tmp_path / "db").exists()
        return
    main(arguments)
    warned = "UNITER's weights were trained on other features" in capsys.readouterr().err
    assert warned == (kind in ("vinvl", "mmf"))
    conf_th, number = (-1, 7) if "-1" in flags else (0.2, 15 if kind == "butd" else 12)
    database = ImageDatabase(tmp_path / "db", BoxRule(conf_th=conf_th, num_bb=7), compressed="--compress" in flags)
    assert database.names() == [f"{name}.npz" for name in found]
    for name, one in found.items():
        check(database, f"{name}.npz", one, np.arange(number) if kind == "butd" else confident(one, number))
    database.close()
    noted = json.loads(next((tmp_path / "db").glob("made_*.json")).read_text())
    assert (noted["images"], noted["left_out"]) == (3, [])
    assert noted["made_by"]["program"] == "scripts/convert_imgdir.py"


def test_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        butd_row(name, Detected(number)) for number, name in enumerate(["COCO_val2014_000000000042", "42", "77", "9", "dog"])
    ]
    source = ["--tsv", str(write_tsv(tmp_path / "a.tsv", rows)), "--nproc", "1"]
    annotations = tmp_path / "dataset_coco.json"
    pictures = [("COCO_val2014_000000000042.jpg", "test"), ("COCO_train2014_000000000077.jpg", "train")]
    sentences = [{"sentid": 1, "raw": "a"}]
    images = [{"filename": filename, "split": split, "sentences": sentences} for filename, split in pictures]
    annotations.write_text(json.dumps({"dataset": "coco", "images": images}))

    def names(*flags: str) -> tuple[list[str], list[str]]:
        output = tmp_path / f"db{len(list(tmp_path.iterdir()))}"
        code = 0
        try:
            main([*source, "--output", str(output), *flags])
        except SystemExit as stop:
            code = int(stop.code or 0)
        listed = [line.strip() for line in capsys.readouterr().err.split("\n") if line.startswith("  ")]
        assert code == bool(listed)
        database = ImageDatabase(output)
        found = database.names()
        database.close()
        return found, listed

    stems = ["COCO_val2014_000000000042.npz", "42.npz", "77.npz", "9.npz", "dog.npz"]
    assert names() == (stems, [])
    found, listed = names("--prefix", "coco_val2014_")
    assert found == [f"coco_val2014_{number:012d}.npz" for number in (42, 77, 9)]
    assert [line.rsplit(": ", 1)[1] for line in sorted(listed)] == [
        "image 'coco_val2014_000000000042.npz' is there already, the first one is kept",
        "its id 'dog' has no number, which --prefix needs",
    ]
    found, listed = names("--annotations", str(annotations))
    assert found == ["coco_val2014_000000000042.npz", "coco_train2014_000000000077.npz"]
    assert len(listed) == 3
    assert sum("dataset_coco.json names no such picture" in line for line in listed) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_boxes": 14}, "features: holds 720 bytes, expected 14 x D numbers of 4"),
        ({"num_boxes": "many"}, "num_boxes is 'many', expected a whole number above 0"),
        ({"num_boxes": "inf"}, "num_boxes is 'inf'"),
        ({"img_w": 0}, "img_w is '0'"),
        ({"img_w": HEIGHT, "img_h": WIDTH}, "leaves the picture, which is 480 wide and 640 high"),
        ({"boxes": "AAAA"}, "boxes: holds 3 bytes, expected 15 x 4 numbers of 4"),
        ({"boxes": "A*"}, "boxes: is not base64"),
        ({"objects_conf": b64(np.ones(14, np.float32))}, "objects_conf: holds 56 bytes, expected 15 numbers of 4"),
    ],
)
def test_bad_rows_are_named(change: dict[str, Any], message: str) -> None:
    kind = region_tsv.KINDS[10]
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        region_tsv.load_row(line(airsplay_row("a", Detected(0)) | change), kind, None)


@pytest.mark.parametrize(
    ("objects", "size", "message"),
    [
        ("{", SIZE, "its second column is not JSON"),
        ("[" * 100_000, SIZE, "its second column is not JSON"),
        ('{"objects": []}', SIZE, "has no list of objects"),
        ('{"objects": [5]}', SIZE, "object 0: has no rect, conf and feature"),
        ('{"objects": [{"rect": [1, 2, 3, 4], "conf": "x", "feature": "AAAA"}]}', SIZE, "not made of numbers"),
        ('{"objects": [{"rect": [1, 2, 3, 4], "conf": 1, "feature": 5}]}', SIZE, "feature: is not base64"),
        ('{"objects": [{"rect": [1, 2, 3], "conf": 1, "feature": "AAAAAA=="}]}', SIZE, "boxes have shape"),
        (vinvl_row("a", Detected(0))["objects"], None, "size is not in the file of --sizes"),
    ],
)
def test_bad_rows_of_vinvl_are_named(objects: str, size: tuple[int, int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        region_tsv.load_row(f"a\t{objects}".encode(), region_tsv.KINDS[2], size)


def test_bad_tsv_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("a\tb\tc\n")
    with pytest.raises(InputError, match=r"a\.tsv: its first row has 3 columns, expected 2 or 6 or 10"):
        region_tsv.kind_of(path)
    with pytest.raises(InputError, match=r"b\.tsv: cannot be read"):
        region_tsv.kind_of(tmp_path / "b.tsv")
    for text in ("a\n", "a\t5\n", 'a\t{"width": 5}\n', 'a\t[{"width": 5, "height": 0}]\n', "a\t" + "[" * 100_000):
        path.write_text(text)
        with pytest.raises(InputError, match=r"a\.tsv row 1: expected key, tab"):
            region_tsv.read_sizes(path)
    monkeypatch.setattr(region_tsv, "MAX_ROW_BYTES", 4000)
    good = line(butd_row("good", Detected(0)))
    path.write_bytes(good + b"long\t" + b"x" * 20_000 + b"\n\n" + good[:-20] + b"\n" + good.rstrip())
    sources = list(region_tsv.sources_of(path, region_tsv.KINDS[6], {}))
    assert [source.place.rsplit("row ", 1)[1] for source in sources] == ["1 ('good')", "2 ('long')", "4 ('good')", "5 ('good')"]
    with pytest.raises(ValueError, match="is longer than 4,000 bytes"):
        sources[1].load()
    with pytest.raises(ValueError, match="features: "):
        sources[2].load()
    np.testing.assert_array_equal(sources[3].load()["features"], Detected(0).features)


def test_boxes_as_shares() -> None:
    shares = as_shares(np.array([[160, 60, 480, 240], [-0.4, 0, 640.9, 480]]), WIDTH, HEIGHT)
    np.testing.assert_array_equal(shares, [[0.25, 0.125, 0.75, 0.5, 0.5, 0.375], [0, 0, 1, 1, 1, 1]])
    for boxes, size, message in [
        ([[0, 0, 700, 10]], SIZE, r"box 0, \[0, 0, 700, 10\], leaves the picture"),
        ([[0, 0, 9, 9], [9, 0, 8, 9]], SIZE, "box 1, .* has x2 < x1"),
        ([[0, 0, np.nan, 9]], SIZE, "leaves the picture"),
        ([[0, 0, 9, 9]], (0, 5), "0 wide and 5 high"),
        ([[0, 0, 9, 9]], (None, 5), "None wide"),
        ([0, 0, 9, 9], SIZE, "boxes have shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            as_shares(np.array(boxes), *size)


def test_bad_files_of_folders_are_named(tmp_path: Path) -> None:
    found = Detected(0)
    for name, changes, message in [
        ("conf", {"info": {"objects_id": 5}}, "info has no objects_conf"),
        ("list", {"info": {"objects_conf": [[0.5] * 15] * 3}}, "info has no objects_conf"),
        ("info", {"info": np.zeros(3)}, r"info: has shape \[3\] and type float64, expected one pickled map"),
        ("count", {"num_bbox": 16}, "num_bbox is 16, expected a number of boxes from 1 to 15"),
        ("size", {"image_w": 100}, "leaves the picture"),
        ("pickle", {"info": {"objects_conf": found.conf, "x": print}}, r"info: is .* \(would call builtins\.print"),
    ]:
        save_milvlg(tmp_path / f"{name}.npz", found, **changes)
        with pytest.raises(ValueError, match=message):
            region_files.load_npz(tmp_path / f"{name}.npz")
    np.savez(tmp_path / "other.npz", y=found.features)
    with pytest.raises(ValueError, match=r"has no features \(UNITER\) and no x"):
        region_files.load_npz(tmp_path / "other.npz")
    np.savez(tmp_path / "x.npz", x=found.features)
    with pytest.raises(ValueError, match="has no bbox"):
        region_files.load_npz(tmp_path / "x.npz")
    for name, changes, message in [
        ("huge", {"image_width": 10**400}, r"huge_info\.npy: the picture is 10+\.\.\.0+ wide"),
        ("many", {"num_boxes": [[3]]}, r"num_boxes is \[\[3\]\], expected a number of boxes"),
        ("bbox", {"bbox": None}, r"bbox_info\.npy: has no array bbox"),
        ("size", {"image_width": "wide"}, r"size_info\.npy: the picture is 'wide' wide"),
    ]:
        save_mmf(tmp_path / f"{name}.npy", found, **changes)
        with pytest.raises(ValueError, match=message):
            region_files.load_npy_pair(tmp_path / f"{name}.npy")
    (tmp_path / "bbox_info.npy").unlink()
    with pytest.raises(ValueError, match=r"has no bbox_info\.npy beside it"):
        region_files.load_npy_pair(tmp_path / "bbox.npy")
    (tmp_path / "size.npy").unlink()
    assert {source.id for source in region_files.sources_of(tmp_path)} >= {"bbox.npy", "size.npy", "conf.npz"}
    with pytest.raises(OSError, match=r"size\.npy"):
        region_files.load_npy_pair(tmp_path / "size.npy")


PLAIN = {
    "float": 0.5, "int": 3, "long": 1 << 40, "big": 1 << 80, "text": "café", "none": None, "yes": True, "no": False,
    "list": [1, "a", [2.0]], "tuple": (1, (2, 3), (), (1, 2, 3, 4)), "bytes": b"\x00\xff", "empty": {},
}  # fmt: skip
ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.array(5, ">i2"),
    np.zeros((0, 4)), np.array([True, False]),
]  # fmt: skip


@pytest.mark.parametrize("protocol", range(5))
def test_plain_values_are_what_pickle_reads(protocol: int) -> None:
    value = {**PLAIN, "array": ARRAYS[0], "scalar": np.float32(0.25), "same": ARRAYS[0]}
    if protocol < 2:  # text instructions, which nobody writes to files of features
        with pytest.raises(ValueError, match="which plain data do not need"):
            read_plain(pickle.dumps(value, protocol))
        return
    read = read_plain(pickle.dumps(value, protocol))
    assert {key: read[key] for key in PLAIN} == PLAIN
    assert read["scalar"] == 0.25
    for array in ARRAYS:
        read = read_plain(pickle.dumps(array, protocol))
        np.testing.assert_array_equal(read, array)
        assert read.dtype == array.dtype.newbyteorder("=")


def test_a_map_saved_by_numpy() -> None:
    buffer = io.BytesIO()
    np.save(buffer, {"a": ARRAYS[0], "b": 1})
    read = read_pickled_map(buffer.getvalue())
    np.testing.assert_array_equal(read["a"], ARRAYS[0])
    assert read["b"] == 1


def test_both_names_of_numpys_core() -> None:
    written = pickle.dumps(ARRAYS[0], 2)
    for old, new in ((b"numpy._core.", b"numpy.core."), (b"numpy.core.", b"numpy._core.")):
        np.testing.assert_array_equal(read_plain(written.replace(old, new)), ARRAYS[0])


class Hostile:
    """Pickled, a call of anything."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    for hostile in (Hostile(Path.touch, target), Hostile(eval, f"open({str(target)!r}, 'w')"), Hostile(open, str(target), "w")):
        for value in (hostile, {"a": hostile}, np.array(hostile, object)):
            with pytest.raises(ValueError, match=r"would call|plain data do not|belongs"):
                read_plain(pickle.dumps(value, 4))
    assert not target.exists()
    pickle.loads(pickle.dumps(Hostile(open, str(target), "w"), 4))
    assert target.exists(), "the pickles of this test would have run"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "pickle"),
        (b"\x80\x04K", "pickle"),
        (b"\x80\x04.", "pickle"),
        (b"\x80\x04K\x01K\x02.", "pickle"),
        (b"\x80\x04ee.", "pickle"),
        (b"\x80\x04(t\x86.", "more from its stack"),
        (b"\x80\x04}(K\x01K\x02u.", "int where a str"),
        (b"\x80\x04}(\x8c\x01au.", "pickle"),
        (b"\x80\x04h\x07.", "pickle"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "pickle"),
        (b"\x80\x04" + b")\x85" * 10 + b"\x8c\x01a\x93.", "tuple where a str"),
        (b"\x80\x04" + b"N" * 1_000_001 + b".", "more than 1,000,000 instructions"),
        (b"N" * (MAX_BYTES + 1), "expected at most"),
        (b"\x80\x04" + b"\x8c\x06_codecs\x8c\x06encode\x93.", "pickle"),
    ],
)
def test_broken_pickles(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_plain(data)


def test_what_a_pickle_unpacks_to_is_bounded() -> None:
    """A megabyte of text, encoded again and again, would fill the memory."""
    text = b"\x80\x04](X" + (1 << 20).to_bytes(4, "little") + b"a" * (1 << 20) + b"q\x00"
    name = b"\x8c\x07_codecs\x8c\x06encode\x93q\x01"
    again = b"h\x01h\x00\x8c\x06latin1\x86R"
    with pytest.raises(ValueError, match="unpacks to more bytes"):
        read_plain(text + name + again * 1000 + b"e.")


def test_annotations_name_pictures_by_their_names_first(tmp_path: Path) -> None:
    rows = [("cat_1.jpg", "a"), ("7.jpg", "b"), ("x/dog_2.jpg", "c")]
    (tmp_path / "a.csv").write_text("image,caption,split\n" + "".join(f"{name},{text},test\n" for name, text in rows))
    name_of = naming(None, tmp_path / "a.csv")
    assert [name_of(name) for name in ("cat_1", "cat_1.npz", "7", "000007", "dog_2.jpg")] == [
        "cat_1.npz", "cat_1.npz", "7.npz", "7.npz", "dog_2.npz",
    ]  # fmt: skip
    for other in ("bat_1.npz", "dog_1", "8", "7" * 5000):
        with pytest.raises(ValueError, match=r"a\.csv names no such picture"):
            name_of(other)
    with pytest.raises(ValueError, match="has no number"):
        naming("p_", None)("1" * 100_000 + "x")


def test_keep_all_needs_confidences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    save_mmf(tmp_path / "in/a.npy", Detected(0))
    info = {"bbox": Detected(1).boxes, "image_width": WIDTH, "image_height": HEIGHT}
    np.save(tmp_path / "in/b.npy", Detected(1).features)
    np.save(tmp_path / "in/b_info.npy", info)
    with pytest.raises(SystemExit) as stop:
        main(["--img_dir", str(tmp_path / "in"), "--output", str(tmp_path / "db"), "--keep_all", "--nproc", "1"])
    assert stop.value.code == 1
    assert "b.npy: has no confidences, which filtering needs" in capsys.readouterr().err
    noted = json.loads((tmp_path / "db/made_all.json").read_text())
    assert noted["left_out"] == [f"{tmp_path}/in/b.npy: has no confidences, which filtering needs when the database is read"]


def test_a_pipe_is_no_table(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tsv")
    with pytest.raises(InputError, match=r"a\.tsv: is not a regular file"):
        region_tsv.kind_of(tmp_path / "a.tsv")
    (tmp_path / "hw.tsv").write_text('a\t480 640\nb\t[{"height": 480, "width": 640}]\n')
    assert region_tsv.read_sizes(tmp_path / "hw.tsv") == {"a": SIZE, "b": SIZE}
