"""The log folder of a run, written and read back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest

import inf_itm
from scripts import ablate
from tests.conftest import BUNDLED
from tests.processes import ROOT
from tests.scripts.test_ablate import written
from tests.test_programs import fails, inference
from utils.errors import InputError
from utils.files import exclusive_folder
from utils.logging import SCALARS, RunLog, read_scalars


def record(folder: Path, updates: range, after: int = 0, factor: float = 1.0) -> Path:
    """Record a run, or the part of it that is resumed after ``after`` updates; return the file."""
    with RunLog(folder, after) as log:
        for update in updates:
            log.scalars({"train/rank": factor / update, "train/lr": 0.5}, update)
    return folder / SCALARS


def test_scalars_are_read_back(tmp_path: Path) -> None:
    record(tmp_path, range(1, 6))
    rank = {update: 1 / update for update in range(1, 6)}
    assert read_scalars(tmp_path) == {"train/rank": rank, "train/lr": dict.fromkeys(rank, 0.5)}
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_a_resumed_run_drops_what_it_repeats(tmp_path: Path) -> None:
    record(tmp_path, range(1, 9))
    record(tmp_path, range(5, 7), after=4, factor=2)
    record(tmp_path, range(6, 8), after=5, factor=4)
    rank = read_scalars(tmp_path)["train/rank"]
    assert list(rank.items()) == [(1, 1), (2, 1 / 2), (3, 1 / 3), (4, 1 / 4), (5, 2 / 5), (6, 4 / 6), (7, 4 / 7)]


def test_a_kill_at_any_byte_loses_one_line_at_most(tmp_path: Path) -> None:
    contents = record(tmp_path, range(1, 4)).read_bytes()
    for size in range(len(contents)):
        (tmp_path / SCALARS).write_bytes(contents[:size])
        whole = contents[:size].count(b"\n")
        assert list(read_scalars(tmp_path).get("train/lr", {})) == list(range(1, whole + 1))
        if size % 16 == 0:
            record(tmp_path, range(whole + 1, 5), after=whole)
            assert list(read_scalars(tmp_path)["train/lr"]) == [1, 2, 3, 4]


def test_one_run_at_a_time_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second one ends at once, changes nothing, and may start when the first has been killed."""
    folder = tmp_path / "run"
    hold = (
        "import sys; from pathlib import Path; from utils.files import exclusive_folder; from utils.logging import RunLog;"
        "folder = exclusive_folder(sys.argv[1]); log = RunLog(folder.__enter__()); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", hold, folder], cwd=ROOT, stdin=PIPE, stdout=PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        before = sorted(folder.iterdir())
        for main, options in (
            (inf_itm.main, inference(BUNDLED.text_db, BUNDLED.image_db, folder)),
            (ablate.main, [str(written(tmp_path)), "--output", str(folder)]),
        ):
            assert f"error: {folder}: another run is using this folder" in fails(capsys, main, options)
        with pytest.raises(InputError, match="another run is using this folder"):
            RunLog(folder)
        assert sorted(folder.iterdir()) == before
        holder.kill()
    with exclusive_folder(folder):
        record(folder, range(1, 2))
    assert not (folder / ".lock").exists()


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"no {SCALARS} in it, expected the log folder of a training"):
        read_scalars(tmp_path)
    file = record(tmp_path, range(1, 4))
    contents = file.read_bytes()
    for damage in (b"{", b"[]", b"7", b'{"loss": 1}', b'{"update": 1, "loss": "x"}', b'{"update": 1e999}', b"\xff"):
        file.write_bytes(contents + damage + b"\n" + contents)
        for use in (lambda: read_scalars(tmp_path), lambda: RunLog(tmp_path, 9)):
            with pytest.raises(InputError, match=f"{file}: line 4: damaged, expected"):
                use()
    file.unlink()
    file.mkdir()
    with pytest.raises(InputError, match=f"{file}: cannot be read"):
        read_scalars(tmp_path)


def test_a_full_disk(tmp_path: Path) -> None:
    program = (
        "import pathlib, resource, sys; from utils.logging import RunLog; log = RunLog(pathlib.Path(sys.argv[1]));"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY));"
        "[log.scalars({'loss': 1.0}, update) for update in range(1000)]"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert f"{tmp_path}: the scalars cannot be written (File too large)" in done.stderr
