"""The curves of training runs: ranking loss, alignment loss, its weight, and the recalls in validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from evaluation.plots.drawing import printable, shortened, style
from utils.errors import InputError

Scalars = Mapping[str, Mapping[int, float]]

PARTS = 25  # a curve of many updates is drawn as means of about so many parts of it
_PER_ROW = 3
_LINES = {"r1": "-", "r5": "--", "r10": ":"}


def curves_figure(runs: Mapping[str, Scalars]) -> Figure:
    """Draw what ``utils.logging.read_scalars`` gives of one or more runs, by what to call each.

    What is recorded of each update is drawn as it is, faintly, and as a running mean. A panel that no run has is left out.

    Raises:
        InputError: a run has recorded nothing yet.
    """
    for name, scalars in runs.items():
        if not any(key.startswith(("train/", "val/")) for key in scalars):
            raise InputError(f"{name}: nothing recorded yet, expected a training of at least one update")
    drawn = [dict(scalars) | _unweighted(scalars) for scalars in runs.values()]
    panels = [(title, keys) for title, keys in _PANELS if any(keys.keys() & scalars.keys() for scalars in drawn)]
    rows = -(-len(panels) // _PER_ROW)
    columns = min(len(panels), _PER_ROW)
    with style():
        figure = Figure(figsize=(4.6 * columns, 3.2 * rows + 0.3 + 0.22 * len(runs)), layout="constrained")
        for place, (title, keys) in enumerate(panels, start=1):
            axes = figure.add_subplot(rows, columns, place)
            _draw(axes, title, keys, drawn)
        _add_legend(figure, list(runs))
    return figure


_PANELS: list[tuple[str, dict[str, str]]] = [
    ("ranking loss", {"train/rank": "-"}),
    ("IAIS loss without its weight", {"unweighted": "-"}),
    ("λ_t × iais_weight", {"train/lambda": "-"}),
    ("IAIS loss as it enters the loss", {"train/iais": "-"}),
    ("validation: text retrieval", {f"val/txt_{cutoff}": line for cutoff, line in _LINES.items()}),
    ("validation: image retrieval", {f"val/img_{cutoff}": line for cutoff, line in _LINES.items()}),
]


def _unweighted(scalars: Scalars) -> dict[str, dict[int, float]]:
    weights = scalars.get("train/lambda", {})
    values = {update: value / weights[update] for update, value in scalars.get("train/iais", {}).items() if weights.get(update)}
    return {"unweighted": values} if values else {}


def _draw(axes: Axes, title: str, keys: Mapping[str, str], runs: Sequence[Scalars]) -> None:
    recalls = any(key.startswith("val/") for key in keys)
    for number, scalars in enumerate(runs):
        for key, line in keys.items():
            if key not in scalars:
                continue
            updates, values = (np.array(list(side)) for side in (scalars[key].keys(), scalars[key].values()))
            colour = _colour(number)
            if recalls:
                axes.plot(updates, values, line, color=colour, marker="o", markersize=3, linewidth=1.4)
                continue
            axes.plot(updates, values, color=colour, alpha=0.25, linewidth=0.7)
            axes.plot(updates, running_mean(values), color=colour, linewidth=1.6)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlim(left=0)
    axes.set_xlabel("update", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    if recalls:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        of_cutoffs = [axes.plot([], [], line, color="#606060", label=f"R@{cutoff[1:]}")[0] for cutoff, line in _LINES.items()]
        axes.legend(handles=of_cutoffs, fontsize=8, frameon=False, handlelength=2.2)


def _colour(number: int) -> tuple[float, ...]:
    return colormaps["tab10"](number % 10)


def _add_legend(figure: Figure, names: list[str]) -> None:
    """The runs' colours, above everything; a name may begin with ``_`` or hold ``$``, to which legends give a meaning."""
    lines = [figure.axes[0].plot([], [], color=_colour(number), linewidth=2)[0] for number in range(len(names))]
    legend = figure.legend(lines, ["run"] * len(names), loc="outside upper left", fontsize=9, frameon=False)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(shortened(printable(name), 120))


def running_mean(values: np.ndarray) -> np.ndarray:
    """Means of the values around each, over a ``PARTS``-th of them; fewer at the ends, as many before as after. (n,) → (n,)."""
    count = len(values)
    place = np.arange(count)
    reach = np.minimum(np.minimum(place, count - 1 - place), count // (2 * PARTS))
    sums = np.concatenate([[0.0], values.cumsum()])
    mean: np.ndarray = (sums[place + reach + 1] - sums[place - reach]) / (2 * reach + 1)
    return mean
