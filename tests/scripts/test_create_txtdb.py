"""scripts/create_txtdb.py on the three kinds of annotations, and its refusals."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from data.picture_names import feature_name
from data.text_db import TextDatabase
from data.tokenizer import load_tokenizer
from scripts.create_txtdb import main


def karpathy(dataset: str, *pictures: tuple[str, str, list[tuple[int, str]]]) -> dict[str, Any]:
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


def run(folder: Path, contents: Any, split: str = "test", name: str = "dataset.json", *more: str) -> Path:
    """Write annotations, convert them, return the database."""
    annotations, output = folder / name, folder / f"deep/er/itm_made_{split}.db"
    folder.mkdir(exist_ok=True)
    if not isinstance(contents, bytes):
        contents = (contents if isinstance(contents, str) else json.dumps(contents)).encode()
    annotations.write_bytes(contents)
    main(["--annotations", str(annotations), "--split", split, "--output", str(output), *more])
    return output


def test_flickr30k(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run(tmp_path, FLICKR)
    assert capsys.readouterr() == (f"{path}: 3 texts of 2 images\n", "")
    database, tokenizer = TextDatabase(path), load_tokenizer()
    assert list(database.ids) == ["5", "6", "10"]
    assert list(database.images) == ["flickr30k_000000036979.npz", "flickr30k_000000065567.npz"]
    assert database.image_of.tolist() == [0, 0, 1]
    raw = "Unaffable café-goers!"
    text = database["6"]
    assert text.input_ids.tolist() == tokenizer.encode(raw)
    names = {"filename": "36979.jpg", "split": "test", "dataset": "flickr30k"}
    assert text.extra == {"raw": raw, "toked_caption": tokenizer.tokens(text.input_ids), **names}
    meta = json.loads((path / "meta.json").read_text())
    assert meta["annotations"] == "dataset.json"
    assert meta["annotations_sha256"] == hashlib.sha256((tmp_path / "dataset.json").read_bytes()).hexdigest()
    assert (meta["split"], meta["toker"], meta["v_range"]) == ("test", "bert-base-cased", [106, 28996])
    assert meta["made_by"]["program"] == "scripts/create_txtdb.py"
    assert list(TextDatabase(run(tmp_path, FLICKR, "train")).images) == ["flickr30k_001000092795.npz"]


def test_names_of_features() -> None:
    for dataset, filename, folder, expected in [
        ("coco", "COCO_train2014_000000000009.jpg", "", "coco_train2014_000000000009.npz"),
        ("coco", "391895.jpg", "val2014", "coco_val2014_000000391895.npz"),
        ("scenes", "folder/scene_7.png", "", "scene_7.npz"),
    ]:
        assert feature_name(dataset, filename, folder) == expected
    for dataset, filename in (("coco", "391895.jpg"), ("coco", "COCO_val2014_.jpg"), ("flickr30k", "a.jpg"), ("", ".jpg")):
        with pytest.raises(ValueError, match="file name"):
            feature_name(dataset, filename)


ROWS = [("a.jpg", 'Red, "round".', "test"), ("b.jpg", "Blue\nsquare", "train"), ("a.jpg", "Ein Kreis ü", "test")]


def test_jsonl_and_csv_are_one(tmp_path: Path) -> None:
    lines = [json.dumps({"image": image, "caption": caption, "split": split, "x": 1}) for image, caption, split in ROWS]
    from_jsonl = TextDatabase(run(tmp_path, "\n\n".join(lines) + "\n", "test", "rows.jsonl"))
    table = StringIO()
    csv.writer(table).writerows([("split", "image", "caption"), *((split, image, raw) for image, raw, split in ROWS)])
    from_csv = TextDatabase(run(tmp_path / "csv", table.getvalue().encode("utf-8-sig"), "test", "rows.csv"))
    for database in (from_jsonl, from_csv):
        # Numbers of rows over all splits: the train split's row 1 is not here.
        assert (list(database.ids), list(database.images)) == (["0", "2"], ["a.npz"])
        assert [database[text_id].extra["raw"] for text_id in database.ids] == ['Red, "round".', "Ein Kreis ü"]


@pytest.mark.parametrize(("name", "image"), [("results_20130124.token", "flickr30k_00000000000"), ("8k.token.txt", "")])
def test_token_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, image: str) -> None:
    tokens, listed = "7.jpg#0\tTwo dogs .\n6.jpg#1\tDogs\n8.jpg#0\tA cat .\n9.jpg 0\tA bird .\n", tmp_path / "list.txt"
    listed.write_text("7.jpg\n8\n")
    main_of = ["--annotations", str(tmp_path / name), "--output", str(tmp_path / "t.db"), "--split"]
    for split, contents, message in (
        ("test", tokens, "error: test: no such file, expected a list of pictures, such as Flickr_8k.testImages.txt, as "),
        (str(listed), tokens, f"{name}: line 4: '9.jpg 0\\tA bird .' found, expected 1000092795.jpg#0, tab, caption\n"),
        (str(listed), "6.jpg#0\tA cat .", ": no caption of split "),
        (str(listed), "8.jpg#0\tA cat .", f": no caption of 1 picture in {listed}, such as '7'"),
    ):
        (tmp_path / name).write_text(contents)
        with pytest.raises(SystemExit, match="2"):
            main([*main_of, split])
        assert message in capsys.readouterr().err
    (tmp_path / name).write_text(tokens.replace("jpg 0", "jpg#0"))
    main([*main_of, str(listed)])
    database = TextDatabase(tmp_path / "t.db")
    assert (database.ids, database.images) == (["0", "2"], [f"{image}7.npz", f"{image}8.npz"])
    assert database["0"].extra["raw"] == "Two dogs ."


def test_another_vocabulary(tmp_path: Path) -> None:
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "A", "man"]))
    database = TextDatabase(run(tmp_path, FLICKR, "test", "dataset.json", "--vocab", str(vocab)))
    assert (database.vocab_size, database.cls_id, database.sep_id) == (7, 2, 3)
    assert database["10"].input_ids.tolist() == [5, 6, 1, 1, 1]


HEAD = "image,caption,split\n"
BAD_CSV = [
    (f"{HEAD}a,b\n", "line 2: 2 columns, expected 3 as in line 1"),
    (f"\n{HEAD}a.jpg,A dog, running,train\n", "line 3: 4 columns, expected 3 as in line 2"),
    ("Image,Caption,split\n", r"line 1 lacks columns image, caption; it has \['Image', 'Caption', 'split'\]"),
    ("image;caption\na.jpg;b\n", r"line 1 lacks columns .* it has \['image;caption'\]; expected .* separated by commas"),
    ("image,caption\na.jpg,b\n", "line 1 lacks column split; it has"),
    ("", "line 1 lacks columns image, caption, split; it has "),
    (f'{HEAD}a.jpg,"b\nc",test\na.jpg, ,test\n', "d.csv: line 4: text '1' of 'a.npz' has no word pieces"),
    (f"{HEAD}a.jpg,{'b' * 140_000},test\n", r"line 2: field larger than field limit \(131072\)"),
    (f"{HEAD}a/x.jpg,b,train\nb/x.jpg,b, test \n", "line 3: .* would both be image 'x.npz'"),
    (f"{HEAD}a.jpg,b,train\na.jpg,b,test\n", "line 3: 'a.jpg' is in 'train' and in 'test'"),
    (f'{HEAD}a.jpg,b,test\np0.jpg,"A dog.,test\n', "line 3: unexpected end of data; is a quotation mark not closed?"),
    ("image,caption,split,caption\na.jpg,b,test,c\n", "line 1: names a column twice"),
    (f"{HEAD}a,{'b ' * 5000},test\n", "has 5,000 word pieces, expected at most 4,096"),
    (f"{HEAD}{'a' * 600},b,test\n", "has a name of 604 bytes"),
    (HEAD, "no caption of split 'test', it has"),
]
BAD_JSONL = [
    ('{"image": "a", "caption": "b", "split": "test"}\nx', "line 2: JSON is malformed"),
    ('{"image": "a", "caption": "b"}', "line 1: .* `split`"),
]
BAD_JSON = [
    ("{", "d.json: Input data was truncated; expected Karpathy's JSON"),
    (b"\xff", "d.json: line 1: byte 0xff is not UTF-8, expected text in UTF-8"),
    ([], "Expected `object`, got `array`; expected Karpathy's JSON"),
    ({"images": [{"filename": 1, "split": "test", "sentences": []}]}, r"at `\$.images\[0\].filename`"),
    (karpathy("", ("1.jpg", "test", [(0, "\ud800")])), "surrogate pair"),
    (karpathy("flickr30k", ("x.jpg", "test", [(0, "a")])), r"images\[0\]: file name 'x.jpg' has no number"),
    (karpathy("", ("1.jpg", "test", [(0, "a"), (0, "b")])), r"images\[0\]: text id '0' occurs twice"),
    (karpathy("", ("1.jpg", "test", [(0, " ")])), r"d.json: images\[0\]: text '0' of '1.npz' has no word pieces"),
    (karpathy("", ("a/1.jpg", "test", [(0, "a")]), ("b/1.jpg", "test", [(1, "b")])), "would both be image '1.npz'"),
    (karpathy("", ("1.jpg", "tset", [(0, "a")])), r"no caption of split 'test' \(did you mean 'tset'\?\)"),
]
BAD = {"csv": BAD_CSV, "jsonl": BAD_JSONL, "json": BAD_JSON, "xml": [("", "d.xml: unknown kind of file")]}


@pytest.mark.parametrize(("kind", "number"), [(kind, number) for kind, cases in BAD.items() for number in range(len(cases))])
def test_bad_annotations_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, number: int) -> None:
    contents, message = BAD[kind][number]
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, contents, "test", f"d.{kind}")
    line = capsys.readouterr().err.strip().split("\n")[-1]
    assert (stop.value.code, bool(re.search(f"^error: .*{message}", line))) == (2, True), line
    assert [path.name for path in tmp_path.rglob("*")] == [f"d.{kind}"]


def test_other_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d.json").write_text(json.dumps(FLICKR))
    (tmp_path / "there.db").mkdir()
    for option, name, output, message in [
        ("--annotations", "d.json", "there.db", "error: there.db: already exists; remove it or choose another output\n"),
        ("--annotations", "absent.json", "deep/er/new.db", "error: absent.json: no such file, expected a file\n"),
        ("--annot", "d.json", "new.db", "--annotations"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main([option, str(tmp_path / name), "--split", "test", "--output", str(tmp_path / output)])
        assert (stop.value.code, message in capsys.readouterr().err.replace(f"{tmp_path}/", "")) == (2, True), message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.json", "there.db"]


def test_workers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [(f"{number}.jpg", "test", [(number, f"Man {number} rides.")]) for number in range(30)]
    monkeypatch.setattr("data.sources.captions.CHUNK", 7)
    monkeypatch.setattr("data.sources.captions.PER_WORKER", 5)
    one, two = (run(tmp_path / n, karpathy("", *pictures), "test", "dataset.json", "--nproc", n) for n in ("1", "2"))
    files = sorted(path.name for path in one.iterdir() if path.name != "lock.mdb")
    assert {"meta.json", "id2len.json", "txt2img.json", "img2txts.json", "data.mdb"} <= {*files}
    for name in files:
        assert (one / name).read_bytes() == (two / name).read_bytes()
