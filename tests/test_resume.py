"""A training that is killed, stopped, or runs into a full disk resumes to the exact weights of an uninterrupted one."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboardX.proto.event_pb2 import Event, SessionLog

import train_itm_hard_negatives
from tests.conftest import BUNDLED
from tests.processes import ENVIRONMENT, LAUNCHERS, Forked, die_at_call, finish, free_port, run, start
from tests.test_programs import fails, training

DATABASES = BUNDLED.text_db, BUNDLED.image_db
STEPS = 12


def options(output: Path, *extra: str, **changes: object) -> list[str]:
    """A training of twelve updates with IAIS and dropout, validated twice."""
    steps = {"num_train_steps": STEPS, "valid_steps": 7, "save_steps": 2}
    settings = {**steps, "inf_minibatch_size": 5, "train_batch_size": 1, "IAIS": "singular"}
    return training(*DATABASES, output, "--no-full_val", *extra, **settings | changes)


def train(output: Path, *extra: str, **changes: object) -> None:
    train_itm_hard_negatives.main(options(output, *extra, **changes))


def fork(arguments: list[str], **how: Any) -> Forked:
    return Forked("train_itm_hard_negatives", *arguments, **how)


def kill(process: Forked) -> None:
    process.kill()
    finish(process, 10)


def states(run: Path) -> list[int]:
    """The updates after which the training states in ``run`` were saved."""
    return sorted(int(path.stem.removeprefix("state-")) for path in run.glob("ckpt/state-*.pt"))


def assert_same_results(one: Path, other: Path, *, states: bool = True) -> None:
    for name in ("model_last", "model_best", *([f"state-{STEPS}"] if states else [])):
        first, second = (torch.load(run / f"ckpt/{name}.pt", weights_only=True) for run in (one, other))
        assert same(first, second), name
    assert (one / "log/results.json").read_text() == (other / "log/results.json").read_text()
    assert not list(other.rglob("*.partial"))


def same(one: object, other: object) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return one == other


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder)
    return folder


def killed(run: Path, function: str, number: int, wanted: str = "", delay: float = 0) -> bool:
    """Start or resume ``run``, to be killed at a call of a function; return whether it was, or finished before."""
    before = states(run)
    prepare = functools.partial(die_at_call, function, number, wanted, delay)
    process = fork(options(run, "--resume"), prepare=prepare)
    output = finish(process, 60)
    assert process.returncode in (-signal.SIGKILL, 0), output
    assert max(states(run), default=0) >= max(before, default=0), "the newest state was lost"
    return process.returncode != 0


MOMENTS: dict[str, tuple[str, int, str]] = {
    "before anything is saved": ("optim.run_folder.save_tensors", 1, ""),
    "while a state is written": ("utils.tensors._Stream.write", 30, ""),
    "before a complete state is renamed": ("os.replace", 2, "/state-"),
    "after the renaming, before the folder is synchronised": ("utils.files.sync_folder", 2, "/ckpt"),
    "before an old state is deleted": ("pathlib.Path.unlink", 1, "/state-"),
    "in a validation": ("evaluation.scoring._score_block", 5, ""),
    "in the next validation": ("evaluation.scoring._score_block", 18, ""),
}


@pytest.mark.parametrize(
    "moments",
    [["while a state is written", "in a validation"], pytest.param(list(MOMENTS), marks=pytest.mark.long)],
    ids=["two", "all"],
)
def test_killed_at_critical_moments(tmp_path: Path, whole: Path, moments: list[str]) -> None:
    for moment in moments:
        assert killed(tmp_path / "run", *MOMENTS[moment]), moment
    train(tmp_path / "run", "--resume")
    assert_same_results(whole, tmp_path / "run")


@pytest.mark.parametrize("kills", [1, pytest.param(14, marks=pytest.mark.long)])
def test_killed_at_random_moments(tmp_path: Path, whole: Path, kills: int) -> None:
    chance, runs = random.Random(9), [tmp_path / "0"]
    while kills:
        if killed(runs[-1], "optim.trainer.Trainer.update", chance.randint(1, 5), delay=chance.uniform(0, 0.5)):
            kills -= 1
        else:
            runs.append(tmp_path / f"{len(runs)}")
    train(runs[-1], "--resume")
    for finished in runs:
        assert_same_results(whole, finished)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_saves_and_ends(tmp_path: Path, whole: Path, number: int, code: int) -> None:
    """Before any state is due; like a terminal, signal the DataLoader's worker along with the training."""
    extra = {"n_workers": 1, "save_steps": 1000}
    process = fork(options(tmp_path / "run", **extra))
    wait_for_updates(tmp_path / "run", 2)
    os.killpg(process.pid, number)
    output = finish(process, 30, code=code)
    assert f"interrupted by {signal.Signals(number).name}" in output
    assert "Traceback" not in output
    assert 2 <= max(states(tmp_path / "run")) < STEPS
    train(tmp_path / "run", "--resume", **extra)
    assert_same_results(whole, tmp_path / "run")
    assert scalars(tmp_path / "run") == list(range(1, STEPS + 1))


def wait_for_updates(run: Path, count: int) -> None:
    """TensorBoard's events are written after each update."""
    for _ in range(1200):
        if len(scalars(run)) >= count:
            return
        time.sleep(0.05)
    pytest.fail(f"no {count} updates in {run} within 60 s")


def event_files(run: Path) -> list[Path]:
    return sorted(run.glob("log/events*"), key=lambda path: path.stat().st_mtime_ns)


def scalars(run: Path) -> list[int]:
    """The updates for which TensorBoard has the gradient's norm, in the order in which they were written."""
    written = [event for path in event_files(run) for event in events(path)]
    return [event.step for event in written for value in event.summary.value if value.tag == "train/grad_norm"]


def events(path: Path) -> list[Event]:
    """The complete events in a file of TensorBoard's: length, checksum, event, checksum, again and again."""
    data, found = path.read_bytes(), []
    while len(data) >= 16 and len(data) >= 16 + (length := int.from_bytes(data[:8], "little")):
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two ranks, with the variables that torchrun sets."""
    folder = tmp_path_factory.mktemp("two") / "run"
    meeting = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    ranks = [fork(options(folder), environment=ENVIRONMENT | meeting | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    for rank in ranks:
        finish(rank, 200, code=0)
    return folder


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_stop_and_resume(tmp_path: Path, whole_of_two: Path, launcher: str) -> None:
    """Queues send SIGTERM to the launcher."""
    arguments = ["train_itm_hard_negatives.py", *options(tmp_path / "run", save_steps=1000)]
    process = start(launcher, 2, sys.executable, *arguments)
    wait_for_updates(tmp_path / "run", 2)
    process.terminate()
    output = finish(process, 30)
    assert process.returncode != 0
    assert "interrupted by SIGTERM" in output
    assert 2 <= max(states(tmp_path / "run")) < STEPS
    run(launcher, 2, sys.executable, *arguments, "--resume")
    assert_same_results(whole_of_two, tmp_path / "run")


def test_another_number_of_ranks_is_a_warning(tmp_path: Path, whole_of_two: Path) -> None:
    train(tmp_path / "run", "--resume", str(whole_of_two / f"ckpt/state-{STEPS - 2}.pt"))
    assert re.search(r"\w+: was 2, is 1: the result may differ", (tmp_path / "run/log/log.txt").read_text())
    assert max(states(tmp_path / "run")) == STEPS


def test_a_full_disk_keeps_the_older_state(tmp_path: Path, whole: Path) -> None:
    """The kernel stops writing in the middle of the second state after update 7, the first one with the best weights."""
    limit = 3 * (whole / "ckpt/model_last.pt").stat().st_size + 500_000
    limited = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    output = finish(fork(options(tmp_path / "run"), prepare=limited), 200, code=2)
    assert re.search(r"error: \S+/state-7\.pt: cannot be written \(File too large\); saved \S+/state-7\.pt", output)
    train(tmp_path / "run", "--resume")
    assert_same_results(whole, tmp_path / "run")


def test_tensorboard_keeps_what_was_logged_before_a_kill(tmp_path: Path) -> None:
    """Each update is on disk once it is logged, and what a killed run logged beyond its newest state is purged."""
    arguments = options(tmp_path / "run", num_train_steps=1000, valid_steps=1000, save_steps=1000)
    process = fork(arguments)
    wait_for_updates(tmp_path / "run", 3)
    kill(process)
    assert scalars(tmp_path / "run")[:3] == [1, 2, 3]
    process = fork([*arguments, "--resume"])
    while len(event_files(tmp_path / "run")) < 2:
        time.sleep(0.05)
    kill(process)
    opening = events(event_files(tmp_path / "run")[-1])[1]
    assert (opening.step, opening.session_log.status) == (1, SessionLog.START)


def test_resuming_a_finished_state_in_another_folder(tmp_path: Path, whole: Path) -> None:
    best = json.loads((whole / "log/results.json").read_text())["best_update"]
    assert set(states(whole)) == {best, STEPS - 2, STEPS}, "the best and the last two are kept"
    shutil.copy(whole / f"ckpt/state-{STEPS}.pt", tmp_path / "finished.pt")
    train(tmp_path / "run", "--resume", str(tmp_path / "finished.pt"))
    assert json.loads((tmp_path / "run/log/hps.json").read_text())["resume"] is None
    assert_same_results(whole, tmp_path / "run", states=False)


def test_what_may_change_on_resuming(tmp_path: Path, whole: Path) -> None:
    """Where the data are, how they are read, how often states are saved, and where the state is."""
    text_db, image_db, state = tmp_path / "elsewhere.db", tmp_path / "images", tmp_path / "taken.pt"
    shutil.copytree(DATABASES[0], text_db)
    shutil.copytree(DATABASES[1], image_db)
    shutil.copy(whole / f"ckpt/state-{STEPS - 2}.pt", state)
    changes = {"train_txt_dbs": text_db, "train_img_dbs": image_db, "n_workers": 1, "save_steps": 3, "keep_checkpoints": 1}
    train(tmp_path / "run", "--resume", str(state), **changes)
    assert_same_results(whole, tmp_path / "run", states=False)
    assert f"from {state}" in (tmp_path / "run/log/log.txt").read_text()


def test_what_must_not_change_on_resuming(tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text_db, state = tmp_path / "other.db", whole / f"ckpt/state-{STEPS - 2}.pt"
    shutil.copytree(DATABASES[0], text_db)
    lengths = json.loads((text_db / "id2len.json").read_text())
    (text_db / "id2len.json").write_text(json.dumps(dict(list(lengths.items())[1:])))
    for changes, message in (
        (
            {"IAIS": "distributed", "learning_rate": 0.1},
            "IAIS (was singular, is distributed), learning_rate (was 5e-05, is 0.1)",
        ),
        ({"precision": "bf16"}, "precision (was fp32, is bf16)"),
        ({"seed": 6}, "seed (was 5, is 6)"),
        ({"train_txt_dbs": text_db}, "train_txt_dbs"),
    ):
        line = fails(capsys, train_itm_hard_negatives.main, options(tmp_path / "run", resume=state, **changes))
        assert message in line
        assert "val_txt_db" not in line
    assert not (tmp_path / "run").exists()


def test_mistakes_with_resuming(tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older, newest, copy = f"state-{STEPS - 2}.pt", f"state-{STEPS}.pt", tmp_path / "copy"
    half = (whole / "ckpt" / newest).read_bytes()[:100_000]
    shutil.copytree(whole, copy)
    for name in (newest, older):  # the best one is still whole
        (copy / "ckpt" / name).write_bytes(half)
    best = f"state-{min(states(whole))}.pt"
    (tmp_path / "half.pt").write_bytes(half)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").touch()
    new = tmp_path / "new"
    for output, resume, message in (
        (whole, [], rf"holds a run .*{newest}.*empty folder.*--resume"),
        (whole, ["--resume", whole / "ckpt" / older], rf"another state .*{newest}.*empty folder"),
        (copy, ["--resume"], rf"{copy}/ckpt/{newest}: not a readable checkpoint.*; {best} is whole, remove the later ones"),
        (copy, ["--resume", copy / "ckpt" / newest], rf"{newest}: not a readable .*; {best} is whole"),
        (new, ["--resume", tmp_path / "nowhere.pt"], "nowhere.pt: no such file, expected a checkpoint"),
        (new, ["--resume", BUNDLED.folder / "model.pt"], "golden/model.pt: not a training state"),
        (new, ["--resume", tmp_path / "half.pt"], "half.pt: not a readable checkpoint"),
        (tmp_path / "full", ["--resume"], "holds thesis.tex"),
    ):
        arguments = options(output, *map(str, resume))
        assert re.search(message, fails(capsys, train_itm_hard_negatives.main, arguments)), message
    assert not new.exists()
    for name in (newest, older):
        (copy / "ckpt" / name).unlink()
    train(copy, "--resume")
    assert_same_results(whole, copy)


def test_one_run_at_a_time_per_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A queue may restart a job too early; a killed run frees its folder at once, whatever its DataLoader workers do."""
    arguments = options(tmp_path / "run", "--resume", num_train_steps=1000, valid_steps=1000, n_workers=1)
    process = fork(arguments)
    wait_for_updates(tmp_path / "run", 3)  # so that state-2 exists
    assert "another run" in fails(capsys, train_itm_hard_negatives.main, arguments)
    assert process.poll() is None
    kill(process)
    assert "learning_rate" in fails(capsys, train_itm_hard_negatives.main, [*arguments, "--learning_rate", "1"])
    process = fork(arguments)
    wait_for_updates(tmp_path / "run", 1 + len(scalars(tmp_path / "run")))
    kill(process)
