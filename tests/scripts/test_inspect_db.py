"""scripts/inspect_db.py: what it shows of sound databases, its options, and its refusals."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Picture

from data.boxes import parse_layout
from data.text_db import TextDatabaseWriter
from data.tokenizer import load_tokenizer
from tests.conftest import BUNDLED
from tests.data.inspection.databases import (
    CAPTIONS,
    FOLDER,
    IMAGES,
    NBB,
    Inspection,
    edit,
    put,
    read_record,
    write_images,
    write_texts,
)  # fmt: skip

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A folder with a text and an image database in which nothing is wrong."""
    write_images(tmp_path / "pair/images")
    write_texts(tmp_path / "pair/texts.db")
    return tmp_path / "pair"


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Callable[..., Inspection]:
    return partial(Inspection, capsys)


def test_what_is_in_a_sound_pair(pair: Path, inspect: Callable[..., Inspection]) -> None:
    (pair / "images" / f"made_{FOLDER}.json").write_text('{"source": "npz", "options": {"conf_th": 0.2}, "left_out": []}')
    seen = inspect(pair / "images", pair / "texts.db")
    assert seen.code == 0
    words = re.sub(r" +", " ", seen.output)
    for line in (
        "texts 12",
        "images 6, with 2 texts each",
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
        "images 6 of 6 images that the texts name are there (100.00%)",
        "texts 12 of 12 texts have their image (100.00%)",
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
    assert re.search(r"^ +4 +6 +50\.0%  █+$", seen.output, re.MULTILINE)


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
    folders = [name + suffix for name in ("all", "feat_numbb4", FOLDER) for suffix in ("", "_compressed")]
    assert re.findall(r"^IMAGE DATABASE  .*/(.*)$", seen.output, re.MULTILINE) == folders
    for folder in folders:
        assert f"  {parse_layout(folder).describe()}\n" in seen.output
    put(tmp_path / "feat_numbb4_compressed", IMAGES[2], b"PK")
    assert inspect(tmp_path).faults == {"records that are refused: is not an .npz ...": 1}
    assert inspect(tmp_path / "feat_numbb4").code == 0


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
    # A plot without histograms is written, too.
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
        (["bare.db"], "bare.db: not the name of an image database, expected one like feat_th0.2_max100_min10"),
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


def test_program_in_ascii_and_in_several_processes(tmp_path: Path, inspect: Callable[..., Inspection]) -> None:
    tokenizer, database = load_tokenizer(), tmp_path / "many.db"
    ids = tokenizer.encode(CAPTIONS[1])
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
    assert "raw        Un caf\\xe9, [31m s'il vous pla\\xeet.\n" in report
    assert re.search(r"^ +1-4 +911 +36\.4%  #{37}$", report, re.MULTILINE)
    assert max(map(len, re.sub(r"\S*many\.db", "", report).splitlines())) <= 72
    assert re.findall(r"\d+  .*|'\d+'.*", faults) == [
        "2  records that are refused: is cut short ...",
        "'0002': is cut short (lz4 frame without end)",
        "'2499': is cut short (lz4 frame without end)",
        "1  records of another length than in id2len.json",
        "'1500': 5 word pieces, id2len.json has 40",
    ]
    in_one_process = inspect(database)
    assert in_one_process.list.splitlines()[1:] == faults.splitlines()[1:]
