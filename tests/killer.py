"""Kills a training again and again and resumes it:  killer.py FOLDER SEED OPTION…; tests/test_resume.py looks at what is left.

Each run is a process of its own, forked from this one, which has torch imported already. It dies by SIGKILL, some at moments
that chance would seldom hit, the rest at random ones.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import evaluation.score
import optim.run_folder
import train_itm_hard_negatives
import utils.files
import utils.save
from optim.trainer import Trainer

RANDOM_KILLS = 14


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(module: Any, name: str, number: int, wanted: Callable[..., bool] = lambda *_: True) -> Callable[[], None]:
    """Prepares a process that dies at the start of call ``number`` of a function, of those whose arguments are ``wanted``."""

    def prepare() -> None:
        function, calls = getattr(module, name), [0]

        def counted(*args: Any, **kwargs: Any) -> Any:
            if wanted(*args):
                calls[0] += 1
                if calls[0] == number:
                    die()
            return function(*args, **kwargs)

        setattr(module, name, counted)

    return prepare


def of_state(*paths: Any) -> bool:
    return Path(paths[-1]).name.startswith("state-")


def of_checkpoints(folder: Path) -> bool:
    return folder.name == "ckpt"


MOMENTS = {
    "before anything is saved": at_call(optim.run_folder, "save_tensors", 1),
    "in the midst of writing a checkpoint": at_call(utils.save._Stream, "write", 30),
    "a checkpoint written, not yet named": at_call(os, "replace", 2, of_state),
    "a checkpoint named, the folder not yet synchronised": at_call(utils.files, "sync_folder", 2, of_checkpoints),
    "before an old checkpoint is removed": at_call(Path, "unlink", 1, of_state),
    "in the midst of a validation": at_call(evaluation.score, "_score_block", 5),
    "in the midst of the next one": at_call(evaluation.score, "_score_block", 18),
}


def start(folder: Path, options: list[str], prepare: Callable[[], None] = lambda: None) -> int:
    """Fork a training; returns its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    output = os.open(folder.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        prepare()
        train_itm_hard_negatives.main([*options, "--output_dir", str(folder), "--resume"])
        code = 0
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """How it ended: its exit code, or the signal's number, negative."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def states(folder: Path) -> list[int]:
    return sorted(int(path.stem.split("-")[1]) for path in folder.glob("ckpt/state-*.pt"))


def after(update: int, seconds: float) -> Callable[[], None]:
    """Prepares a process that dies so long after the beginning of its ``update``-th update, whatever it is doing then."""

    def prepare() -> None:
        function, calls = Trainer.update, [0]

        def counted(self: Trainer, *rest: Any) -> Any:
            calls[0] += 1
            if calls[0] == update:
                threading.Timer(seconds, die).start()
            return function(self, *rest)

        Trainer.update = counted  # type: ignore[method-assign]

    return prepare


def main(folder: Path, seed: int, options: list[str]) -> None:
    chance = random.Random(seed)
    kills: list[dict[str, Any]] = []

    def kill(run: Path, moment: str, prepare: Callable[[], None]) -> bool:
        """Start or resume ``run`` and have it killed; says whether it was, and has not finished before."""
        before = states(run)
        ended = wait(start(run, options, prepare))
        kills.append({"run": run.name, "moment": moment, "ended": ended, "before": before, "after": states(run)})
        return ended == -signal.SIGKILL

    for moment, prepare in MOMENTS.items():
        assert kill(folder / "chosen", moment, prepare), moment
    runs = ["chosen", "random-0"]
    killed = 0
    while killed < RANDOM_KILLS:
        update, seconds = chance.randint(1, 5), chance.uniform(0, 1)
        if kill(folder / runs[-1], f"{seconds:.2f} s after update {update}", after(update, seconds)):
            killed += 1
        else:
            runs.append(f"random-{len(runs) - 1}")
    for run in runs:
        assert wait(start(folder / run, options)) == 0
    (folder / "kills.json").write_text(json.dumps({"kills": kills, "runs": runs}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
