"""ISDa and ISD by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evaluation.plots.drawing import style

_PER_ROW = 2


def isda_figure(results: Mapping[str, Any]) -> Figure:
    """A panel for each measure of ``evaluation.isda.summary``: its mean by layer with the interval, and its heads as dots.

    The dashed line is what even attention would give.
    """
    of_layers, even = results["layers"], results["even_attention"]
    names = [name for name in even["interval_95"] if even[name] is not None]
    rows, columns = -(-len(names) // _PER_ROW), min(len(names), _PER_ROW)
    with style():
        figure = Figure(figsize=(4.6 * columns, 3.2 * rows), layout="constrained")
        for place, name in enumerate(names, start=1):
            _draw(figure.add_subplot(rows, columns, place), name, of_layers, even[name])
    return figure


def _draw(axes: Axes, name: str, of_layers: Sequence[Mapping[str, Any]], even: float) -> None:
    layers = np.array([entry["layer"] for entry in of_layers])
    means = np.array([entry[name] for entry in of_layers], dtype=float)
    bounds = np.array([entry["interval_95"][name] or (entry[name], entry[name]) for entry in of_layers], dtype=float)
    for entry in of_layers:
        heads = [head[name] for head in entry.get("heads", ())]
        axes.plot([entry["layer"]] * len(heads), heads, "o", color="C0", alpha=0.3, markersize=4, markeredgewidth=0)
    axes.axhline(even, color="0.6", linewidth=1, linestyle="--")
    axes.vlines(layers, *bounds.T, color="C0", linewidth=1.5)
    axes.plot(layers, means, "-o", color="C0", markersize=5, linewidth=1.2)
    axes.set_title(name, fontsize=10, loc="left", parse_math=False)
    axes.set_xlabel("layer", fontsize=9)
    axes.set_ylabel("nats", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
