"""Quality against cost: a table with intervals in, a plotly figure, or a matplotlib one for print, out."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from matplotlib.figure import Figure
from plotly.subplots import make_subplots

from speedrl_lab import canvas
from speedrl_lab.config import nearest

AXES = {
    "forwards": "forward passes per image",
    "seconds_loop": "seconds per image, sampling loop",
    "seconds_total": "seconds per image, with decoding",
}
METRICS = {
    "accuracy": "exact object counts (share of images)",
    "accuracy2": "exact object counts, second detector (share of images)",
    "relation": "left and above in order (share of images)",
    "relation2": "left and above in order, second detector (share of images)",
    "color": "background as named (share of images)",
    "color2": "background as named, second detector (share of images)",
    "clip": "CLIP cosine of picture and caption",
    "psnr": "PSNR to the nearest valid scene (dB)",
    "diversity": "diversity within a prompt (feature distance)",
    "style_entropy": "entropy of styles within a prompt (nats)",
    "size_entropy": "entropy of sizes within a prompt (nats)",
    "position_entropy": "entropy of positions within a prompt (nats)",
    "background_entropy": "entropy of unnamed backgrounds within a prompt (nats)",
    "kid": "KID, detector features (lower is better)",
    "fd": "Frechet distance, detector features (lower is better)",
    "kid2": "KID, second detector (lower is better)",
    "fd2": "Frechet distance, second detector (lower is better)",
    "kid_surface": "KID, texture (lower is better)",
    "fd_surface": "Frechet distance, texture (lower is better)",
}
HOVERED = ("accuracy", "accuracy2", "clip", "psnr", "diversity", "kid", "kid2")
"""Judges that the hover of a frontier lists beside the one that is drawn."""
VARIANTS = (", usual", ", own pace")
"""Endings of names that say how a model is sampled; such lines take the colour of the model, dotted."""
SYMBOLS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "x": "X", "star": "*"}
"""Markers in plotly's words and in matplotlib's."""


def frontier(
    frame: pd.DataFrame,
    x: str = "forwards",
    metric: str = "accuracy",
    models: Sequence[str] | None = None,
    bands: bool = True,
) -> go.Figure:
    """One quality against cost, a line a model, with 95% intervals as bands; both from `frame`.

    Takes the output of `lab.frontier` (columns `<metric>_low`, `<metric>_high`), or of `lab.evaluate`
    (one row a seed: the mean, and a bootstrap over the seeds). `x`: forwards, seconds_loop, seconds_total.
    Each model has two traces, band and line, in the order of the frame; those not in `models` are hidden.
    """
    figure = frontier_panels(frame, (metric,), x, models, bands)
    return figure.update_layout(height=430)


def frontier_panels(
    frame: pd.DataFrame,
    metrics: Sequence[str],
    x: str = "forwards",
    models: Sequence[str] | None = None,
    bands: bool = True,
    columns: int = 2,
) -> go.Figure:
    """Several qualities against cost, a panel each, under one legend that switches a model in all of them.

    Arguments as `frontier`. Raises ValueError, with the nearest name, for what the frame has not.
    """
    table = frontier_table(frame, metrics, x)
    chosen = table[table.model.isin(table.model if models is None else models)]
    columns = min(columns, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure = make_subplots(rows, columns, horizontal_spacing=0.11, vertical_spacing=0.3 / rows)
    axis = {"gridcolor": "rgba(125, 125, 125, 0.25)", "linecolor": canvas.INK, "zeroline": False}
    ticks = cost_ticks(chosen if len(chosen) else table, x)
    for index, metric in enumerate(metrics):
        place = {"row": index // columns + 1, "col": index % columns + 1}
        for model, look in looks(table.model).items():
            part = table[table.model == model].sort_values(x)
            traces = _lines(part, x, metric, look, bands)
            traces[1].showlegend = index == 0
            for trace in traces:
                trace.visible = model in set(chosen.model)
                figure.add_trace(trace, **place)
        title = METRICS[metric] if len(metrics) == 1 else "<br>(".join(METRICS[metric].split(" ("))
        figure.update_yaxes(title=title, **axis, **place)
        figure.update_xaxes(
            type="log", title=AXES[x], tickvals=ticks, ticktext=[f"{t:g}" for t in ticks], **axis, **place
        )
    return figure.update_layout(
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", font={"color": canvas.INK, "size": 13},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}, height=60 + 330 * rows,
        margin={"l": 70, "r": 20, "t": 50, "b": 60}, hoverlabel={"align": "left"},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": canvas.INK},
    )  # fmt: skip


def frontier_table(frame: pd.DataFrame, metrics: Sequence[str], x: str) -> pd.DataFrame:
    """The frame with intervals; ValueError, with the nearest name, for an axis or metric that it has not."""
    for names, known in (((x,), AXES), (metrics, METRICS)):
        for name in names:
            if name not in known or name not in frame:
                usable = [option for option in known if option in frame]
                raise ValueError(f"no {name!r} to plot; nearest: {nearest(name, usable or list(known))!r}")
    return with_intervals(frame)


def looks(models: Sequence[str] | pd.Series) -> dict[str, dict[str, Any]]:
    """Colour, symbol, and whether it is a variant, of each model in its order; six colours, then symbols differ."""
    names = list(dict.fromkeys(models))
    family = {name: next((name.removesuffix(end) for end in VARIANTS if name.endswith(end)), name) for name in names}
    numbers = {name: number for number, name in enumerate(dict.fromkeys(family.values()))}
    found = {}
    for name in names:
        number = numbers[family[name]]
        color, turn = number % len(canvas.COLORS), number // len(canvas.COLORS)
        symbol = (number + turn) % len(SYMBOLS)
        found[name] = {"color": canvas.COLORS[color], "symbol": list(SYMBOLS)[symbol], "variant": name != family[name]}
    return found


def _lines(rows: pd.DataFrame, x: str, metric: str, look: Mapping[str, Any], bands: bool) -> list[go.Scatter]:
    """The band and the line of one model; one point has an error bar instead of a band."""
    model, color, alone = rows.model.iloc[0], look["color"], len(rows) == 1
    rgb = ", ".join(str(int(color[start : start + 2], 16)) for start in (1, 3, 5))
    high, low = rows[f"{metric}_high"], rows[f"{metric}_low"]
    band = go.Scatter(
        x=[*rows[x], *rows[x][::-1]] if bands else [], y=[*high, *low[::-1]] if bands else [], fill="toself",
        fillcolor=f"rgba({rgb}, 0.18)", line_width=0, mode="lines", hoverinfo="skip", showlegend=False,
        legendgroup=model,
    )  # fmt: skip
    bar = {"array": high - rows[metric], "arrayminus": rows[metric] - low, "visible": alone and bands}
    symbol = look["symbol"] + ("-open" if look["variant"] else "")
    line = go.Scatter(
        x=rows[x], y=rows[metric], error_y=bar, name=model, legendgroup=model, mode="lines+markers",
        line={"color": color, "width": 2.5, "dash": "dot" if look["variant"] else "solid"},
        marker={"size": 9, "symbol": symbol}, hovertemplate="%{text}<extra></extra>",
        text=[_hover(row, metric) for row in rows.to_dict("records")],
    )  # fmt: skip
    return [band, line]


def frontier_print(
    frame: pd.DataFrame,
    metrics: Sequence[str] = ("accuracy", "psnr", "diversity"),
    x: str = "forwards",
    models: Sequence[str] | None = None,
    bands: bool = True,
) -> Figure:
    """Several qualities against cost side by side, for print; takes what `frontier` takes."""
    table = frontier_table(frame, metrics, x)
    known = looks(table.model)
    table = table[table.model.isin(known if models is None else models)]
    figure, panels = canvas.panels(len(metrics), len(metrics), 3.6, 3.0)
    ticks = cost_ticks(table, x) if len(table) else []
    for axes, metric in zip(panels, metrics, strict=True):
        for model, rows in table.groupby("model", sort=False):
            rows, look = rows.sort_values(x), known[model]
            low, high = rows[f"{metric}_low"], rows[f"{metric}_high"]
            if bands and len(rows) == 1:
                axes.vlines(rows[x], low, high, color=look["color"])
            elif bands:
                axes.fill_between(rows[x], low, high, color=look["color"], alpha=0.18, linewidth=0)
            dots, fill = (":", "none") if look["variant"] else ("-", "full")
            marker = {"marker": SYMBOLS[look["symbol"]], "fillstyle": fill}
            axes.plot(rows[x], rows[metric], color=look["color"], linestyle=dots, label=model, **marker)
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        axes.set_xticks([], minor=True)
        canvas.label(axes, METRICS[metric].split(" (")[0], AXES[x])
    figure.tight_layout()
    if len(known) > 4:  # beside the panels: it would cover the lines
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, frameon=False, fontsize=8, labelcolor=canvas.INK, loc="center left",
                      bbox_to_anchor=(1.0, 0.5))  # fmt: skip
    elif len(table):
        panels[0].legend(frameon=False, fontsize=8, labelcolor=canvas.INK)
    return figure


def with_intervals(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a model and budget with `<metric>_low` and `<metric>_high`; unchanged if they are there."""
    if any(f"{metric}_low" in frame for metric in METRICS):
        return frame
    rng = np.random.default_rng(0)  # intervals must not change from one drawing to the next
    rows = []
    for (model, budget), seeds in frame.groupby(["model", "budget"], sort=False):
        row = {"model": model, "budget": budget}
        row |= {name: seeds[name].mean() for name in ("steps", *AXES) if name in seeds}
        for metric in [metric for metric in METRICS if metric in seeds]:
            values = seeds[metric].to_numpy(dtype=float)
            means = values[rng.integers(len(values), size=(2000, len(values)))].mean(1)
            row |= {metric: values.mean()}
            row |= {f"{metric}_low": np.quantile(means, 0.025), f"{metric}_high": np.quantile(means, 0.975)}
        rows.append(row)
    return pd.DataFrame(rows)


def cost_ticks(table: pd.DataFrame, x: str) -> list[float]:
    """Ticks of a cost axis: powers of two for passes."""
    return log_ticks(table[x].min(), table[x].max(), base=2 if x == "forwards" else 10)


def log_ticks(low: float, high: float, base: int) -> list[float]:
    """Round numbers that cover [low, high]: powers of 2, or 1, 2 and 5 times powers of 10."""
    steps = (1,) if base == 2 else (1, 2, 5)
    first, last = math.floor(math.log(low, base)), math.ceil(math.log(high, base))
    ticks = [step * float(base) ** power for power in range(first, last + 1) for step in steps]
    return [tick for tick in ticks if low / base <= tick <= high * base]


def _hover(row: Mapping[str, Any], metric: str) -> str:
    """The numbers of a point, one a line, the one that is drawn first."""
    lines = [f"<b>{row['model']}</b>, budget {row['budget']}"]
    lines += [f"{name}: {row[name]:.4g}" for name in ("steps", *AXES) if name in row]
    for name in dict.fromkeys((metric, *HOVERED)):
        if name in row:
            lines.append(f"{name}: {row[name]:.3f} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]")
    return "<br>".join(lines)
