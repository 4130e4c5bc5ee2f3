"""Pictures of the training board: curves with bands, and a film of fixed prompts."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from speedrl_lab import canvas, plots

PANELS = {
    "steps": "steps per image",
    "forwards": "passes per image",
    "kl": "KL (nats per token)",
    "clip_fraction": "clipped (share of ratios)",
    "diversity": "diversity (RMS pixels)",
}
LEAST = {"kl": 0.002, "clip_fraction": 0.05}
"""Ends of axes at least; what is smaller is as good as nothing, and should not look like a mountain."""
WINDOW = 10
"""Iterations of a running mean."""
NAMES = 0.75
"""Room for the names of weights above their lines, in heights of the lines' range."""
MOST_BYTES = 120_000
"""Of a picture that stays in a notebook in full color."""


def curves(records: Sequence[Mapping[str, Any]], samples: int) -> Figure:
    """One small panel a quantity; rewards with the standard deviation inside groups as a band.

    Thin: each iteration; thick: running mean of 10. The last panel holds the weights; a dashed line marks an
    iteration from which one was changed. `samples`: of one iteration, to count passes per image.
    """
    table = pd.json_normalize(list(records))
    if len(table) == 0:
        raise ValueError("no records given; expected at least one iteration")
    if "forwards" in table:
        table = table.assign(forwards=table["forwards"] / samples)
    rewards = {name: f"reward: {name[8:]}" for name in table if name.startswith("rewards.")}
    shown = {name: title for name, title in (rewards | PANELS).items() if name in table}
    weights = [name for name in table if name.startswith("weights.")]
    figure, panels = canvas.panels(len(shown) + bool(weights), 4, 2.7, 1.9)
    for axes, (name, title) in zip(panels, shown.items(), strict=False):
        smooth = table[name].rolling(WINDOW, min_periods=1).mean()
        color = plots.COLORS[2] if name in rewards else plots.COLORS[0]
        band = table.get(name.replace("rewards.", "rewards_std."))
        if name in rewards and band is not None:
            spread = band.rolling(WINDOW, min_periods=1).mean()
            low, high = smooth - spread, smooth + spread
            axes.fill_between(table["iteration"], low, high, color=color, alpha=0.18, linewidth=0)
        axes.plot(table["iteration"], table[name], color=color, alpha=0.35, linewidth=0.9)
        axes.plot(table["iteration"], smooth, color=color, linewidth=2, marker="." if len(table) < 5 else "")
        if name in LEAST:
            axes.set_ylim(min(0.0, 1.1 * table[name].min()), max(LEAST[name], 1.1 * table[name].max()))
        canvas.label(axes, f"{title}: {smooth.iloc[-1]:.3g}", "iteration")
    if weights:
        _draw_weights(panels[-1], table, weights)
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
        top = 1 / (1 + NAMES) if weights and axes is panels[-1] else 1.0  # below the names of the weights
        for iteration in changes(records):
            axes.axvline(iteration, ymax=top, color=canvas.INK, linewidth=1, linestyle="--")
    figure.tight_layout()
    return figure


def _draw_weights(axes: Axes, table: pd.DataFrame, weights: Sequence[str]) -> None:
    """Each weight as stairs; a rollout that practises a fixed number of steps has none for speed."""
    rows = table[~table["practised"].astype(bool)] if "practised" in table else table
    for index, name in enumerate(weights):
        color = plots.COLORS[index % len(plots.COLORS)]
        axes.plot(rows["iteration"], rows[name], color=color, drawstyle="steps-post", label=name[8:], linewidth=2)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + NAMES * (high - low))
    axes.legend(frameon=False, fontsize=7, labelcolor=canvas.INK, ncols=2, loc="upper left", borderpad=0)
    canvas.label(axes, "weights", "iteration")


def changes(records: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """Weights that were changed while the run went on, by the first iteration in which they acted."""
    found = {}
    for record in records:  # nested as `train` yields them, or flat as `run.records()` has them
        flat = {name[8:]: value for name, value in record.items() if name.startswith("changed.") and value == value}
        named = record.get("changed") or flat
        if isinstance(named, Mapping) and named:
            found[int(record["iteration"])] = dict(named)
    return found


def film(moments: Mapping[int, tuple[Tensor, Sequence[int]]], prompts: Sequence[str], most: int = 9) -> Figure:
    """Samples of fixed prompts, a row each, over the iterations; below each picture, the steps it took.

    `moments`: iteration -> (pictures (B, 3, H, W) in [0, 1], steps of each). At most `most` columns.
    """
    times = sorted(moments)
    count = min(most, len(times))
    times = [times[round(index * (len(times) - 1) / max(1, count - 1))] for index in range(count)]
    pictures = [moments[time][0][row] for row in range(len(prompts)) for time in times]
    steps = [moments[time][1][row] for row in range(len(prompts)) for time in times]
    captions = [f"{number} step{'s' if number > 1 else ''}" for number in steps]
    titles = [f"iteration {time}" for time in times]
    pictures = torch.stack(pictures)
    return plots.image_grid(pictures, captions, columns=count, row_titles=list(prompts), column_titles=titles)


def stacked(pictures: Sequence[bytes]) -> bytes:
    """PNG files one above the other as one; with fewer colors where it would swell a notebook."""
    sheets = [Image.open(io.BytesIO(picture)).convert("RGBA") for picture in pictures]
    whole = Image.new("RGBA", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)))
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    file = _png(whole)
    return file if len(file) <= MOST_BYTES else _png(whole.quantize(128, Image.Quantize.FASTOCTREE))


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "png", optimize=True)
    return buffer.getvalue()
