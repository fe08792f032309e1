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

from data.lmdb_store import LmdbReader
from scripts.convert_imgdir import main
from tests.data.sources.detectors import Detected, save_uniter

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--max_bb", "6", "--min_bb", "2", "--num_bb", "4"]
NAME = "feat_th0.2_max6_min2"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "features"
    path.mkdir()
    for number in range(11):
        save_uniter(path / f"made_{number:012d}.npz", Detected(number, 1 + number))
    return path


def convert(folder: Path, output: Path, *flags: str) -> int:
    """The exit code of a conversion in this process."""
    try:
        main(["--img_dir", str(folder), "--output", str(output), *FLAGS, "--nproc", "1", *flags])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_rows_past_nbb_are_padding(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save_uniter(tmp_path / "in/a.npz", Detected(1, 9), nbb=np.array(5))
    assert convert(tmp_path / "in", tmp_path / "db", "--keep_all") == 0
    assert json.loads((tmp_path / "db/nbb.json").read_text()) == {"a.npz": 5}


def test_workers_change_nothing(folder: Path, tmp_path: Path) -> None:
    assert convert(folder, tmp_path / "one") == 0
    command = [sys.executable, "scripts/convert_imgdir.py", "--img_dir", str(folder), "--output", str(tmp_path / "two"), *FLAGS]
    subprocess.run([*command, "--nproc", "2"], cwd=ROOT, check=True)
    with LmdbReader(tmp_path / "one" / NAME) as one, LmdbReader(tmp_path / "two" / NAME) as two:
        assert list(one.keys()) == list(two.keys())
        for key in [*one.keys(), "__keys__"]:
            assert bytes(one.get(key)) == bytes(two.get(key))
    files = [tmp_path / output / "nbb_th0.2_max6_min2.json" for output in ("one", "two")]
    assert files[0].read_text() == files[1].read_text()


def test_bad_files_are_listed_and_the_rest_converted(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = Detected(0, 5)
    boxes = good.shares()
    (folder / "b_text.npz").write_text("no archive")
    (folder / "b_empty.npz").touch()
    whole = (folder / "made_000000000004.npz").read_bytes()
    (folder / "b_short.npz").write_bytes(whole[: len(whole) // 2])
    (folder / "b_folder.npz").mkdir()
    np.savez(folder / "b_noconf.npz", features=good.features, norm_bb=boxes)
    bad: dict[str, dict[str, np.ndarray]] = {
        "b_rows": {"norm_bb": boxes[:3]},
        "b_boxes": {"norm_bb": boxes[:, :4]},
        "b_pixels": {"norm_bb": boxes * 640},
        "b_turned": {"norm_bb": boxes[:, [2, 3, 0, 1, 4, 5]]},
        "b_percent": {"conf": good.conf * 100},
        "b_none": {"features": good.features[:0], "norm_bb": boxes[:0], "conf": good.conf[:0]},
        "b_nan": {"features": good.features * np.nan},
        "b_large": {"features": good.features + 1e9},
        "b_object": {"features": np.array([[{}]] * 5)},
        "b_nbb": {"nbb": np.array(6)},
        "b_scalar": {"conf": np.array(0.5)},
        "b_nbb_scalar": {"conf": np.array(0.5), "nbb": np.array(1)},
        "n_wide": {"features": good.features.repeat(2, axis=1)},
    }
    for name, changes in bad.items():
        save_uniter(folder / f"{name}.npz", good, **changes)
    assert convert(folder, tmp_path / "db") == 1
    lines = capsys.readouterr().err.strip().split("\n")
    start = next(number for number, line in enumerate(lines) if "could not be used" in line)
    assert lines[start].startswith(f"{len(bad) + 5} of {len(bad) + 16} images")
    listed = {Path(line.split(": ")[0].strip()).stem: line.split(": ", 1)[1] for line in lines[start + 1 :]}
    assert set(listed) == {"b_text", "b_empty", "b_short", "b_folder", "b_noconf", *bad}
    assert listed["b_noconf"] == "has no conf"
    assert "not an .npz" in listed["b_text"]
    assert "expected a number of boxes from 1 to 5" in listed["b_nbb"]
    assert listed["n_wide"] == "has 24 features per box, expected 12 as in the first image"
    with LmdbReader(tmp_path / "db" / NAME) as store:
        assert list(store.keys()) == [f"made_{number:012d}.npz" for number in range(11)]


def test_user_errors_are_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(source: Path, *flags: str) -> str:
        assert convert(source, tmp_path / "db", *flags) == 2
        return capsys.readouterr().err.strip().split("\n")[-1]

    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "absent").endswith("absent: cannot be read (No such file or directory), expected a folder")
    assert refusal(tmp_path / "empty").endswith("empty: no .npz or .npy file in it")
    (tmp_path / "empty/x.npz").touch()
    assert refusal(tmp_path / "empty") == f"error: {tmp_path}/db/{NAME}: not made, no image can be used"
    assert "--sizes: required for VinVL's TSV" in refusal(folder, "--sizes", "hw.tsv")
    assert not (tmp_path / "db").exists()
    assert "min_bb 9 and max_bb 8" in refusal(folder, "--min_bb", "9", "--max_bb", "8")
    assert "--nproc: 0: expected 1 to 256" in refusal(folder, "--nproc", "0")
    assert "--img" in refusal(folder, "--img", "x")
    assert not any((tmp_path / "db").glob("*"))
    assert convert(folder, tmp_path / "db") == 0
    assert "already exists" in refusal(folder)
    # A database beside its compressed twin has to have the same images.
    assert convert(folder, tmp_path / "db", "--compress") == 0
    (folder / "made_000000000000.npz").rename(folder / "another.npz")
    shutil.rmtree(tmp_path / f"db/{NAME}_compressed")
    assert f"belongs to {NAME}, which has other images" in refusal(folder, "--compress")


def test_workers_end_with_a_parent_that_is_killed(folder: Path, tmp_path: Path) -> None:
    """SIGKILL and SIGTERM during a conversion; the next one removes what they left."""
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
    assert convert(folder, tmp_path / "db") == 1  # the pipe
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
    pytest.fail("not within 30 s")
