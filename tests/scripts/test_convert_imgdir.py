"""scripts/convert_imgdir.py: same result for any number of workers, bad files listed, nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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


def start(folder: Path, output: Path, **changes: Any) -> subprocess.Popen[bytes]:
    """A conversion by two workers in a process of its own."""
    words = ["--img_dir", str(folder), "--output", str(output), *FLAGS, "--nproc", "2"]
    return subprocess.Popen([sys.executable, "scripts/convert_imgdir.py", *words], cwd=ROOT, **changes)


def test_workers_change_nothing(folder: Path, tmp_path: Path) -> None:
    assert convert(folder, tmp_path / "one") == start(folder, tmp_path / "two").wait(60) == 0
    for name in (f"{NAME}/data.mdb", "nbb_th0.2_max6_min2.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_bad_files_are_listed_and_the_rest_converted(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = Detected(0, 5)
    boxes = good.shares()
    whole = (folder / "made_000000000004.npz").read_bytes()
    (folder / "b_folder.npz").mkdir()
    (folder / "b_short.npz").write_bytes(whole[: len(whole) // 2])
    np.savez(folder / "b_noconf.npz", features=good.features, norm_bb=boxes)
    bad: dict[str, dict[str, np.ndarray]] = {
        "b_rows": {"norm_bb": boxes[:3]},
        "b_pixels": {"norm_bb": boxes * 640},
        "b_turned": {"norm_bb": boxes[:, [2, 3, 0, 1, 4, 5]]},
        "b_size": {"norm_bb": boxes + np.eye(6)[5] * 0.002},
        "b_percent": {"conf": good.conf * 100},
        "b_none": {"features": good.features[:0], "norm_bb": boxes[:0], "conf": good.conf[:0]},
        "b_object": {"features": np.array([[{}]] * 5)},
        "b_nbb": {"nbb": np.array(6)},
        "b_nbb_scalar": {"conf": np.array(0.5), "nbb": np.array(1)},
        "n_wide": {"features": good.features.repeat(2, axis=1)},
    }
    for name, changes in bad.items():
        save_uniter(folder / f"{name}.npz", good, **changes)
    save_uniter(folder / "padded.npz", good, nbb=np.array(3))
    assert convert(folder, tmp_path / "db", "--keep_all") == 1
    heading, *lines = capsys.readouterr().err.strip().split("\n")[-len(bad) - 4 :]
    assert heading.startswith(f"{len(bad) + 3} of {len(bad) + 15} images")
    listed = {Path(place).stem: reason for place, _, reason in (line.strip().partition(": ") for line in lines)}
    assert set(listed) == {"b_short", "b_folder", "b_noconf", *bad}
    assert listed["b_noconf"] == "has no conf"
    assert "not an .npz" in listed["b_short"]
    assert "expected a number of boxes from 1 to 5" in listed["b_nbb"]
    assert "columns 5 and 6 must be x2 - x1 and y2 - y1" in listed["b_size"]
    assert listed["n_wide"] == "has 24 features per box, expected 12 as in the first image"
    numbers = json.loads((tmp_path / "db/nbb.json").read_text())
    assert numbers == {**{f"made_{number:012d}.npz": 1 + number for number in range(11)}, "padded.npz": 3}


def test_user_errors_are_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def check_refusal(message: str, source: Path, *flags: str) -> None:
        assert convert(source, tmp_path / "db", *flags) == 2
        assert message in capsys.readouterr().err.strip().split("\n")[-1]

    (tmp_path / "empty").mkdir()
    check_refusal("absent: cannot be read", tmp_path / "absent")
    check_refusal("empty: no .npz or .npy file in it", tmp_path / "empty")
    (tmp_path / "empty/x.npz").touch()
    check_refusal(f"error: {tmp_path}/db/{NAME}: not made", tmp_path / "empty")
    check_refusal("--sizes: required for VinVL's TSV", folder, "--sizes", "hw.tsv")
    assert not (tmp_path / "db").exists()
    check_refusal("min_bb 9 and max_bb 8", folder, "--min_bb", "9", "--max_bb", "8")
    check_refusal("--nproc: 0: expected", folder, "--nproc", "0")
    check_refusal("--img", folder, "--img", "x")
    assert not any((tmp_path / "db").glob("*"))
    assert convert(folder, tmp_path / "db") == 0
    check_refusal("already exists", folder)
    # A database beside its compressed twin has to have the same images.
    (folder / "made_000000000000.npz").rename(folder / "another.npz")
    check_refusal(f"belongs to {NAME}, which has other images", folder, "--compress")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_workers_end_with_a_parent_that_is_killed(folder: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    """The next conversion removes what they left."""
    os.mkfifo(folder / "x.npz")  # refused, but it makes no difference
    for copy in range(400):
        (folder / f"copy_{copy}.npz").write_bytes((folder / "made_000000000010.npz").read_bytes())
    process = start(folder, tmp_path / "db", stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for(lambda: list(tmp_path.glob("db/.feat*")))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_for(lambda: len(children.read_text().split()) >= 2)
    started = children.read_text().split()
    process.send_signal(number)
    assert process.wait(30) == code
    wait_for(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in started))
    assert not list(tmp_path.glob("db/feat*"))
    assert bool(list(tmp_path.glob("db/.feat*"))) == (number == signal.SIGKILL)
    assert convert(folder, tmp_path / "db") == 1  # the pipe
    assert not list(tmp_path.glob("db/.*"))


def wait_for(condition: Callable[[], object]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("not within 30 s")
