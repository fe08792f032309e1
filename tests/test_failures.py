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
from optim.trainer import Trainer
update = Trainer.update
def failing(self, batches, number):
    if number == 2:
        raise OSError("the cable is loose")
    return update(self, batches, number)
Trainer.update = failing
"""
NOT_FINITE = """
from model.objective import Objective
loss_of = Objective.__call__
calls = []
def spoilt(self, *rest):
    calls.append(0)
    loss = loss_of(self, *rest)
    return loss._replace(hinge=loss.hinge * float("nan")) if len(calls) == 10 else loss
Objective.__call__ = spoilt
"""
# DataLoader workers look for their parent's death every five seconds.
WATCHFUL = "import torch.utils.data._utils.worker as worker; worker.MP_STATUS_CHECK_INTERVAL = 0.5\n"
on_both_launchers = pytest.mark.parametrize("launcher", LAUNCHERS)


def long_training(folder: Path, **changes: object) -> list[str]:
    changes = {"num_train_steps": 1000, "valid_steps": 1000, "save_steps": 2, "n_workers": 1} | changes
    return ["train_itm_hard_negatives.py", *training(BUNDLED.text_db, BUNDLED.image_db, folder / "run", **changes)]


def start_two(launcher: str, words: list[str], only_rank_1: str) -> Process:
    """Start a program on two ranks, with a line of shell before it on rank 1."""
    script = f'if [ "${{HOROVOD_RANK:-$RANK}}" = 1 ]; then {only_rank_1}; fi; exec {sys.executable} "$@"'
    return start(launcher, 2, "bash", "-c", script, "bash", *words)


def train_two(launcher: str, folder: Path, code: str, before: str = ":") -> Process:
    """Start a long training on two ranks, changed by ``code`` on rank 1."""
    return start_two(launcher, long_training(folder), f"{before}; exec {sys.executable} -c '{code}{TRAIN}' \"$@\"")


def output_of(process: Process, folder: Path, since: float | None = None) -> str:
    """Return its output; 30 s after ``since``, or 60 s from now, no process with ``folder`` in its command line may be left."""
    deadline = time.monotonic() + 60 if since is None else since + 30
    output = finish(process, deadline - time.monotonic())
    assert process.returncode != 0
    while left := subprocess.run(["pgrep", "-af", str(folder)], capture_output=True, text=True, check=False).stdout:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    return output


def wait_for(path: Path) -> float:
    for _ in range(600):
        if path.exists() and path.stat().st_size:
            return time.monotonic()
        time.sleep(0.1)
    pytest.fail(f"no {path} within 60 s")


@on_both_launchers
@pytest.mark.parametrize("program", ["training", "inference"])
def test_a_database_missing_on_one_host(tmp_path: Path, launcher: str, program: str) -> None:
    if program == "training":
        words, option = long_training(tmp_path), "--train_img_dbs"
    else:
        words, option = ["inf_itm.py", *inference(BUNDLED.text_db, BUNDLED.image_db, tmp_path / "run")], "--img_db"
    process = start_two(launcher, words, f'set -- "$@" {option} /nowhere/flickr30k')
    output = output_of(process, tmp_path)
    assert "error: rank 1 on " in output
    assert output.count("/nowhere/flickr30k: no such image database") == 1
    assert "Traceback" not in output.split("error: rank 1")[0]
    assert not (tmp_path / "run").exists()


@on_both_launchers
def test_ranks_with_different_options(tmp_path: Path, launcher: str) -> None:
    output = output_of(start_two(launcher, long_training(tmp_path), 'set -- "$@" --seed 6'), tmp_path)
    assert re.findall(r"error: (.*)", output)[0].partition(": ")[2].startswith("seed: not the same as on rank 0")
    assert output.count("not the same") == 1


@on_both_launchers
def test_a_mistake_of_all_ranks_is_printed_once(tmp_path: Path, launcher: str) -> None:
    words = long_training(tmp_path, negative_size=100)
    output = output_of(start(launcher, 2, sys.executable, *words), tmp_path)
    assert output.count("error: /") == output.count("40 images, expected more than negative_size 100") == 1


@on_both_launchers
def test_an_exception_on_one_rank(tmp_path: Path, launcher: str) -> None:
    process = train_two(launcher, tmp_path, RAISES)
    output = output_of(process, tmp_path, wait_for(tmp_path / "run/ckpt/state-2.pt"))
    assert "OSError: the cable is loose" in output


@on_both_launchers
def test_a_loss_that_is_not_finite_on_one_rank(tmp_path: Path, launcher: str) -> None:
    process = train_two(launcher, tmp_path, NOT_FINITE)
    output = output_of(process, tmp_path, wait_for(tmp_path / "run/ckpt/state-2.pt"))
    assert output.count("error: rank 1 on ") == 1
    assert re.search(r"error: rank 1 on \S+: update 3 at .*: the score of text '\w+' and image '\S+' is not finite", output)


@on_both_launchers
def test_a_killed_rank(tmp_path: Path, launcher: str) -> None:
    process = train_two(launcher, tmp_path, WATCHFUL, before=f"echo $BASHPID >{tmp_path}/pid")
    wait_for(tmp_path / "run/ckpt/state-2.pt")
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    output = output_of(process, tmp_path, time.monotonic())
    assert "Exit code: 137" in output or "(SIGKILL)" in output


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
