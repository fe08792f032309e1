"""The log of a run, written and read back."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.launch import ROOT
from utils.errors import InputError
from utils.logging import EVENT_FILES, RunLog, read_scalars


def test_a_full_disk_for_the_logs(tmp_path: Path) -> None:
    program = (
        "import pathlib, resource, sys; from utils.logging import RunLog; log = RunLog(pathlib.Path(sys.argv[1]));"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY));"
        "[log.scalars({'loss': 1.0}, update) for update in range(1000)]"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert f"{tmp_path}: TensorBoard's events cannot be written (File too large)" in done.stderr


def recorded(folder: Path, updates: range, after: int = 0, factor: float = 1.0) -> Path:
    """The event file of a part of a run that goes on after so many updates; its name tells nothing of its time."""
    with RunLog(folder, after) as log:
        for update in updates:
            log.scalars({"train/rank": factor / update, "train/lr": 0.5}, update)
    (written,) = (file for file in folder.glob(EVENT_FILES) if file.name.split(".")[3].isdecimal())
    return written.rename(folder / f"events.out.tfevents.{next(NAMES)}")


NAMES = (f"part-{number}" for number in itertools.count(1000, -1))


def test_scalars_are_read_back(tmp_path: Path) -> None:
    recorded(tmp_path, range(1, 6))
    read = read_scalars(tmp_path)
    assert read == {
        "train/rank": {update: float(np.float32(1 / update)) for update in range(1, 6)},
        "train/lr": dict.fromkeys(range(1, 6), 0.5),
    }


def test_a_resumed_run_forgets_what_it_does_again(tmp_path: Path) -> None:
    recorded(tmp_path, range(1, 9))
    recorded(tmp_path, range(5, 7), after=4, factor=2)
    recorded(tmp_path, range(6, 8), after=5, factor=4)
    ranking = read_scalars(tmp_path)["train/rank"]
    expected = {1: 1, 2: 1 / 2, 3: 1 / 3, 4: 1 / 4, 5: 2 / 5, 6: 4 / 6, 7: 4 / 7}
    assert ranking == pytest.approx(expected)
    assert list(ranking) == list(expected)


def test_a_kill_at_any_byte_costs_the_record_that_it_cuts(tmp_path: Path) -> None:
    file = recorded(tmp_path, range(1, 4))
    contents = file.read_bytes()
    ends = {0: 0}  # by the bytes there are, the scalars in them
    start = count = 0
    while start < len(contents):
        start += 16 + int.from_bytes(contents[start : start + 8], "little")
        count += 1
        ends[start] = max(count - 2, 0)  # the first two are the version and the start of the session
    for size in range(len(contents)):
        file.write_bytes(contents[:size])
        read = read_scalars(tmp_path)
        assert sum(map(len, read.values())) == max(scalars for end, scalars in ends.items() if end <= size)


def test_damaged_events_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no events\.out\.tfevents\.\* in it, expected the log folder of a training"):
        read_scalars(tmp_path)
    file = recorded(tmp_path, range(1, 4))
    contents = file.read_bytes()
    for place in (3, 9, 14, len(contents) // 2, len(contents) - 1):
        file.write_bytes(contents[:place] + bytes([contents[place] ^ 64]) + contents[place + 1 :])
        with pytest.raises(InputError, match=rf"{file}: damaged at byte \d+ \(its checksum does not fit\)"):
            read_scalars(tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(InputError, match=f"{file}: cannot be read"):
        read_scalars(tmp_path)
