"""A training that is killed, stopped, or runs into a full disk goes on to the very weights of one that was not."""

from __future__ import annotations

import functools
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboardX.proto.event_pb2 import Event, SessionLog

import train_itm_hard_negatives
from tests.conftest import BUNDLED
from tests.forks import Forked
from tests.killer import states
from tests.launch import ENVIRONMENT, LAUNCHERS, ROOT, finish, free_port, run, start
from tests.test_programs import fails, training

DATABASES = BUNDLED.text_db, BUNDLED.image_db
STEPS = 12


def options(output: Path, *extra: str, **changes: object) -> list[str]:
    """A training of twelve updates with IAIS and dropout, validated twice."""
    settings: dict[str, object] = {"num_train_steps": STEPS, "valid_steps": 7, "save_steps": 2, "inf_minibatch_size": 5}
    settings["train_batch_size"] = 1
    return training(*DATABASES, output, "--IAIS", "singular", "--no-full_val", *extra, **settings | changes)


def fork(arguments: list[str], **how: Any) -> Forked:
    """Start that training in one process."""
    return Forked("train_itm_hard_negatives", *arguments, **how)


def assert_same_results(one: Path, other: Path) -> None:
    for name in ("model_last", "model_best", f"state-{STEPS}"):
        first, second = (torch.load(run / f"ckpt/{name}.pt", weights_only=True) for run in (one, other))
        assert same(first, second), name
    assert (one / "log/results.json").read_text() == (other / "log/results.json").read_text()


def assert_same_weights(one: Path, other: Path) -> None:
    for name in ("model_last", "model_best"):
        assert same(*(torch.load(run / f"ckpt/{name}.pt", weights_only=True) for run in (one, other)))


def same(one: object, other: object) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return one == other


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_itm_hard_negatives.main(options(folder))
    return folder


def test_killed_more_than_twenty_times(tmp_path: Path, whole: Path) -> None:
    """SIGKILL at chosen and at random moments, in saving and in evaluation; see tests/killer.py."""
    arguments = options(tmp_path / "unused")
    where = arguments.index("--output_dir")
    del arguments[where : where + 2]
    run("", 1, sys.executable, ROOT / "tests/killer.py", tmp_path, "9", *arguments, seconds=250)
    report = json.loads((tmp_path / "kills.json").read_text())
    died = [kill for kill in report["kills"] if kill["ended"] == -signal.SIGKILL]
    assert len(died) >= 20
    for kill in died:  # the newest checkpoint is never lost
        assert max(kill["after"], default=0) >= max(kill["before"], default=0)
    for name in report["runs"]:
        assert "not a readable checkpoint" not in (tmp_path / f"{name}.txt").read_text()
        assert not list((tmp_path / name).rglob("*.partial"))
        assert_same_results(whole, tmp_path / name)
    resumed_at_random = {max(kill["before"], default=0) for kill in died if kill["run"] != "chosen"}
    assert len(resumed_at_random) > 3


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends(tmp_path: Path, whole: Path, number: int, code: int) -> None:
    """Before any checkpoint is due; a terminal signals the reading processes along with the training."""
    arguments = options(tmp_path / "run", n_workers=1, save_steps=1000)
    process = fork(arguments)
    wait_for_updates(tmp_path / "run", 2)
    subprocess.run(["kill", f"-{int(number)}", "--", f"-{process.pid}"], check=True)
    output = finish(process, 30)
    assert process.returncode == code, output
    assert f"interrupted by {signal.Signals(number).name}" in output
    assert "Traceback" not in output
    assert 2 <= max(states(tmp_path / "run")) < STEPS
    train_itm_hard_negatives.main([*arguments, "--resume"])
    assert_same_results(whole, tmp_path / "run")
    assert scalars(tmp_path / "run", "train/grad_norm") == list(range(1, STEPS + 1))


def wait_for_updates(run: Path, count: int) -> None:
    """TensorBoard's events are written after each update."""
    for _ in range(1200):
        if len(scalars(run, "train/grad_norm")) >= count:
            return
        time.sleep(0.05)
    pytest.fail(f"no {count} updates in {run} within 60 s")


def scalars(run: Path, tag: str) -> list[int]:
    """The updates of which TensorBoard has this number, in the order in which they were written."""
    paths = sorted(run.glob("log/events*"), key=lambda path: path.stat().st_mtime_ns)
    return [event.step for path in paths for event in events(path) for value in event.summary.value if value.tag == tag]


def events(path: Path) -> list[Event]:
    """What is on disk of one of TensorBoard's files: length, checksum, event, checksum, again and again."""
    data, found = path.read_bytes(), []
    while len(data) >= 16 and len(data) >= 16 + (length := int.from_bytes(data[:8], "little")):
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two workers that nothing interrupted, with the variables that torchrun sets."""
    folder = tmp_path_factory.mktemp("two") / "run"
    meeting = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    variables = [ENVIRONMENT | meeting | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    workers = [fork(options(folder), environment=environment) for environment in variables]
    outputs = [finish(worker, 200) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    return folder


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_workers_stop_and_resume(tmp_path: Path, whole_of_two: Path, launcher: str) -> None:
    """SIGTERM to the launcher, as queues send it."""
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


def test_another_number_of_workers_goes_on_with_a_warning(tmp_path: Path, whole_of_two: Path) -> None:
    state = str(whole_of_two / f"ckpt/state-{STEPS - 2}.pt")
    train_itm_hard_negatives.main(options(tmp_path / "run", "--resume", state))
    warning = "workers: was 2, is 1: the result will not be that of an uninterrupted run"
    assert warning in (tmp_path / "run/log/log.txt").read_text()
    assert max(states(tmp_path / "run")) == STEPS


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path: Path, whole: Path) -> None:
    """The kernel refuses to write on in the midst of the first checkpoint that also holds the best weights."""
    arguments = options(tmp_path / "run")
    sizes = sorted(path.stat().st_size for path in whole.glob("ckpt/model_last.pt"))
    limit = 3 * sizes[0] + 500_000
    limited = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    process = fork(arguments, prepare=limited)
    output = finish(process, 200)
    assert process.returncode == 2, output
    assert re.search(
        r"error: \S+/state-7\.pt: cannot be written \(File too large\); \S+/state-7\.pt is whole, --resume goes on from it",
        output,
    )
    assert not list((tmp_path / "run").rglob("*.partial"))
    train_itm_hard_negatives.main([*arguments, "--resume"])
    assert_same_results(whole, tmp_path / "run")


def test_tensorboard_keeps_what_was_recorded_before_a_kill(tmp_path: Path) -> None:
    """Each update is on disk when it is recorded, and what a killed run recorded beyond its checkpoint is purged."""
    arguments = options(tmp_path / "run", num_train_steps=1000, valid_steps=1000, save_steps=1000)
    process = fork(arguments)
    wait_for_updates(tmp_path / "run", 3)
    process.kill()
    finish(process, 10)
    assert scalars(tmp_path / "run", "train/grad_norm")[:3] == [1, 2, 3]
    process = fork([*arguments, "--resume"])
    while len(list(tmp_path.glob("run/log/events*"))) < 2:
        time.sleep(0.05)
    process.kill()
    finish(process, 10)
    opening = events(max(tmp_path.glob("run/log/events*"), key=lambda path: path.stat().st_mtime_ns))[1]
    assert (opening.step, opening.session_log.status) == (1, SessionLog.START)


def test_the_options_of_a_resumed_run_are_those_of_a_new_one(tmp_path: Path, whole: Path) -> None:
    shutil.copy(whole / f"ckpt/state-{STEPS}.pt", tmp_path / "finished.pt")
    train_itm_hard_negatives.main(options(tmp_path / "run", "--resume", str(tmp_path / "finished.pt")))
    assert json.loads((tmp_path / "run/log/hps.json").read_text())["resume"] is None
    assert_same_weights(whole, tmp_path / "run")


def test_the_last_checkpoints_and_the_best_are_kept(whole: Path) -> None:
    best = json.loads((whole / "log/results.json").read_text())["best_update"]
    assert set(states(whole)) == {best, STEPS - 2, STEPS}


def test_what_may_change_on_resuming(tmp_path: Path, whole: Path) -> None:
    """Where the data are, how they are read, how often is saved; and a state may be taken to another folder."""
    text_db, image_db = tmp_path / "elsewhere.db", tmp_path / "images"
    shutil.copytree(DATABASES[0], text_db)
    shutil.copytree(DATABASES[1], image_db)
    changes = {"train_txt_dbs": text_db, "train_img_dbs": image_db, "n_workers": 1, "save_steps": 3, "keep_checkpoints": 1}
    state = tmp_path / "taken.pt"
    shutil.copy(whole / f"ckpt/state-{STEPS - 2}.pt", state)
    train_itm_hard_negatives.main(options(tmp_path / "run", "--resume", str(state), **changes))
    assert_same_weights(whole, tmp_path / "run")
    assert (tmp_path / "run/log/results.json").read_text() == (whole / "log/results.json").read_text()
    assert f"going on from {state}" in (tmp_path / "run/log/log.txt").read_text()


def test_what_must_not_change_on_resuming(tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = whole / f"ckpt/state-{STEPS - 2}.pt"

    def line(*extra: str, **changes: object) -> str:
        return fails(
            capsys, train_itm_hard_negatives.main, options(tmp_path / "run", *extra, "--resume", str(state), **changes)
        )

    assert "IAIS (was singular, is distributed), learning_rate (was 5e-05, is 0.1)" in line(
        "--IAIS", "distributed", learning_rate=0.1
    )
    assert "precision (was fp32, is bf16)" in line(precision="bf16")
    assert "seed (was 5, is 6)" in line(seed=6)
    text_db = tmp_path / "other.db"
    shutil.copytree(DATABASES[0], text_db)
    lengths = json.loads((text_db / "id2len.json").read_text())
    (text_db / "id2len.json").write_text(json.dumps(dict(list(lengths.items())[1:])))
    message = line(train_txt_dbs=text_db)
    assert "what train_txt_dbs names" in message
    assert "val_txt_db" not in message
    assert not (tmp_path / "run").exists()


def test_mistakes_with_resuming(tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def line(output: Path, *extra: str) -> str:
        return fails(capsys, train_itm_hard_negatives.main, options(output, *extra))

    assert f"holds a run with state-{STEPS}.pt, expected a new or empty folder, or --resume" in line(whole)
    older = str(whole / f"ckpt/state-{STEPS - 2}.pt")
    assert f"holds another state, state-{STEPS}.pt, expected a new or empty folder" in line(whole, "--resume", older)
    assert "nowhere.pt: no such checkpoint" in line(tmp_path / "run", "--resume", str(tmp_path / "nowhere.pt"))
    assert "model.pt: not a training state" in line(tmp_path / "run", "--resume", str(BUNDLED.folder / "model.pt"))
    (tmp_path / "half.pt").write_bytes(Path(older).read_bytes()[:100_000])
    assert "half.pt: not a readable checkpoint" in line(tmp_path / "run", "--resume", str(tmp_path / "half.pt"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("")
    assert "not empty (it holds thesis.tex)" in line(tmp_path / "full", "--resume")
    assert not (tmp_path / "run").exists()


def test_a_damaged_state_names_the_one_before(tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole, tmp_path / "run")
    newest = tmp_path / f"run/ckpt/state-{STEPS}.pt"
    newest.write_bytes(newest.read_bytes()[:100_000])
    message = fails(capsys, train_itm_hard_negatives.main, options(tmp_path / "run", "--resume"))
    assert f"state-{STEPS}.pt: not a readable checkpoint" in message
    assert f"without that file --resume goes on from state-{STEPS - 2}.pt" in message
    newest.unlink()
    train_itm_hard_negatives.main(options(tmp_path / "run", "--resume"))
    assert_same_results(whole, tmp_path / "run")


def test_one_run_at_a_time_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A queue may start a job again too early; what is killed lets go at once, whatever its reading processes do."""
    arguments = options(tmp_path / "run", num_train_steps=1000, valid_steps=1000, n_workers=1)
    process = fork(arguments)
    wait_for_updates(tmp_path / "run", 2)
    message = fails(capsys, train_itm_hard_negatives.main, [*arguments, "--resume"])
    assert "another run is at work in this folder" in message
    assert process.poll() is None
    process.kill()
    process.wait()
    short = options(tmp_path / "run", "--resume", num_train_steps=1000, valid_steps=1000, learning_rate=1.0)
    assert "learning_rate" in fails(capsys, train_itm_hard_negatives.main, short)
    process = fork([*arguments, "--resume"])
    before = len(scalars(tmp_path / "run", "train/grad_norm"))
    wait_for_updates(tmp_path / "run", before + 1)
    process.kill()
    process.wait()


def test_resuming_what_never_began_begins_it(tmp_path: Path, whole: Path) -> None:
    """So that a queue can give the same command each time."""
    train_itm_hard_negatives.main(options(tmp_path / "run", "--resume"))
    assert_same_results(whole, tmp_path / "run")
