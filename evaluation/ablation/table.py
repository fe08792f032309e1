"""The numbers of an ablation: a row for each kind of run, over its seeds, and the same as Markdown, JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.ablation.grid import START, Run
from evaluation.ablation.statistics import Estimate, estimate

RECALLS = {
    "txt_r1": "TR R@1",
    "txt_r5": "R@5",
    "txt_r10": "R@10",
    "img_r1": "IR R@1",
    "img_r5": "R@5",
    "img_r10": "R@10",
    "r_mean": "mean",
    "winoground_text": "Winoground text",
    "winoground_image": "image",
    "winoground_group": "group",
}
ALIGNMENT = "alignment_"
Values = Mapping[Run, Mapping[str, float]]


@dataclass
class Row:
    """What the runs of one name gave.

    Attributes:
        seeds: of those runs that are done.
        metrics: by name, the mean over these seeds.
        differences: by name, the mean of run minus baseline over the seeds that both have, which start alike; empty for the
            baseline itself and for what all start from.
    """

    name: str
    seeds: list[int]
    metrics: dict[str, Estimate]
    differences: dict[str, Estimate]


def rows_of(runs: Sequence[Run], values: Values) -> list[Row]:
    """The rows, in the order of ``runs``; ``values`` has the runs that are done."""
    by_name, baseline = by_name_and_seed(runs, values), baseline_of(runs)
    rows = []
    for name, of_seeds in by_name.items():
        paired = [] if name in (baseline, START) else [seed for seed in of_seeds if seed in by_name[baseline]]
        rows.append(
            Row(
                name,
                sorted(of_seeds),
                _estimates(list(of_seeds.values())),
                _estimates([_difference(of_seeds[seed], by_name[baseline][seed]) for seed in paired]),
            )
        )
    return rows


def by_name_and_seed(runs: Sequence[Run], values: Values) -> dict[str, dict[int, Mapping[str, float]]]:
    """The numbers of the runs that are done, under the names of all."""
    found: dict[str, dict[int, Mapping[str, float]]] = {run.name: {} for run in runs}
    for run, of_run in values.items():
        found[run.name][run.seed] = of_run
    return found


def baseline_of(runs: Sequence[Run]) -> str:
    """The name of the first that is not what others start from."""
    return next(run.name for run in runs if run.name != START)


def _difference(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    return {key: ours[key] - theirs[key] for key in ours}


def _estimates(values: Sequence[Mapping[str, float]]) -> dict[str, Estimate]:
    return {key: estimate([of_run[key] for of_run in values]) for key in values[0]} if values else {}


def as_json(runs: Sequence[Run], rows: Sequence[Row], values: Values, failures: Mapping[Run, str]) -> dict[str, Any]:
    """Everything: each run with its numbers, or None, and each row."""
    return {
        "baseline": baseline_of(runs),
        "runs": [
            {
                "name": run.name,
                "seed": run.seed,
                "output_dir": str(run.folder),
                "values": values.get(run),
                "error": failures.get(run),
            }
            for run in runs
        ],
        "rows": [
            {
                "name": row.name,
                "seeds": row.seeds,
                "metrics": {key: _estimate_as_json(value) for key, value in row.metrics.items()},
                "differences": {key: _estimate_as_json(value) for key, value in row.differences.items()},
            }
            for row in rows
        ],
    }


def _estimate_as_json(value: Estimate) -> dict[str, Any]:
    return {
        "seeds": value.seeds,
        "mean": value.mean,
        "standard_deviation": value.deviation,
        "interval_95": value.interval and list(value.interval),
    }


def as_csv(runs: Sequence[Run], values: Values) -> str:
    """A line for each run that is done."""
    text = io.StringIO()
    keys = list(next(iter(values.values()), {}))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "seed", *keys])
    writer.writerows([run.name, run.seed, *(values[run][key] for key in keys)] for run in runs if run in values)
    return text.getvalue()


def as_markdown(runs: Sequence[Run], rows: Sequence[Row], values: Values, failures: Mapping[Run, str]) -> str:
    """Tables of means, of their intervals and of the differences; then what is missing, and why."""
    known = next(iter(values.values()), {})
    recalls = {key: title for key, title in RECALLS.items() if key in known}
    alignments = {key: key.removeprefix(ALIGNMENT).replace("_", " ") for key in known if key.startswith(ALIGNMENT)}
    baseline = baseline_of(runs)
    parts = [
        f"{len(values)} of {len(runs)} runs. Recalls and Winoground scores in percent (TR finds an image's captions, IR a "
        "caption's image); alignment is the loss of matched pairs, in words (L) and regions (V).",
        "**Mean ± standard deviation over seeds**",
        _table(rows, recalls, 100, _with_deviation),
        _table(rows, alignments, 1, _with_deviation),
        "**95 % interval of the mean** (Student's t)",
        _table(rows, recalls, 100, _interval),
        _table(rows, alignments, 1, _interval),
        f"**Difference to {baseline}**, paired by seed, with its 95 % interval; \\* where that excludes 0. Among many, one in "
        "twenty does so by chance.",
        _table([row for row in rows if row.differences], recalls, 100, _with_interval, differences=True),
        _table([row for row in rows if row.differences], alignments, 1, _with_interval, differences=True),
    ]
    missing = [f"- {run}: {failures.get(run, 'not run')}" for run in runs if run not in values]
    if missing:
        parts += ["**Missing**", "\n".join(missing)]
    return "\n\n".join(part for part in parts if part) + "\n"


Cell = Callable[[Estimate, float, int], str]


def _table(rows: Sequence[Row], columns: Mapping[str, str], scale: int, cell: Cell, *, differences: bool = False) -> str:
    if not (rows and columns):
        return ""
    digits = 2 if scale == 100 else 4
    lines = [f"| run | seeds | {' | '.join(columns.values())} |", "| --- " * (len(columns) + 2) + "|"]
    for row in rows:
        estimates = row.differences if differences else row.metrics
        cells = [cell(estimates[key], scale, digits) if key in estimates else "–" for key in columns]
        count = next(iter(estimates.values())).seeds if estimates else 0
        lines.append(f"| {row.name} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_deviation(value: Estimate, scale: float, digits: int) -> str:
    deviation = "" if value.deviation is None else f" ± {scale * value.deviation:.{digits}f}"
    return f"{scale * value.mean:.{digits}f}{deviation}"


def _interval(value: Estimate, scale: float, digits: int) -> str:
    return "–" if value.interval is None else "[{}, {}]".format(*(f"{scale * bound:.{digits}f}" for bound in value.interval))


def _with_interval(value: Estimate, scale: float, digits: int) -> str:
    bounds = "" if value.interval is None else " [{}, {}]".format(*(f"{scale * bound:+.{digits}f}" for bound in value.interval))
    return f"{scale * value.mean:+.{digits}f}{bounds}" + (" \\*" if value.excludes_zero() else "")
