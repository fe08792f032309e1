"""scripts/inspect_db.py: what it shows of sound databases, its options, and its refusals."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture

from data.boxes import parse_layout
from data.text_db import TextDatabaseWriter
from data.tokenizer import load_tokenizer
from tests.conftest import BUNDLED
from tests.data.inspection.databases import FOLDER, IMAGES, NBB, edit, inspect, put, read_record, write_images, write_pair

ROOT = Path(__file__).resolve().parents[2]


def test_what_is_in_a_sound_pair(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    (pair / "images" / f"made_{FOLDER}.json").write_text('{"source": "npz", "options": {"conf_th": 0.2}, "left_out": []}')
    seen = inspect(pair / "images", pair / "texts.db")
    assert seen.code == 0
    words = re.sub(r" +", " ", seen.output)
    for line in (
        "texts 12",
        "images 6, texts: 2 per image",
        "word pieces 4 to 11 per text, 7.5 on average",
        "over 60 0 of 12 texts (0.00%), left out by --max_txt_len 60",
        "[UNK] 0 of 90 word pieces (0.00%)",
        "raw Two dogs run.",
        "toked_caption Two dogs run .",
        "decoded Two dogs run .",
        "annotations made.json",
        f"contents {parse_layout(FOLDER).describe()}",
        "images 6",
        "boxes 2 to 6 per image, 4.3 on average",
        "features 8 per box, float16",
        "source npz",
        "options.conf_th 0.2",
        "left_out []",
        "images 6 of 6 images (100.00%) of the texts found",
        "texts 12 of 12 texts (100.00%) with an image",
        f"4 6 50.0% {'#' * 35}",
    ):
        assert f" {line}\n" in words, line
    stored = [read_record(pair / "images", name) for name in IMAGES]
    for label, arrays in (
        ("features", [record["features"] for record in stored]),
        ("x1 y1 x2 y2", [record["norm_bb"][:, :4] for record in stored]),
        ("w h", [record["norm_bb"][:, 4:] for record in stored]),
        ("conf", [record["conf"] for record in stored]),
    ):
        values = np.concatenate([array.ravel() for array in arrays]).astype(np.float64)
        row = f"{values.min():.4g} {values.mean():.4g} {values.max():.4g} {(values == 0).mean():.1%}"
        assert f" {label} {row}\n" in words


def test_golden_databases_are_sound() -> None:
    folder = next(BUNDLED.image_db.glob("feat*"))
    for arguments in ([BUNDLED.text_db], [BUNDLED.image_db], [folder, BUNDLED.text_db]):
        assert inspect(*arguments).code == 0


def test_every_database_of_a_folder_is_inspected(tmp_path: Path) -> None:
    for compressed in (False, True):
        write_images(tmp_path, compressed=compressed)
        write_images(tmp_path, compressed=compressed, conf_th=-1)
        write_images(tmp_path, compressed=compressed, keep_all=True)
    seen = inspect(tmp_path)
    assert seen.code == 0
    folders = [name + suffix for name in ("all", "feat_numbb4", FOLDER) for suffix in ("", "_compressed")]
    assert re.findall(r"^IMAGE DATABASE  .*/(.*)$", seen.output, re.MULTILINE) == folders
    for folder in folders:
        assert f"  {parse_layout(folder).describe()}\n" in seen.output
    put(tmp_path / "feat_numbb4_compressed", IMAGES[2], b"PK")
    assert inspect(tmp_path).faults == {"records that are refused: is not an .npz ...": 1}
    assert inspect(tmp_path / "feat_numbb4").code == 0


def test_sample(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    for name in IMAGES:
        put(pair / "images" / FOLDER, name, b"")
    for options, read in (([], 6), (["--sample", 6], 6), (["--sample", 4], 4)):
        seen = inspect(pair / "images", pair / "texts.db", *options)
        assert sum(seen.faults.values()) == read
        assert inspect(pair / "texts.db", pair / "images", *options).list == seen.list
    for row in (
        r"images +6, of which a sample of 4 was read\n",
        r"texts +12, of which a sample of 4 was read\n",
        "6 of 6 images",
    ):
        assert re.search(row, seen.output)
    edit(pair / "images" / NBB, lambda boxes: boxes.pop(IMAGES[1]) and boxes)
    assert inspect(pair / "images", "--sample", 1).faults[f"images that {NBB} lacks"] == 1


def test_plot(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    plot = pair / "seen.png"
    plot.write_text("an older one")
    put(pair / "texts.db", "3", b"")
    assert inspect(pair / "texts.db", pair / "images", "--plot", plot).code == 1
    with Picture.open(plot) as picture:
        assert picture.format == "PNG"
        colours = np.asarray(picture.convert("RGB"))
    drawn = (colours == (0x31, 0x68, 0x8E)).all(axis=2)
    assert [half.mean() > 0.05 for half in np.array_split(drawn, 2)] == [True, True]  # lengths above, boxes below
    assert not list(pair.glob(".*"))
    (pair / "images" / FOLDER / "data.mdb").unlink()
    assert inspect(pair / "images", "--plot", plot).code == 1
    with Picture.open(plot) as picture:  # without histograms
        assert picture.size[0] > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: neither a text database nor an image database; the folder does not exist"),
        (["."], ": neither a text database nor an image database; the folder has bare.db, images, texts.db"),
        (["texts.db", "texts.db"], "texts.db: two text databases"),
        (["images", f"images/{FOLDER}"], f"{FOLDER}: two image databases"),
        (["texts.db", "images", "--sample", "0"], "--sample 0: expected"),
        (["texts.db", "--plot", "seen.gif"], "seen.gif: expected a file name that ends in .png"),
        (["texts.db", "--plot", "nowhere/seen.png"], "nowhere/seen.png: cannot be written"),
        (["bare.db"], "bare.db: not the name of an image database"),
    ],
)
def test_refusals(tmp_path: Path, words: list[str], message: str) -> None:
    pair = write_pair(tmp_path)
    (pair / "bare.db").mkdir()
    shutil.copy(pair / "texts.db/data.mdb", pair / "bare.db")
    seen = inspect(*(word if word.startswith("--") or word.isdigit() else pair / word for word in words))
    assert (seen.code, seen.errors.count("\n"), seen.output) == (2, 1, "")
    assert message in seen.errors


def test_too_few_descriptors() -> None:
    words = [sys.executable, "scripts/inspect_db.py", BUNDLED.text_db]
    done = subprocess.run(["bash", "-c", 'ulimit -n 7; exec "$@"', "bash", *words], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: cannot start a worker \(.*Too many open files\); try a lower --nproc, .*\n", done.stderr)


def test_program_in_ascii_and_in_several_processes(tmp_path: Path) -> None:
    tokenizer, database = load_tokenizer(), tmp_path / "many.db"
    ids = tokenizer.encode("A red circle is left of a small blue square.")
    with TextDatabaseWriter(database, tokenizer.meta()) as writer:
        for number in range(2500):
            writer.put(f"{number:04}", ids[: 1 + number % 11], f"é{number // 5}.npz", raw="Un café,\x1b[31m s'il vous plaît.")
    put(database, "0002", b"")
    put(database, "2499", b"")
    edit(database / "id2len.json", lambda lengths: lengths.update({"1500": 40}))
    done = subprocess.run(
        [sys.executable, "scripts/inspect_db.py", str(database), "--nproc", "2"],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "72"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, b"")
    report, _, faults = done.stdout.decode("ascii").partition("\nWRONG\n")
    assert re.search(r"raw +Un caf\\xe9, \[31m s'il vous pla\\xeet\.\n", report)
    assert re.search(r"^ +0-4 +911 +36\.4%  #{28}$", report, re.MULTILINE)
    assert max(map(len, re.sub(r"\S*many\.db", "", report).splitlines())) <= 80
    assert re.findall(r"\d+  .*|'\d+'.*", faults) == [
        "2  records that are refused: is cut short ...",
        "'0002': is cut short (lz4 frame without end)",
        "'2499': is cut short (lz4 frame without end)",
        "1  records of another length than in id2len.json",
        "'1500': 5 word pieces, id2len.json has 40",
    ]
    assert inspect(database).list == faults
