"""The numbers of an ablation: one row per configuration, over its seeds, as Markdown, JSON and CSV.

Intervals come from Student's t distribution, which assumes that seeds differ by about normal deviations.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from scipy.stats import t as student_t  # type: ignore[import-untyped]

from evaluation.ablation.grid import START, Run
from evaluation.tables import fixed

LEVEL = 0.95
RECALLS = {"txt_r1": "TR R@1", "txt_r5": "R@5", "txt_r10": "R@10", "img_r1": "IR R@1", "img_r5": "R@5", "img_r10": "R@10"}
WINOGROUND = {"winoground_text": "Winoground text", "winoground_image": "image", "winoground_group": "group"}
SCORES = RECALLS | {"r_mean": "mean"} | WINOGROUND
ALIGNMENT = "alignment_"
Metrics = Mapping[Run, Mapping[str, float]]  # of the runs that are done


class Estimate(NamedTuple):
    """A mean over seeds; deviation and interval are None for a single value."""

    values: tuple[float, ...]  # one per seed
    mean: float
    deviation: float | None  # of the sample (n - 1)
    interval: tuple[float, float] | None  # contains the mean with 95 % confidence

    def excludes_zero(self) -> bool:
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of at least one value, with its spread."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(tuple(values), mean, None, None)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(student_t.ppf((1 + LEVEL) / 2, count - 1)) * deviation / math.sqrt(count)
    return Estimate(tuple(values), mean, deviation, (mean - half, mean + half))


@dataclass
class Row:
    """The results of all runs of one name."""

    name: str
    seeds: list[int]  # of the runs that are done
    metrics: dict[str, Estimate]  # means over these seeds
    differences: dict[str, Estimate]  # to the baseline, over the seeds that both have; empty for the baseline and the start


def rows_of(runs: Sequence[Run], metrics: Metrics) -> list[Row]:
    """Return the rows in the order of ``runs``."""
    by_name: dict[str, dict[int, Mapping[str, float]]] = {run.name: {} for run in runs}
    for run, of_run in metrics.items():
        by_name[run.name][run.seed] = of_run
    baseline_name = baseline_of(runs)
    baseline = by_name[baseline_name]
    rows = []
    for name, by_seed in by_name.items():
        paired = [] if name in (baseline_name, START) else [seed for seed in by_seed if seed in baseline]
        differences = [{key: by_seed[seed][key] - baseline[seed][key] for key in by_seed[seed]} for seed in paired]
        rows.append(Row(name, sorted(by_seed), _estimates(list(by_seed.values())), _estimates(differences)))
    return rows


def baseline_of(runs: Sequence[Run]) -> str:
    """Return the name of the first run that is not a start."""
    return next(run.name for run in runs if run.name != START)


def _estimates(metrics: Sequence[Mapping[str, float]]) -> dict[str, Estimate]:
    return {key: estimate([of_run[key] for of_run in metrics]) for key in metrics[0]} if metrics else {}


def as_json(runs: Sequence[Run], rows: Sequence[Row], metrics: Metrics, failures: Mapping[Run, str]) -> dict[str, Any]:
    """Return every run with its numbers, or None, and every row."""
    of_runs = [
        {"name": run.name, "seed": run.seed, "output_dir": str(run.folder)}
        | {"values": metrics.get(run), "error": failures.get(run)}
        for run in runs
    ]
    of_rows = [
        {"name": row.name, "seeds": row.seeds, "metrics": _as_json(row.metrics), "differences": _as_json(row.differences)}
        for row in rows
    ]
    return {"baseline": baseline_of(runs), "runs": of_runs, "rows": of_rows}


def _as_json(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, Any]]:
    return {
        key: {"seeds": len(values), "mean": mean, "standard_deviation": deviation, "interval_95": interval}
        for key, (values, mean, deviation, interval) in estimates.items()
    }


def as_csv(runs: Sequence[Run], metrics: Metrics) -> str:
    """Return one line per run that is done."""
    text = io.StringIO()
    keys = list(next(iter(metrics.values()), {}))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "seed", *keys])
    writer.writerows([run.name, run.seed, *(metrics[run][key] for key in keys)] for run in runs if run in metrics)
    return text.getvalue()


def as_markdown(runs: Sequence[Run], rows: Sequence[Row], metrics: Metrics, failures: Mapping[Run, str]) -> str:
    """Return tables of means, of their intervals and of the differences, then what is missing and why."""
    known = next(iter(metrics.values()), {})
    scores = {key: title for key, title in SCORES.items() if key in known}
    alignments = {key: key.removeprefix(ALIGNMENT).replace("_", " ") for key in known if key.startswith(ALIGNMENT)}
    means = {row.name: row.metrics for row in rows}
    differences = {row.name: row.differences for row in rows if row.differences}
    compared = (
        f"**Difference to {baseline_of(runs)}**, paired by seed, with its 95 % interval; \\* if that excludes 0. Among "
        "many, one in twenty does so by chance."
    )
    parts = [
        f"Runs: {len(metrics)} of {len(runs)}. Recalls and Winoground scores in percent (TR finds an image's captions, IR a "
        "caption's image); alignment is the loss of matched pairs, in words (L) and regions (V)."
    ]
    for heading, lines, cell in (
        ("**Mean ± standard deviation over seeds**", means, _with_deviation),
        ("**95 % interval of the mean** (Student's t)", means, _interval),
        (compared, differences, _with_interval),
    ):
        parts += [heading, _table(lines, scores, 100, 2, cell), _table(lines, alignments, 1, 4, cell)]
    if missing := [f"- {run}: {failures.get(run, 'not run')}" for run in runs if run not in metrics]:
        parts += ["**Missing**", "\n".join(missing)]
    return "\n\n".join(part for part in parts if part) + "\n"


Lines = Mapping[str, Mapping[str, Estimate]]
Cell = Callable[[Estimate, int, int], str]  # estimate, scale, digits


def _table(lines: Lines, columns: Mapping[str, str], scale: int, digits: int, cell: Cell) -> str:
    if not (lines and columns):
        return ""
    table = [f"| run | seeds | {' | '.join(columns.values())} |", "| --- " * (len(columns) + 2) + "|"]
    for name, estimates in lines.items():
        cells = [cell(estimates[key], scale, digits) if key in estimates else "–" for key in columns]
        count = max((len(value.values) for value in estimates.values()), default=0)
        table.append(f"| {name} | {count} | {' | '.join(cells)} |")
    return "\n".join(table)


def _with_deviation(value: Estimate, scale: int, digits: int) -> str:
    return " ± ".join(fixed(scale * number, digits) for number in (value.mean, value.deviation) if number is not None)


def _interval(value: Estimate, scale: int, digits: int, sign: bool = False) -> str:
    return f"[{', '.join(fixed(scale * bound, digits, sign=sign) for bound in value.interval)}]" if value.interval else "–"


def _with_interval(value: Estimate, scale: int, digits: int) -> str:
    bounds = f" {_interval(value, scale, digits, sign=True)}" if value.interval else ""
    return f"{fixed(scale * value.mean, digits, sign=True)}{bounds}" + (" \\*" if value.excludes_zero() else "")
