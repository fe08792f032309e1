"""Train and evaluate the runs of an ablation: several at a time, skipping what is done and resuming what was interrupted."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from evaluation.ablation.grid import START, Grid, Run, digest_of
from utils.errors import InputError
from utils.files import is_locked, make_folder, read_json, save_json

ROOT = Path(__file__).resolve().parent.parent.parent


class ProgramFailed(Exception):
    """A program exited with another code than 0; the message ends with the reason."""


class Programs:
    """Run programs of this repository as child processes; ``stop`` ends them all."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def run(self, program: str, arguments: Sequence[str], log: Path) -> None:
        """Run a program and append its output to file ``log``. Raises ``ProgramFailed``."""
        env = os.environ | {"OMP_NUM_THREADS": "1"}  # the runs share the cores
        command = [sys.executable, str(ROOT / program), *arguments]
        with open(log, "ab") as file:
            begin = file.tell()
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=env)
            self._running.add(process)
            if self._stopped:  # after `stop` listed the running processes
                process.terminate()
            code = process.wait()
            self._running.discard(process)
        if code:
            raise ProgramFailed(f"{program}: {reason_of(code, log.read_bytes()[begin:].decode(errors='replace'))}")

    def wait_for_others(self, folder: Path) -> None:
        """Wait for a program that a killed ablation left at work in ``folder``."""
        for file in (folder / "log/log.txt", folder / ".lock"):
            while not self._stopped and is_locked(file):
                time.sleep(0.5)

    def stop(self) -> None:
        """Terminate the running programs, of which trainings save first, and wait for them. A second Ctrl-C kills them."""
        self._stopped = True
        running = list(self._running)
        try:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
        except BaseException:
            for process in running:
                process.kill()
            raise


def reason_of(code: int, output: str) -> str:
    """Why a program failed: the signal that killed it, or the last line that it printed, apart from progress bars."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = [line.strip() for line in re.split(r"[\r\n]", output) if not re.search(r"\[\d\d+:\d\d[<,]", line)]
    return next((line.removeprefix("error: ") for line in reversed(lines) if line), f"exit code {code}")


def run_all(runs: Sequence[Run], grid: Grid, output: Path, jobs: int) -> Generator[tuple[Run, str | None], None, None]:
    """Train and evaluate ``runs``, ``jobs`` at a time. Yield each with the reason why it failed, or None, when it ends.

    Closing the generator ends the programs that are running.
    """
    logs = make_folder(output / "logs")
    programs = Programs()
    with ThreadPoolExecutor(jobs) as threads:
        try:
            pending: dict[Run, Future[None]] = {}
            # Starts first: a thread that waits for one finds it running, so that waiting threads cannot block each other.
            for run in sorted(runs, key=lambda run: run.start is not None):
                start = pending.get(run.start) if run.start else None
                pending[run] = threads.submit(_train_and_evaluate, run, grid, start, programs, logs)
            run_of = {future: run for run, future in pending.items()}
            for future in as_completed(run_of):
                error = future.exception()
                if error is not None and not isinstance(error, (ProgramFailed, InputError)):
                    raise error
                yield run_of[future], None if error is None else str(error)
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            programs.stop()
            raise


def _train_and_evaluate(run: Run, grid: Grid, start: Future[None] | None, programs: Programs, logs: Path) -> None:
    if start is not None and start.exception() is not None:
        raise ProgramFailed(f"its {START} failed")
    log = logs / f"seed-{run.seed}-{run.folder.name}.txt"
    trained, recalls, winoground = result_files(run, grid)
    programs.wait_for_others(run.folder)
    if not trained.exists():
        config = log.with_suffix(".json")
        save_json(config, vars(run.options))
        programs.run("train_itm_hard_negatives.py", ["--config", str(config), "--resume"], log)  # or start, if nothing is saved
    model = ["--checkpoint", str(run.weights(grid.checkpoint)), "--train_config", str(run.folder / "log/hps.json")]
    model += ["--device", run.options.device, *(["--precision", run.options.precision] if run.options.precision else [])]
    programs.wait_for_others(recalls.parent)
    if not recalls.exists():
        databases = ["--txt_db", grid.test_txt_db, "--img_db", grid.test_img_db, "--n_workers", str(run.options.workers)]
        programs.run("inf_itm.py", [*databases, *model, "--output_dir", str(recalls.parent)], log)
    if winoground and not winoground.exists():
        examples = ["--examples", grid.winoground_examples or "", "--img_db", grid.winoground_img_db or ""]
        programs.run("scripts/eval_winoground.py", [*examples, *model, "--output_dir", str(winoground.parent)], log)


def is_done(run: Run, grid: Grid) -> bool:
    """Return whether the run has been trained and evaluated."""
    return all(path.exists() for path in result_files(run, grid) if path)


def result_files(run: Run, grid: Grid) -> tuple[Path, Path, Path | None]:
    """The last file of the training, and those with the recalls and, if the grid asks for them, the Winoground scores."""

    def folder(kind: str, *inputs: Any) -> Path:
        return run.folder / f"{kind}-{grid.checkpoint}-{digest_of(inputs)}"

    recalls = folder("test", grid.test_txt_db, grid.test_img_db) / "scores.json"
    winoground = folder("winoground", grid.winoground_examples, grid.winoground_img_db) / "winoground.json"
    return run.folder / "log/results.json", recalls, winoground if grid.winoground_examples else None


def metrics_of(run: Run, grid: Grid) -> dict[str, float]:
    """Read the numbers of a run that is done: recalls, ``winoground_text`` …, ``alignment_singular_L`` … of matched pairs.

    Raises ``InputError`` if a file is damaged.
    """
    _, recalls, winoground = result_files(run, grid)
    scores, winoground_scores = read_json(recalls), read_json(winoground) if winoground else {}
    recall_names = [f"{direction}_{name}" for direction in ("txt", "img") for name in ("r1", "r5", "r10", "r_mean")]
    try:
        metrics = {name: scores[name] for name in (*recall_names, "r_mean")}
        if winoground:
            metrics |= {f"winoground_{name}": winoground_scores[name] for name in ("text", "image", "group")}
        for kind, by_modality in scores["alignment"].items():
            metrics |= {f"alignment_{kind}_{modality}": value for modality, value in by_modality.items()}
        if not all(map(math.isfinite, metrics.values())):
            raise ValueError("a number is not finite")
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        damaged = f"{recalls}{f' or {winoground}' if winoground else ''}"
        raise InputError(f"{damaged}: damaged ({error!r}); remove the file's folder and rerun to evaluate again") from error
    return metrics
