"""Kills a training again and again and resumes it:  killer.py FOLDER SEED OPTION…; tests/test_resume.py looks at what is left.

Each run is a process of its own, forked from this one, which has all of torch imported already. It dies by SIGKILL, some at
moments that chance would seldom hit, the rest at random ones. Three chains of runs go on beside each other.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch._dynamo  # noqa: F401 - else the first update of each run would import it

import evaluation.scoring
import optim.run_folder
import train_itm_hard_negatives
import utils.files
import utils.tensors
from optim.trainer import Trainer

RANDOM_KILLS = 7, 7  # of two chains
Chain = Generator[int, int, None]  # yields process ids, is sent how the processes ended


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
    "in the midst of writing a checkpoint": at_call(utils.tensors._Stream, "write", 30),
    "a checkpoint written, not yet named": at_call(os, "replace", 2, of_state),
    "a checkpoint named, the folder not yet synchronised": at_call(utils.files, "sync_folder", 2, of_checkpoints),
    "before an old checkpoint is removed": at_call(Path, "unlink", 1, of_state),
    "in the midst of a validation": at_call(evaluation.scoring, "_score_block", 5),
    "in the midst of the next one": at_call(evaluation.scoring, "_score_block", 18),
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


class Kills:
    """Chains of runs in ``folder``. Each yields a training that it has started, and goes on when that has ended."""

    def __init__(self, folder: Path, options: list[str]) -> None:
        self.folder, self.options = folder, options
        self.kills: list[dict[str, Any]] = []
        self.runs: list[str] = []

    def kill(self, run: str, moment: str, prepare: Callable[[], None]) -> Generator[int, int, bool]:
        """Start or resume ``run`` and have it killed; returns whether it was, and has not finished before."""
        if run not in self.runs:
            self.runs.append(run)
        before = states(self.folder / run)
        ended = yield start(self.folder / run, self.options, prepare)
        self.kills.append({"run": run, "moment": moment, "ended": ended, "before": before, "after": states(self.folder / run)})
        return ended == -signal.SIGKILL

    def finish(self, run: str) -> Chain:
        """Let it go on to its end."""
        assert (yield start(self.folder / run, self.options)) == 0

    def chosen(self) -> Chain:
        """One run, killed at all ``MOMENTS``."""
        for moment, prepare in MOMENTS.items():
            assert (yield from self.kill("chosen", moment, prepare)), moment
        yield from self.finish("chosen")

    def random(self, name: str, kills: int, chance: random.Random) -> Chain:
        """A run killed at random moments, and another one where it has finished before."""
        runs = 0
        while kills:
            update, seconds = chance.randint(1, 5), chance.uniform(0, 0.5)
            if (yield from self.kill(f"{name}-{runs}", f"{seconds:.2f} s after update {update}", after(update, seconds))):
                kills -= 1
            else:
                runs += 1
        yield from self.finish(f"{name}-{runs}")


def drive(chains: list[Chain]) -> None:
    """Let all go on, each whenever the process has ended that it waits for."""
    waiting = {next(chain): chain for chain in chains}
    while waiting:
        child, status = os.wait()
        chain = waiting.pop(child)
        with suppress(StopIteration):
            waiting[chain.send(os.waitstatus_to_exitcode(status))] = chain


def main(folder: Path, seed: int, options: list[str]) -> None:
    found = Kills(folder, options)
    random_ones = [found.random(f"random-{n}", kills, random.Random(seed + n)) for n, kills in enumerate(RANDOM_KILLS)]
    drive([found.chosen(), *random_ones])
    (folder / "kills.json").write_text(json.dumps({"kills": found.kills, "runs": found.runs}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
