"""Figures of estimators against the truth: tables of `bakeoff` in, a matplotlib figure out."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from speedrl_lab import canvas
from speedrl_lab.plots import COLORS

MARKERS = ("o", "D", "s", "^")


def trade_offs(table: pd.DataFrame) -> Figure:
    """Log-probability: bias, with the spread over masks as bars. Policy gradient: spread against bias.

    `table` is `likelihood_errors`, of one order or several stacked; labels end with the forward passes.
    """
    figure, (left, right) = canvas.panels(2, 2, 4.9, 3.6)
    texts = np.array([f"{row.estimator} ({row.passes:g})" for row in table.itertuples()])
    orders = table["order"].to_numpy()
    for index, order in enumerate(dict.fromkeys(orders)):
        rows = np.flatnonzero(orders == order)
        own = table.iloc[rows]
        look = {"color": COLORS[index], "marker": MARKERS[index], "linestyle": "", "markersize": 7}
        left.errorbar(own["bias"], rows, xerr=own["std"], capsize=3, **look)
        right.plot(own["gradient_bias"], own["gradient_std"], label=f"{order} order", **look)
    left.set_yticks(range(len(texts)), texts)
    left.set_ylim(len(texts) - 0.5, -0.5)
    _name_points(right, table["gradient_bias"].to_numpy(), table["gradient_std"].to_numpy(), texts)
    for axes in (left, right):
        axes.axvline(0, color=canvas.INK, linewidth=0.8, linestyle=":")
    canvas.label(left, "log-probability: bias, and spread over masks", "nats")
    norm = "|exact gradient|"
    canvas.label(right, "policy gradient", f"bias of the mean / {norm}", f"spread of one sample / {norm}")
    look = {"loc": "lower right", "bbox_to_anchor": (1.02, 0.98), "ncols": 2, "columnspacing": 1}
    right.legend(frameon=False, fontsize=8, labelcolor=canvas.INK, **look)
    figure.tight_layout()
    return figure


def _name_points(axes: Axes, x: np.ndarray, y: np.ndarray, texts: Sequence[str]) -> None:
    """Write each text right of its point, above what is written there already."""
    axes.margins(x=0.12, y=0.15)
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    axes.set_xlim(left, right + 0.25 * (right - left))  # room for the last text
    near, gap = 0.35 * (right - left), 0.055 * (high - low)
    written: list[tuple[float, float]] = []
    for index in np.argsort(y):
        height = y[index]
        for place, used in written:
            if abs(place - x[index]) < near and used - gap < height < used + gap:
                height = used + gap
        written.append((x[index], height))
        look = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(texts[index], (x[index], height), fontsize=8, color=canvas.INK, **look)


def bars(table: pd.DataFrame, columns: Mapping[str, str], title: str = "", digits: int = 2) -> Figure:
    """One group of horizontal bars an estimator, one bar a column (name -> legend); what is NaN has no bar."""
    names = table["estimator"].to_list()
    figure, (axes,) = canvas.panels(1, 1, 6.4, 0.9 + (0.16 + 0.2 * len(columns)) * len(names))
    thick, centers = 0.8 / len(columns), np.arange(len(names))
    for index, (column, legend) in enumerate(columns.items()):
        places = centers + (index - (len(columns) - 1) / 2) * thick
        axes.barh(places, table[column], height=thick * 0.9, color=COLORS[index], label=legend)
        texts = ["none" if np.isnan(value) else f"{value:.{digits}f}" for value in table[column]]
        for place, value, text in zip(places, table[column].fillna(0), texts, strict=True):
            side = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(text, (max(value, 0), place), fontsize=8, color=canvas.INK, **side)
    axes.set_yticks(centers, names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.margins(x=0.1)
    canvas.label(axes, title)
    if len(columns) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=canvas.INK, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure
