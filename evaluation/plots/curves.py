"""Figures of numbers: the curves of training runs, ISDa by layer, and the runs of an ablation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from evaluation.ablation.grid import START
from evaluation.plots.style import printable, shorten, style
from utils.errors import InputError

if TYPE_CHECKING:
    from evaluation.ablation.table import Estimate, Row

Scalars = Mapping[str, Mapping[int, float]]

WINDOWS = 25  # a running mean averages over this fraction of a curve
_LINES = {"r1": "-", "r5": "--", "r10": ":"}
_PANELS: dict[str, dict[str, str]] = {
    "ranking loss": {"train/rank": "-"},
    "IAIS loss without its weight": {"unweighted": "-"},
    "λ_t × iais_weight": {"train/lambda": "-"},
    "IAIS loss as it enters the loss": {"train/iais": "-"},
    "validation: text retrieval": {f"val/txt_{cutoff}": line for cutoff, line in _LINES.items()},
    "validation: image retrieval": {f"val/img_{cutoff}": line for cutoff, line in _LINES.items()},
}
_ABLATION_PANELS = {
    "txt_r_mean": "text retrieval, mean R@K (%)",
    "img_r_mean": "image retrieval, mean R@K (%)",
    "r_mean": "both (%)",
    "winoground_group": "Winoground group (%)",
}


def curves_figure(runs: Mapping[str, Scalars]) -> Figure:
    """Draw the scalars (``utils.logging.read_scalars``) of runs by display name: faintly as they are, and their running mean.

    Panels without data are left out. Raises ``InputError`` if a run has not recorded anything yet.
    """
    for name, scalars in runs.items():
        if not any(key.startswith(("train/", "val/")) for key in scalars):
            raise InputError(f"{name}: nothing recorded yet, expected a training of at least one update")
    drawn = [dict(scalars) | _unweighted(scalars) for scalars in runs.values()]
    panels = {title: keys for title, keys in _PANELS.items() if any(keys.keys() & scalars.keys() for scalars in drawn)}
    with style():
        figure, all_axes = _panels(len(panels), 3, legend_lines=len(runs))
        for axes, (title, keys) in zip(all_axes, panels.items(), strict=True):
            _draw_curves(axes, keys, drawn)
            axes.set(title=title, xlabel="update", xlim=(0, None))
        lines = [all_axes[0].plot([], [], color=_colour(number), linewidth=2)[0] for number in range(len(runs))]
        legend = figure.legend(lines, ["run"] * len(runs), loc="outside upper left", fontsize=9)
        for label, name in zip(legend.get_texts(), runs, strict=True):
            label.set_text(shorten(printable(name), 120))  # legends hide a label that begins with `_`
    return figure


def _panels(count: int, per_row: int, legend_lines: int = 0) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` axes whose x axis counts updates or layers."""
    columns = min(count, per_row)
    rows = -(-count // columns)
    height = 3.2 * rows + (0.3 + 0.22 * legend_lines) * bool(legend_lines)
    figure = Figure(figsize=(4.6 * columns, height), layout="constrained")
    all_axes = [figure.add_subplot(rows, columns, number) for number in range(1, count + 1)]
    for axes in all_axes:
        axes.grid(True, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    return figure, all_axes


def _unweighted(scalars: Scalars) -> dict[str, dict[int, float]]:
    weights = scalars.get("train/lambda", {})
    values = {update: value / weights[update] for update, value in scalars.get("train/iais", {}).items() if weights.get(update)}
    return {"unweighted": values} if values else {}


def _draw_curves(axes: Axes, keys: Mapping[str, str], runs: Sequence[Scalars]) -> None:
    are_recalls = any(key.startswith("val/") for key in keys)
    for number, scalars in enumerate(runs):
        for key, line in keys.items():
            if key not in scalars:
                continue
            updates, values = (np.array(list(side)) for side in (scalars[key].keys(), scalars[key].values()))
            if are_recalls:
                axes.plot(updates, values, line, color=_colour(number), marker="o", markersize=3, linewidth=1.4)
            else:
                axes.plot(updates, values, color=_colour(number), alpha=0.25, linewidth=0.7)
                axes.plot(updates, running_mean(values), color=_colour(number), linewidth=1.6)
    if are_recalls:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        cutoffs = [axes.plot([], [], line, color="#606060", label=f"R@{cutoff[1:]}")[0] for cutoff, line in _LINES.items()]
        axes.legend(handles=cutoffs, handlelength=2.2)


def _colour(number: int) -> tuple[float, ...]:
    return colormaps["tab10"](number % 10)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Average over a window of a ``WINDOWS``-th of the values, centred on each and shrinking towards the ends: (N,) → (N,)."""
    index = np.arange(len(values))
    reach = np.minimum(np.minimum(index, index[::-1]), len(values) // (2 * WINDOWS))
    sums = np.concatenate([[0.0], values.cumsum()])
    mean: np.ndarray = (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)
    return mean


def isda_figure(results: Mapping[str, Any]) -> Figure:
    """Draw each measure of ``evaluation.isda.summary`` by layer: mean, interval, a dot per head; even attention is dashed."""
    layers, even = results["layers"], results["even_attention"]
    names = [name for name in even["interval_95"] if even[name] is not None]
    with style():
        figure, all_axes = _panels(len(names), 2)
        for axes, name in zip(all_axes, names, strict=True):
            numbers, means = [entry["layer"] for entry in layers], [entry[name] for entry in layers]
            bounds = np.array([entry["interval_95"][name] or (entry[name], entry[name]) for entry in layers], dtype=float)
            for entry in layers:
                heads = [head[name] for head in entry.get("heads", ())]
                axes.plot([entry["layer"]] * len(heads), heads, "o", color="C0", alpha=0.3, markersize=4, markeredgewidth=0)
            axes.axhline(even[name], color="0.6", linewidth=1, linestyle="--")
            axes.vlines(numbers, *bounds.T, color="C0", linewidth=1.5)
            axes.plot(numbers, means, "-o", color="C0", markersize=5, linewidth=1.2)
            axes.set(title=name, xlabel="layer", ylabel="nats", ylim=(0, None))
    return figure


def ablation_figure(rows: Sequence[Row], baseline: str) -> Figure:
    """Draw each configuration's seeds as dots and mean with 95 % interval; below, its differences to the baseline."""
    panels = {key: title for key, title in _ABLATION_PANELS.items() if any(key in row.metrics for row in rows)}
    compared = {row.name: row.differences for row in rows if row.differences}
    parts = [{row.name: row.metrics for row in rows}, *([compared] if compared else [])]
    heights = [len(part) + 1.5 for part in parts]
    size = 0.085 * max(len(row.name) for row in rows) + 3.2 * len(panels), 0.36 * sum(heights) + 0.6 * len(heights)
    with style():
        figure = Figure(figsize=size, layout="constrained")
        all_axes = figure.subplots(len(parts), len(panels), sharey="row", squeeze=False, height_ratios=heights)
        for part, of_part in zip(parts, all_axes, strict=True):
            for axes, (key, title) in zip(of_part, panels.items(), strict=True):
                axes.set_title(f"difference to {baseline}" if part is compared else title)
                _draw_estimates(axes, {name: estimates.get(key) for name, estimates in part.items()})
        for axes in all_axes[1:].flat:
            axes.axvline(0, color="0.7", linewidth=1)
    return figure


def _draw_estimates(axes: Axes, estimates: Mapping[str, Estimate | None]) -> None:
    for line, (name, estimate) in enumerate(estimates.items()):
        if estimate is None:
            continue
        colour = "0.5" if name == START else "C0"
        dots = 100 * np.array(estimate.values)
        axes.plot(dots, [line] * len(dots), "o", color=colour, alpha=0.35, markersize=5, markeredgewidth=0)
        low, high = estimate.interval or (estimate.mean, estimate.mean)
        axes.plot([100 * low, 100 * high], [line, line], color=colour, linewidth=1.5)
        axes.plot([100 * estimate.mean], [line], "|", color=colour, markersize=12, markeredgewidth=2)
    axes.grid(True, axis="y")
    axes.set_yticks(range(len(estimates)), list(estimates))
    axes.set_ylim(len(estimates) - 0.5, -0.5)
