#!/usr/bin/env python
"""Train a grid of configurations over several seeds, evaluate all runs, and compare them: tables with intervals, and a plot.

    python scripts/ablate.py GRID.json --output DIR

Rerunning resumes an interrupted ablation and runs additions to the grid (docs/training.md).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.startup import one_line_errors
from evaluation.ablation.execution import is_done, metrics_of, run_all
from evaluation.ablation.grid import Grid, Run, planned
from evaluation.ablation.table import Metrics, as_csv, as_json, as_markdown, baseline_of, rows_of
from evaluation.plots.curves import ablation_figure
from evaluation.plots.style import save_figure
from optim.options import TrainOptions
from utils.errors import InputError, counted
from utils.files import atomic_file, exclusive_folder, save_json
from utils.options import read_json_as
from utils.parallel import cores
from utils.signals import StopSignal


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Plan, run what is not done, write the tables. Exit with code 1 if a run failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("grid", metavar="GRID.json", help="what to run (docs/training.md)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the runs and the tables")
    parser.add_argument("--jobs", type=int, default=cores(), help="runs at a time, one thread each (%(default)s)")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        raise InputError(f"--jobs {options.jobs}: expected at least 1")
    grid = read_json_as(Grid, options.grid)
    runs = planned(grid, options.grid, options.output, TrainOptions)
    failures: dict[Run, str] = {}
    started = time.perf_counter()
    with exclusive_folder(options.output) as output:
        to_do = [run for run in runs if not is_done(run, grid)]
        print(f"{counted(len(runs), 'run')}, {len(runs) - len(to_do)} of them done; {options.jobs} at a time", flush=True)
        with StopSignal(), closing(run_all(to_do, grid, output, options.jobs)) as results:
            for number, (run, error) in enumerate(results, start=1):
                if error:
                    failures[run] = error
                outcome = f"failed: {error}" if error else f"done, mean recall {100 * metrics_of(run, grid)['r_mean']:.2f} %"
                print(f"{time.perf_counter() - started:6.0f} s  {number}/{len(to_do)}  {run}: {outcome}", flush=True)
        write(runs, {run: metrics_of(run, grid) for run in runs if run not in failures}, failures, output)
    if failures:
        sys.exit(1)


def write(runs: Sequence[Run], metrics: Metrics, failures: Mapping[Run, str], output: Path) -> None:
    """Write ``ablation.md``, ``.json``, ``.csv`` and ``.png``, and print the first."""
    rows = rows_of(runs, metrics)
    text = as_markdown(runs, rows, metrics, failures)
    save_json(output / "ablation.json", as_json(runs, rows, metrics, failures))
    for name, contents in (("ablation.md", text), ("ablation.csv", as_csv(runs, metrics))):
        with atomic_file(output / name) as file:
            file.write(contents.encode())
    if metrics:
        save_figure(ablation_figure(rows, baseline_of(runs)), output / "ablation.png")
    print(f"\n{text}\nwrote {output / 'ablation.md'}, .json, .csv and .png")


if __name__ == "__main__":
    main()
