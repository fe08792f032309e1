"""One worker's failure ends all of them soon, with that worker's error on the screen and an exit code that is not 0."""

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
from tests.launch import LAUNCHERS, Process, finish, free_port, start
from tests.test_programs import inference, training

RANK = '[ "${HOROVOD_RANK:-$RANK}" = 1 ]'
RUN = f'exec {sys.executable} "$@"'
RAISING = """
import sys
from optim.trainer import Trainer
update = Trainer.update
def failing(self, halves, number):
    if number == 2:
        raise OSError("the cable is loose")
    return update(self, halves, number)
Trainer.update = failing
import train_itm_hard_negatives
train_itm_hard_negatives.main(sys.argv[2:])
"""

SPOILT = """
import sys
from model.objective import Objective
loss_of = Objective.__call__
calls = []
def spoilt(self, *rest):
    calls.append(0)
    loss = loss_of(self, *rest)
    return loss._replace(hinge=loss.hinge * float("nan")) if len(calls) == 10 else loss
Objective.__call__ = spoilt
import train_itm_hard_negatives
train_itm_hard_negatives.main(sys.argv[2:])
"""

# Reading processes look for their parent's death every five seconds.
KILLED = """
import sys
import torch.utils.data._utils.worker
torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL = 0.5
import train_itm_hard_negatives
train_itm_hard_negatives.main(sys.argv[2:])
"""


def long_training(tmp_path: Path, **changes: object) -> list[str]:
    changes = {"num_train_steps": 1000, "valid_steps": 1000, "save_steps": 2, "n_workers": 1} | changes
    return ["train_itm_hard_negatives.py", *training(BUNDLED.text_db, BUNDLED.image_db, tmp_path / "run", **changes)]


def ends(process: Process, tmp_path: Path, since: float) -> str:
    """The output; within 30 s of ``since`` nothing that has ``tmp_path`` in its command line is left."""
    output = finish(process, 30 - (time.monotonic() - since))
    assert process.returncode != 0
    while left := subprocess.run(["pgrep", "-af", str(tmp_path)], capture_output=True, text=True, check=False).stdout:
        assert time.monotonic() - since < 30, left
        time.sleep(0.1)
    return output


def wait_for(path: Path) -> float:
    for _ in range(600):
        if path.exists() and path.stat().st_size:
            return time.monotonic()
        time.sleep(0.1)
    pytest.fail(f"no {path} within 60 s")


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("program", ["training", "inference"])
def test_a_database_missing_on_one_host(tmp_path: Path, launcher: str, program: str) -> None:
    if program == "training":
        words, option = long_training(tmp_path), "--train_img_dbs"
    else:
        words, option = ["inf_itm.py", *inference(BUNDLED.text_db, BUNDLED.image_db, tmp_path / "run")], "--img_db"
    script = f'{RANK} && set -- "$@" {option} /nowhere/flickr30k; {RUN}'
    output = ends(start(launcher, 2, "bash", "-c", script, "bash", *words), tmp_path, time.monotonic())
    assert "error: worker 1 on " in output
    assert output.count("/nowhere/flickr30k: no such image database") == 1
    assert "Traceback" not in output.split("error: worker 1")[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_mistake_of_all_is_told_once(tmp_path: Path, launcher: str) -> None:
    words = long_training(tmp_path, negative_size=100)
    output = ends(start(launcher, 2, sys.executable, *words), tmp_path, time.monotonic())
    assert output.count("error: /") == output.count("40 images, expected more than negative_size 100") == 1


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_an_exception_in_one_worker(tmp_path: Path, launcher: str) -> None:
    script = f"{RANK} || {RUN}; exec {sys.executable} -c '{RAISING}' \"$@\""
    process = start(launcher, 2, "bash", "-c", script, "bash", *long_training(tmp_path))
    output = ends(process, tmp_path, wait_for(tmp_path / "run/ckpt/state-2.pt"))
    assert "OSError: the cable is loose" in output


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_loss_that_is_not_finite_in_one_worker(tmp_path: Path, launcher: str) -> None:
    script = f"{RANK} || {RUN}; exec {sys.executable} -c '{SPOILT}' \"$@\""
    output = ends(start(launcher, 2, "bash", "-c", script, "bash", *long_training(tmp_path)), tmp_path, time.monotonic())
    assert output.count("error: worker 1 on ") == 1
    assert re.search(r"error: worker 1 on \S+: update 3 at .*: the score of text '\w+' and image '\S+' is not finite", output)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_worker(tmp_path: Path, launcher: str) -> None:
    script = f"{RANK} || {RUN}; echo $BASHPID >{tmp_path}/pid; exec {sys.executable} -c '{KILLED}' \"$@\""
    process = start(launcher, 2, "bash", "-c", script, "bash", *long_training(tmp_path))
    wait_for(tmp_path / "run/ckpt/state-2.pt")
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    output = ends(process, tmp_path, time.monotonic())
    assert "Exit code: 137" in output or "(SIGKILL)" in output


def test_two_hosts(tmp_path: Path) -> None:
    """Two torchruns, as on two hosts: each knows one worker of its own, and they train together."""
    words = training(BUNDLED.text_db, BUNDLED.image_db, tmp_path / "run")
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "two"]
    hosts = [
        start("", 2, "torchrun", "--nnodes", "2", "--nproc_per_node", "1", *meeting, "train_itm_hard_negatives.py", *words)
        for _ in range(2)
    ]
    outputs = [finish(host, 120) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    assert sum("2 workers of torchrun" in output for output in outputs) == 1
    assert (tmp_path / "run/log/results.json").exists()
