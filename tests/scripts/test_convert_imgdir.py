"""scripts/convert_imgdir.py: same result for any number of workers, bad files listed, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.boxes import BoxRule
from data.image_db import ImageDatabase
from data.lmdb_store import LmdbReader
from scripts.convert_imgdir import main

ROOT = Path(__file__).resolve().parents[2]
RULE = {"max_bb": 6, "min_bb": 2, "num_bb": 4}
FLAGS = ["--max_bb", "6", "--min_bb", "2", "--num_bb", "4"]


def regions(rows: int, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    features, boxes = random.standard_normal((rows, 12)), random.random((rows, 6))
    boxes[:, 2:4] = boxes[:, :2] + (1 - boxes[:, :2]) * boxes[:, 2:4]
    return {
        "features": features.astype(np.float32),
        "norm_bb": boxes.astype(np.float32),
        "conf": random.random(rows).astype(np.float32),
        "soft_labels": random.random((rows, 5)).astype(np.float32),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "features"
    path.mkdir()
    for number in range(11):
        save = np.savez_compressed if number % 2 else np.savez
        save(path / f"made_{number:012d}.npz", **regions(1 + number, number))
    return path


def convert(folder: Path, output: Path, *flags: str) -> None:
    main(["--img_dir", str(folder), "--output", str(output), *FLAGS, "--nproc", "1", *flags])


@pytest.mark.parametrize("flags", [[], ["--compress"], ["--keep_all"], ["--conf_th", "-1"], ["--keep_all", "--compress"]])
def test_every_layout_is_sorted_filtered_and_half(folder: Path, tmp_path: Path, flags: list[str]) -> None:
    convert(folder, tmp_path / "db", *flags)
    conf_th = -1 if "--conf_th" in flags else 0.2
    database = ImageDatabase(tmp_path / "db", BoxRule(conf_th=conf_th, **RULE), compressed="--compress" in flags)
    assert database.names() == sorted(path.name for path in folder.iterdir())
    for number, name in enumerate(database.names()):
        source = regions(1 + number, number)
        order = np.argsort(-source["conf"])
        kept = 4 if conf_th == -1 else min(max(int((source["conf"] > 0.2).sum()), 2), 6)
        image = database[name]
        np.testing.assert_array_equal(image.features, source["features"][order][:kept].astype(np.float16))
        six = source["norm_bb"][order][:kept].astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(image.boxes, np.concatenate([six, six[:, 4:5] * six[:, 5:6]], axis=1))
        assert image.features.dtype == np.float16
    database.close()


def test_rows_past_nbb_are_padding(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    arrays = regions(9, 1)
    arrays["conf"][5:] = 1
    np.savez(tmp_path / "in" / "a.npz", **arrays, nbb=np.array(5))
    convert(tmp_path / "in", tmp_path / "db", "--keep_all")
    assert json.loads((tmp_path / "db" / "nbb.json").read_text()) == {"a.npz": 5}


def test_workers_change_nothing(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "one")
    command = [sys.executable, "scripts/convert_imgdir.py", "--img_dir", str(folder), "--output", str(tmp_path / "two"), *FLAGS]
    subprocess.run([*command, "--nproc", "2"], cwd=ROOT, check=True)
    name = "feat_th0.2_max6_min2"
    with LmdbReader(tmp_path / "one" / name) as one, LmdbReader(tmp_path / "two" / name) as two:
        assert list(one.keys()) == list(two.keys())
        for key in [*one.keys(), "__keys__"]:
            assert bytes(one.get(key)) == bytes(two.get(key))
    files = [tmp_path / output / "nbb_th0.2_max6_min2.json" for output in ("one", "two")]
    assert files[0].read_text() == files[1].read_text()


def test_bad_files_are_listed_and_the_rest_converted(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = regions(5, 0)
    (folder / "b_text.npz").write_text("no archive")
    (folder / "b_empty.npz").touch()
    whole = (folder / "made_000000000004.npz").read_bytes()
    (folder / "b_short.npz").write_bytes(whole[: len(whole) // 2])
    (folder / "b_folder.npz").mkdir()
    bad = {
        "b_noconf": {key: array for key, array in good.items() if key != "conf"},
        "b_rows": {**good, "norm_bb": good["norm_bb"][:3]},
        "b_boxes": {**good, "norm_bb": good["norm_bb"][:, :4]},
        "b_percent": {**good, "conf": good["conf"] * 100},
        "b_pixels": {**good, "norm_bb": good["norm_bb"] * 640},
        "b_turned": {**good, "norm_bb": good["norm_bb"][:, [2, 3, 0, 1, 4, 5]]},
        "b_none": {key: array[:0] for key, array in good.items()},
        "b_nan": {**good, "features": good["features"] * np.nan},
        "b_large": {**good, "features": good["features"] + 1e9},
        "b_object": {**good, "features": np.array([[{}]] * 5)},
        "b_nbb": {**good, "nbb": np.array(6)},
        "b_scalar": {**good, "conf": np.array(0.5)},
        "b_nbb_scalar": {**good, "conf": np.array(0.5), "nbb": np.array(1)},
    }
    for name, arrays in bad.items():
        np.savez(folder / f"{name}.npz", **arrays)
    with pytest.raises(SystemExit) as stop:
        convert(folder, tmp_path / "db")
    assert stop.value.code == 1
    lines = capsys.readouterr().err.strip().split("\n")
    start = next(number for number, line in enumerate(lines) if "could not be used" in line)
    assert lines[start].startswith(f"{len(bad) + 4} of {len(bad) + 15} images")
    listed = {Path(line.split(": ")[0].strip()).stem: line.split(": ", 1)[1] for line in lines[start + 1 :]}
    assert set(listed) == {"b_text", "b_empty", "b_short", "b_folder", *bad}
    assert listed["b_noconf"] == "has no conf"
    assert "not an .npz" in listed["b_text"]
    assert "expected a number of boxes from 1 to 5" in listed["b_nbb"]
    database = ImageDatabase(tmp_path / "db", BoxRule(**RULE))
    assert len(database) == 11
    assert all(name.startswith("made_") for name in database.names())
    database.close()


def test_user_errors_are_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        assert stop.value.code == 2
        return capsys.readouterr().err.strip().split("\n")[-1]

    output, empty = str(tmp_path / "db"), tmp_path / "empty"
    empty.mkdir()
    assert refusal("--img_dir", str(tmp_path / "absent"), "--output", output).endswith(
        "absent: cannot be read (No such file or directory), expected a folder"
    )
    assert refusal("--img_dir", str(empty), "--output", output).endswith("empty: no .npz or .npy file in it")
    (empty / "x.npz").touch()
    line = refusal("--img_dir", str(empty), "--output", output, "--nproc", "1")
    assert line == f"error: {output}/feat_th0.2_max100_min10: not made, no image can be used"
    assert not (tmp_path / "db").exists()
    assert "min_bb 9 and max_bb 8" in refusal("--img_dir", str(folder), "--output", output, "--min_bb", "9", "--max_bb", "8")
    assert "--nproc: 0: expected 1 to 256" in refusal("--img_dir", str(folder), "--output", output, "--nproc", "0")
    assert "--img_dir" in refusal("--img", str(folder), "--output", output)
    assert not any((tmp_path / "db").glob("*"))
    convert(folder, tmp_path / "db")
    assert "already exists" in refusal("--img_dir", str(folder), "--output", output, *FLAGS)


def test_a_database_beside_its_twin_must_agree_at_once(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(folder, tmp_path / "db")
    convert(folder, tmp_path / "db", "--compress")
    (folder / "made_000000000000.npz").rename(folder / "another.npz")
    shutil.rmtree(tmp_path / "db/feat_th0.2_max6_min2_compressed")
    with pytest.raises(SystemExit) as stop:
        convert(folder, tmp_path / "db", "--compress")
    assert stop.value.code == 2
    assert "belongs to feat_th0.2_max6_min2, which has other images" in capsys.readouterr().err


def test_workers_end_with_a_parent_that_is_killed(folder: Path, tmp_path: Path) -> None:
    """SIGKILL and SIGTERM in the midst; the next call finds nothing in its way."""
    command = [sys.executable, "scripts/convert_imgdir.py", "--img_dir", str(folder), "--output", str(tmp_path / "db"), *FLAGS]
    os.mkfifo(folder / "x.npz")  # refused, but it makes no difference
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        for copy in range(400):
            (folder / f"copy_{number}_{copy}.npz").write_bytes((folder / "made_000000000010.npz").read_bytes())
        process = subprocess.Popen([*command, "--nproc", "2"], cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
        wait_for(lambda: list(tmp_path.glob("db/.feat*")))
        wait_for(lambda pid=process.pid: len(children(pid)) >= 2)
        started = children(process.pid)
        process.send_signal(number)
        assert process.wait(30) == code
        wait_for(lambda started=started: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in started))
        assert not list(tmp_path.glob("db/feat*"))
        assert bool(list(tmp_path.glob("db/.feat*"))) == (number == signal.SIGKILL)
    with pytest.raises(SystemExit) as stop:
        convert(folder, tmp_path / "db")
    assert stop.value.code == 1  # the pipe
    assert [path.name for path in (tmp_path / "db").iterdir() if path.name.startswith(".")] == []


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def wait_for(condition: Callable[[], object]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("nothing of it within 30 s")
