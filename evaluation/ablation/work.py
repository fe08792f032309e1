"""Running the programs of an ablation: several at a time, what is done kept, what was interrupted gone on with."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evaluation.ablation.grid import START, Grid, Run, digest_of
from utils.errors import InputError
from utils.files import make_folder, read_json, save_json

ROOT = Path(__file__).resolve().parent.parent.parent


class ProgramFailed(Exception):
    """A program ended with another exit code than 0; the message has the last line that it printed."""


class Programs:
    """Our programs in processes of their own, none of which outlives the block. Use it as a context manager.

    When the block ends by an exception, such as Ctrl-C, they are asked to end, which a training does after it has saved.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def run(self, program: str, arguments: Sequence[str | Path], log: Path) -> None:
        """Run a program, its output appended to file ``log``. Raises ``ProgramFailed``."""
        environment = os.environ | {"OMP_NUM_THREADS": "1"}  # the cores are shared out among the runs
        words = [sys.executable, str(ROOT / program), *map(str, arguments)]
        with open(log, "ab") as output:
            begin = output.tell()
            with self._lock:
                if self._stopped:
                    raise ProgramFailed(f"{program}: interrupted")
                process = subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
                )
                self._running.add(process)
            code = process.wait()
            with self._lock:
                self._running.discard(process)
        if code:
            said = re.split(r"[\r\n]", log.read_bytes()[begin:].decode(errors="replace"))  # progress bars end in \r
            last = next((line for line in reversed(said) if line.strip()), f"ended with exit code {code}")
            raise ProgramFailed(f"{program}: {last.strip().removeprefix('error: ')}")

    def __enter__(self) -> Programs:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._lock:
            self._stopped = True
            running = list(self._running)
        try:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
        except BaseException:  # Ctrl-C again, by users who do not want to wait
            for process in running:
                process.kill()
            raise


def finished(runs: Sequence[Run], grid: Grid, output: Path, jobs: int) -> Generator[tuple[Run, str | None], None, None]:
    """Train and evaluate all ``runs`` that are not done, ``jobs`` at a time; yields each when it is done, and why it failed."""
    logs = make_folder(output / "logs")
    with ThreadPoolExecutor(jobs) as threads, Programs() as programs, _dropping(threads):
        pending: dict[Run, Future[None]] = {}
        # Starts first: whoever waits for one finds it begun, and no thread waits while there is another to train.
        for run in sorted(runs, key=lambda run: run.start is not None):
            before = pending.get(run.start) if run.start else None
            pending[run] = threads.submit(_finish, run, grid, before, programs, logs)
        run_of = {future: run for run, future in pending.items()}
        for future in as_completed(run_of):
            try:
                future.result()
                yield run_of[future], None
            except (ProgramFailed, InputError) as error:
                yield run_of[future], str(error)


@contextmanager
def _dropping(threads: ThreadPoolExecutor) -> Iterator[None]:
    """When the block is left, what no thread has begun is never begun."""
    try:
        yield
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def _finish(run: Run, grid: Grid, before: Future[None] | None, programs: Programs, logs: Path) -> None:
    if before is not None:
        try:
            before.result()
        except (ProgramFailed, InputError) as error:
            raise ProgramFailed(f"its {START} failed") from error
    log = logs / f"seed-{run.seed}-{run.folder.name}.txt"
    if not _is_trained(run):
        config = log.with_suffix(".json")
        save_json(config, run.options.to_dict())
        # Begins anew where there is nothing to go on from.
        programs.run("train_itm_hard_negatives.py", ["--config", config, "--resume"], log)
    options = run.options
    weights: list[str | Path] = ["--checkpoint", run.weights(grid.checkpoint), "--train_config", run.folder / "log/hps.json"]
    machine: list[str | Path] = ["--device", options.device, *(["--precision", options.precision] if options.precision else [])]
    recalls, winoground = _results(run, grid)
    if not recalls.exists():
        databases: list[str | Path] = [
            "--txt_db",
            grid.test_txt_db,
            "--img_db",
            grid.test_img_db,
            "--n_workers",
            str(options.n_workers),
        ]
        programs.run("inf_itm.py", [*databases, *weights, *machine, "--output_dir", recalls.parent], log)
    if winoground and not winoground.exists():
        examples: list[str | Path] = ["--examples", grid.winoground_examples or "", "--img_db", grid.winoground_img_db or ""]
        programs.run("scripts/eval_winoground.py", [*examples, *weights, *machine, "--output_dir", winoground.parent], log)


def _is_trained(run: Run) -> bool:
    return (run.folder / "log/results.json").exists()


def is_done(run: Run, grid: Grid) -> bool:
    """Whether the run has been trained and evaluated."""
    return _is_trained(run) and all(path.exists() for path in _results(run, grid) if path)


def _results(run: Run, grid: Grid) -> tuple[Path, Path | None]:
    """Where its evaluations write: recalls, and Winoground if that is wanted."""

    def folder(kind: str, *inputs: Any) -> Path:
        return run.folder / f"{kind}-{grid.checkpoint}-{digest_of(inputs)}"

    recalls = folder("test", grid.test_txt_db, grid.test_img_db) / "scores.json"
    if not grid.winoground_examples:
        return recalls, None
    return recalls, folder("winoground", grid.winoground_examples, grid.winoground_img_db) / "winoground.json"


def measured(run: Run, grid: Grid) -> dict[str, float]:
    """All numbers of a run that is done: recalls, ``winoground_text`` …, and ``alignment_singular_L`` … of matched pairs."""
    recalls, winoground = _results(run, grid)
    scores: dict[str, Any] = read_json(recalls)
    values = {f"{way}_{name}": scores[f"{way}_{name}"] for way in ("txt", "img") for name in ("r1", "r5", "r10", "r_mean")}
    values["r_mean"] = scores["r_mean"]
    if winoground:
        of_winoground = read_json(winoground)
        values |= {f"winoground_{name}": of_winoground[name] for name in ("text", "image", "group")}
    return values | {
        f"alignment_{kind}_{modality}": value
        for kind, of_kind in scores["alignment"].items()
        for modality, value in of_kind.items()
    }
