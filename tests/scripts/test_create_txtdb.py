"""scripts/create_txtdb.py on the three kinds of annotations, and its refusals."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from data.lmdb_store import LmdbReader
from data.picture_names import feature_name
from data.text_db import TextDatabase
from data.tokenizer import load_tokenizer
from scripts.create_txtdb import main

ROOT = Path(__file__).resolve().parents[2]


def karpathy(dataset: str, *pictures: tuple[str, str, list[tuple[int, str]]]) -> dict[str, Any]:
    """Annotations of pictures, each given as its file's name, its split, and ids and texts of its captions."""
    images = [
        {"filename": name, "split": split, "sentences": [{"sentid": number, "raw": raw} for number, raw in sentences]}
        for name, split, sentences in pictures
    ]
    return {"dataset": dataset, "images": images}


FLICKR = karpathy(
    "flickr30k",
    ("1000092795.jpg", "train", [(0, "Two young guys."), (1, "Some men.")]),
    ("36979.jpg", "test", [(5, "A group of friends playing cards."), (6, "Unaffable café-goers!")]),
    ("65567.jpg", "test", [(10, "A man in jeans.")]),
)


def run(folder: Path, contents: Any, *more: str, split: str = "test", name: str = "dataset.json") -> Path:
    """Write annotations, convert them, return the database."""
    annotations, output = folder / name, folder / f"itm_made_{split}.db"
    text = contents if isinstance(contents, (bytes, str)) else json.dumps(contents)
    annotations.write_bytes(text if isinstance(text, bytes) else text.encode())
    main(["--annotations", str(annotations), "--split", split, "--output", str(output), *more])
    return output


def test_flickr30k(tmp_path: Path) -> None:
    path = run(tmp_path, FLICKR)
    database, tokenizer = TextDatabase(path), load_tokenizer()
    assert list(database.ids) == ["5", "6", "10"]
    assert list(database.images) == ["flickr30k_000000036979.npz", "flickr30k_000000065567.npz"]
    assert database.image_of.tolist() == [0, 0, 1]
    text = database["6"]
    assert text.input_ids.tolist() == tokenizer.encode("Unaffable café-goers!")
    assert text.extra == {
        **{"raw": "Unaffable café-goers!", "toked_caption": tokenizer.tokens(text.input_ids)},
        **{"filename": "36979.jpg", "split": "test", "dataset": "flickr30k"},
    }
    database.close()
    meta = json.loads((path / "meta.json").read_text())
    assert meta["annotations"] == "dataset.json"
    assert meta["annotations_sha256"] == hashlib.sha256((tmp_path / "dataset.json").read_bytes()).hexdigest()
    assert (meta["split"], meta["toker"], meta["v_range"]) == ("test", "bert-base-cased", [106, 28996])
    assert meta["made_by"]["program"] == "scripts/create_txtdb.py"


def test_names_of_images() -> None:
    assert feature_name("coco", "COCO_val2014_000000391895.jpg", "val2014") == "coco_val2014_000000391895.npz"
    assert feature_name("coco", "COCO_train2014_000000000009.jpg") == "coco_train2014_000000000009.npz"
    assert feature_name("coco", "391895.jpg", "val2014") == "coco_val2014_000000391895.npz"
    assert feature_name("", "folder/scene_7.npz") == feature_name("scenes", "scene_7.png") == "scene_7.npz"
    for dataset, filename in (
        ("coco", "391895.jpg"),
        ("coco", "COCO_val2014_.jpg"),
        ("flickr30k", "picture.jpg"),
        ("", ".jpg"),
    ):
        with pytest.raises(ValueError, match="file name"):
            feature_name(dataset, filename)


ROWS = [("a.jpg", 'Red, "round".', "test"), ("b.jpg", "Blue\nsquare", "train"), ("a.jpg", "Ein Kreis ü", "test")]


def test_jsonl_and_csv_are_one(tmp_path: Path) -> None:
    lines = [json.dumps({"image": image, "caption": caption, "split": split, "x": 1}) for image, caption, split in ROWS]
    table = StringIO()
    csv.writer(table).writerows([("split", "image", "caption"), *((split, image, raw) for image, raw, split in ROWS)])
    (tmp_path / "csv").mkdir()
    from_jsonl = TextDatabase(run(tmp_path, "\n\n".join(lines) + "\n", name="rows.jsonl"))
    from_csv = TextDatabase(run(tmp_path / "csv", table.getvalue().encode("utf-8-sig"), name="rows.csv"))
    for database in (from_jsonl, from_csv):
        # Numbers of rows over all splits: the train split's row 1 is not here.
        assert (list(database.ids), list(database.images)) == (["0", "2"], ["a.npz"])
        assert [database[text_id].extra["raw"] for text_id in database.ids] == ['Red, "round".', "Ein Kreis ü"]
        database.close()


def test_another_vocabulary(tmp_path: Path) -> None:
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "A", "man"]))
    database = TextDatabase(run(tmp_path, FLICKR, "--vocab", str(vocab)))
    assert (database.vocab_size, database.cls_id, database.sep_id) == (7, 2, 3)
    assert database["10"].input_ids.tolist() == [5, 6, 1, 1, 1]
    database.close()


@pytest.mark.parametrize(
    ("contents", "name", "message"),
    [
        ("{", "d.json", "d.json: Input data was truncated; expected Karpathy's JSON"),
        (b"\xff", "d.json", "d.json: 'utf-8' codec"),
        ([], "d.json", "Expected `object`, got `array`; expected Karpathy's JSON"),
        ({"images": [{"filename": 1, "split": "test", "sentences": []}]}, "d.json", r"at `\$.images\[0\].filename`"),
        (karpathy("", ("1.jpg", "test", [(0, "\ud800")])), "d.json", "surrogate pair"),
        (karpathy("flickr30k", ("x.jpg", "test", [(0, "a")])), "d.json", r"images\[0\]: file name 'x.jpg' has no number"),
        (karpathy("", ("1.jpg", "test", [(0, "a"), (0, "b")])), "d.json", "text id '0' occurs twice"),
        (karpathy("", ("1.jpg", "test", [(0, " ")])), "d.json", "text '0' of '1.npz' has no word pieces"),
        (karpathy("", *((f"{folder}/1.jpg", "test", [(0, "a")]) for folder in "ab")), "d.json", "would both be image '1.npz'"),
        (karpathy("", ("1.jpg", "tset", [(0, "a")])), "d.json", r"no caption of split 'test' \(did you mean 'tset'\?\)"),
        ('{"image": "a", "caption": "b", "split": "test"}\nx', "d.jsonl", "line 2: JSON is malformed"),
        ('{"image": "a", "caption": "b"}', "d.jsonl", "line 1: .* `split`; expected image, caption and split"),
        ("image,caption,split\na,b\n", "d.csv", r"line 2: .* at `\$.split`"),
        ("image,caption,split\na.jpg,A dog, running,train\n", "d.csv", "line 2: more columns than in the first line"),
        ("image,caption,split\na/x.jpg,b,train\nb/x.jpg,b, test \n", "d.csv", "would both be image 'x.npz'"),
        ("image,caption,split\na.jpg,b,train\na.jpg,b,test\n", "d.csv", "'a.jpg' is in 'train' and in 'test'"),
        ('image,caption,split\np0.jpg,"A dog.,test\n', "d.csv", "unexpected end of data"),
        ("image,caption,split,caption\na.jpg,b,test,c\n", "d.csv", "line 1: names a column twice"),
        (f"image,caption,split\na,{'b ' * 5000},test\n", "d.csv", "has 5,000 word pieces, expected at most 4,096"),
        (f"image,caption,split\n{'a' * 600},b,test\n", "d.csv", "has a name of 604 bytes"),
        ("image,caption,split\n", "d.csv", "no caption of split 'test', it has"),
        ("", "d.xml", "d.xml: unknown kind of file, expected one of .json, .jsonl, .csv"),
    ],
)
def test_bad_annotations_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], contents: Any, name: str, message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, contents, name=name)
    assert stop.value.code == 2
    assert re.search(f"^error: .*{message}.*\n$", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d.json").write_text(json.dumps(FLICKR))
    (tmp_path / "there.db").mkdir()
    for option, source, output, message in (
        ("--annotations", "d.json", "there.db", "there.db: already exists"),
        ("--annotations", "absent.json", "deep/er/new.db", "absent.json: cannot be read"),
        ("--annot", "d.json", "new.db", "--annotations"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([option, str(tmp_path / source), "--split", "test", "--output", str(tmp_path / output)])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.json", "there.db"]


def test_program(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(json.dumps(FLICKR))
    program = [sys.executable, str(ROOT / "scripts/create_txtdb.py"), "--split", "test", "--annotations", "d.json"]
    done = subprocess.run([*program, "--output", "deep/er/new.db"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("deep/er/new.db: 3 texts of 2 images\n", "")
    assert len(TextDatabase(tmp_path / "deep/er/new.db")) == 3


def test_workers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [(f"{number}.jpg", "test", [(number, f"Man {number} rides.")]) for number in range(30)]
    monkeypatch.setattr("data.sources.captions.CHUNK", 7)
    monkeypatch.setattr("data.sources.captions.PER_WORKER", 5)
    contents = []
    for nproc in "12":
        (tmp_path / nproc).mkdir()
        path = run(tmp_path / nproc, karpathy("", *pictures), "--nproc", nproc)
        files = {file.name: file.read_text() for file in path.glob("*.json")}
        with LmdbReader(path) as store:
            contents.append((files, {key: bytes(store.get(key)) for key in store.keys()}))  # noqa: SIM118
    assert contents[0] == contents[1]
    assert [len(part) for part in contents[0]] == [4, 30]
