"""The failure of one rank ends all of them soon, with the error of that rank on the screen and an exit code other than 0."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import BUNDLED
from tests.processes import LAUNCHERS, Process, finish, free_port, start
from tests.test_programs import inference, training

TRAIN = "import sys, train_itm_hard_negatives; train_itm_hard_negatives.main(sys.argv[2:])"
RAISES = """
import optim.trainer
rate = optim.trainer.learning_rate
optim.trainer.learning_rate = lambda update, *rest: rate(update, *rest) if update < 3 else open("/the/cable")
"""
KILLED_READING = """
import os, sys, data.loader, inf_itm
data.loader._read = lambda *_: os.kill(os.getpid(), 9)
inf_itm.main(sys.argv[1:])
"""
NOT_FINITE = """
import itertools, model.objective
hinge, calls = model.objective.hinge, itertools.count(1)
model.objective.hinge = lambda *rest: hinge(*rest) * (float("nan") if next(calls) == 10 else 1)
"""
on_both_launchers = pytest.mark.parametrize("launcher", LAUNCHERS)


def long_training(folder: Path, **changes: object) -> list[str]:
    changes = {"num_train_steps": 1000, "valid_steps": 1000, "save_steps": 2, "n_workers": 1} | changes
    return ["train_itm_hard_negatives.py", *training(BUNDLED.text_db, BUNDLED.image_db, folder / "run", **changes)]


def start_two(launcher: str, words: list[str], shell: str, ranks: str = "1") -> Process:
    """Start a program on two ranks, with a line of shell before it on ``ranks``."""
    script = f'if [[ {ranks} = *"${{HOROVOD_RANK:-$RANK}}"* ]]; then {shell}; fi; exec {sys.executable} "$@"'
    return start(launcher, 2, "bash", "-c", script, "bash", *words)


def train_two(launcher: str, folder: Path, code: str, before: str = ":") -> Process:
    """Start a long training on two ranks, changed by ``code`` on rank 1, and wait for its first checkpoint."""
    process = start_two(launcher, long_training(folder), f"{before}; exec {sys.executable} -c '{code}{TRAIN}' \"$@\"")
    return saved(process, folder)


def saved(process: Process, folder: Path) -> Process:
    """Return the training once its first checkpoint is there."""
    for _ in range(600):
        if (folder / "run/ckpt/state-2.pt").exists():
            return process
        time.sleep(0.1)
    pytest.fail("no checkpoint within 60 s")


def output_of(process: Process, folder: Path, seconds: float) -> str:
    """Return its output; after ``seconds`` no process with ``folder`` in its command line may be left."""
    deadline = time.monotonic() + seconds
    output = finish(process, seconds)
    assert process.returncode != 0
    while left := subprocess.run(["pgrep", "-af", str(folder)], capture_output=True, text=True, check=False).stdout:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    return output


@on_both_launchers
@pytest.mark.parametrize(
    ("program", "options", "ranks", "message"),
    [
        ("training", "--train_img_dbs /nowhere", "1", r"rank 1 on \S+: /nowhere: no such image database"),
        ("inference", "--img_db /nowhere", "1", r"rank 1 on \S+: /nowhere: no such image database"),
        ("training", "--seed 6", "1", r"rank 1 on \S+: seed: not the same as on rank 0"),
        ("training", "--no_such", "01", "unknown option --no_such"),
        ("training", "--negative_size 100", "01", "/.*40 images, expected more than negative_size 100"),
    ],
)
def test_a_mistake_on_some_ranks(tmp_path: Path, launcher: str, program: str, options: str, ranks: str, message: str) -> None:
    words = ["inf_itm.py", *inference(BUNDLED.text_db, BUNDLED.image_db, tmp_path / "run")]
    words = long_training(tmp_path) if program == "training" else words
    output = output_of(start_two(launcher, words, f'set -- "$@" {options}', ranks), tmp_path, 60)
    (error,) = re.findall(r"error: ((?:rank \d|/|unknown).*)", output)
    assert re.match(message, error)
    assert "Traceback" not in output.partition("error: ")[0]
    assert "terminate called" not in output
    assert not (tmp_path / "run").exists()


@on_both_launchers
@pytest.mark.parametrize(
    ("code", "message"),
    [
        (RAISES, "FileNotFoundError: .* '/the/cable'"),
        (NOT_FINITE, r"error: rank 1 on \S+: update 3 at .*: the score of text '\w+' and image '\S+' is not finite"),
    ],
    ids=["an exception", "a loss that is not finite"],
)
def test_a_failed_update_on_one_rank(tmp_path: Path, launcher: str, code: str, message: str) -> None:
    output = output_of(train_two(launcher, tmp_path, code), tmp_path, 30)
    assert len(re.findall(message, output)) == 1


@on_both_launchers
def test_a_killed_rank(tmp_path: Path, launcher: str) -> None:
    process = train_two(launcher, tmp_path, "", before=f"echo $BASHPID >{tmp_path}/pid")
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    output = output_of(process, tmp_path, 30)
    assert "Exit code: 137" in output or "(SIGKILL)" in output


@pytest.mark.parametrize(
    ("shell", "code", "message"),
    [
        ("ulimit -n 20", 2, r"error: cannot start a worker \(.*Too many open files\)"),
        ("ulimit -f 10", 2, r"error: \S+: cannot be written \(File too large\)"),
        ("mount -t tmpfs -o ro tmpfs /dev/shm", 0, "after 2 updates, validation"),
        ("mount -t tmpfs -o size=64k tmpfs /dev/shm", 0, "after 2 updates, validation"),
    ],
    ids=["descriptors", "file size", "shared memory is read-only", "shared memory is small"],
)
def test_what_the_machine_lacks(tmp_path: Path, shell: str, code: int, message: str) -> None:
    """Workers need no shared memory, and what they need is named."""
    namespace = ["unshare", "--map-root-user", "--mount"] if "mount" in shell else []
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespaces here")
    words = long_training(tmp_path, n_workers=4, num_train_steps=2, image_cache=0)
    output = finish(start("", 1, *namespace, "bash", "-c", f'{shell}; exec {sys.executable} "$@"', "bash", *words), 100, code)
    assert re.search(message, output)
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("to_workers", "to_training", "code", "message"),
    [
        (signal.SIGKILL, None, 2, "error: a worker was killed"),
        (signal.SIGSTOP, signal.SIGTERM, 143, "interrupted by SIGTERM"),
        (signal.SIGSTOP, signal.SIGINT, 130, "interrupted by SIGINT"),
        (signal.SIGSTOP, signal.SIGHUP, 129, "interrupted by SIGHUP"),
    ],
)
def test_workers_that_die_or_stall(
    tmp_path: Path, to_workers: signal.Signals, to_training: signal.Signals | None, code: int, message: str
) -> None:
    """The state is saved all the same, and the last line says how to resume."""
    process = saved(start("", 1, sys.executable, *long_training(tmp_path, n_workers=2, image_cache=0)), tmp_path)
    for child in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split():
        os.kill(int(child), to_workers)
    if to_training:
        time.sleep(2)
        os.kill(process.pid, to_training)
    line = output_of(process, tmp_path, 30).splitlines()[-1]
    assert process.returncode == code
    end = re.fullmatch(rf"{message}.*; saved (\S+/state-\d+.pt); resume with python train_itm_\S+ --config \S+ --resume", line)
    assert end, line
    assert Path(end[1]).exists()


@pytest.mark.parametrize("gap", [0.05, 0.3])
def test_ctrl_c_that_arrives_twice(tmp_path: Path, gap: float) -> None:
    """As from the terminal and from the launcher."""
    process = saved(start("", 1, sys.executable, *long_training(tmp_path, n_workers=2, image_cache=0)), tmp_path)
    for pause in (gap, 0):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(pause)
    last = output_of(process, tmp_path, 30).splitlines()[-1]
    assert process.returncode == 130
    assert re.match(r"interrupted by SIGINT; saved \S+; resume with", last), last


def test_a_killed_worker_of_an_evaluation(tmp_path: Path) -> None:
    words = inference(BUNDLED.text_db, BUNDLED.image_db, tmp_path / "run", n_workers=2)
    output = finish(start("", 1, sys.executable, "-c", KILLED_READING, *words), 60, code=2)
    assert re.match("error: a worker was killed.*; try a lower --n_workers, or 0$", output.splitlines()[-1])
    assert "Traceback" not in output


def test_two_hosts(tmp_path: Path) -> None:
    """Two torchruns, as on two hosts, each with one rank, train together."""
    words = training(BUNDLED.text_db, BUNDLED.image_db, tmp_path / "run")
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "two"]
    command = ["torchrun", "--nnodes", "2", "--nproc_per_node", "1", *meeting, "train_itm_hard_negatives.py", *words]
    hosts = [start("", 2, *command) for _ in range(2)]
    outputs = [finish(host, 120) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    assert sum("2 ranks of torchrun" in output for output in outputs) == 1
    assert (tmp_path / "run/log/results.json").exists()
