"""The picture of an ablation: what each kind of run reached, and how far it is from the baseline with the same seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.ablation.grid import START, Run
from evaluation.ablation.statistics import Estimate
from evaluation.ablation.table import Row, Values, baseline_of, by_name_and_seed
from evaluation.plots.drawing import style

SHOWN = {
    "txt_r_mean": "text retrieval, mean R@K (%)",
    "img_r_mean": "image retrieval, mean R@K (%)",
    "r_mean": "both (%)",
    "winoground_group": "Winoground group (%)",
}


def figure_of(runs: Sequence[Run], rows: Sequence[Row], values: Values) -> Figure:
    """Two rows of panels: values, and differences to the baseline. A dot is a seed, a bar the mean with its 95 % interval."""
    known = next(iter(values.values()), {})
    shown = {key: title for key, title in SHOWN.items() if key in known}
    by_name = by_name_and_seed(runs, values)
    baseline = by_name[baseline_of(runs)]
    compared = [row for row in rows if row.differences]
    longest = max(len(row.name) for row in rows)
    width = 0.085 * longest + 3.2 * len(shown)
    with style():
        heights = [len(rows) + 1.5, len(compared) + 1.5] if compared else [len(rows) + 1.5]
        figure = Figure(figsize=(width, 0.36 * sum(heights) + 0.6 * len(heights)), layout="constrained")
        axes = figure.subplots(len(heights), len(shown), sharey="row", squeeze=False, height_ratios=heights)
        for column, (key, title) in enumerate(shown.items()):
            dots = {row.name: [100 * of_seed[key] for of_seed in by_name[row.name].values()] for row in rows}
            _panel(axes[0, column], title, dots, {row.name: row.metrics.get(key) for row in rows})
            if compared:
                differences = {
                    row.name: [
                        100 * (of_seed[key] - baseline[seed][key])
                        for seed, of_seed in by_name[row.name].items()
                        if seed in baseline
                    ]
                    for row in compared
                }
                panel = axes[1, column]
                panel.axvline(0, color="0.7", linewidth=1)
                title = f"difference to {baseline_of(runs)}"
                _panel(panel, title, differences, {row.name: row.differences[key] for row in compared})
    return figure


def _panel(axes: Axes, title: str, dots: Mapping[str, Sequence[float]], means: Mapping[str, Estimate | None]) -> None:
    for place, (name, values) in enumerate(dots.items()):
        colour = "0.5" if name == START else "C0"
        axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.35, markersize=5, markeredgewidth=0)
        mean = means[name]
        if mean is not None:
            low, high = mean.interval or (mean.mean, mean.mean)
            axes.plot([100 * low, 100 * high], [place, place], color=colour, linewidth=1.5)
            axes.plot([100 * mean.mean], [place], "|", color=colour, markersize=12, markeredgewidth=2)
    axes.set_yticks(range(len(dots)), list(dots), parse_math=False)
    axes.set_ylim(len(dots) - 0.5, -0.5)
    axes.set_title(title, fontsize=9, parse_math=False)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
