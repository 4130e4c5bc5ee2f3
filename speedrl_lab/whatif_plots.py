"""Figures of the what-if explorer: an `Explanation` in, a matplotlib figure or plain HTML out."""

import base64
import html
import io

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from speedrl_lab import canvas
from speedrl_lab.config import TrainConfig
from speedrl_lab.learner import Rollout
from speedrl_lab.plots import AXES, COLORS
from speedrl_lab.whatif import Explanation, total_reward

FATES = {
    "wins": {"color": COLORS[0], "marker": "o"},
    "loses": {"color": COLORS[1], "marker": "v"},
    "clipped": {"color": COLORS[4], "marker": "s"},
    "dropped": {"color": canvas.INK, "marker": "x"},
    "neutral": {"color": canvas.INK, "marker": "."},
}
"""Colour and marker of each fate: either alone tells them apart."""
CELL = "border:0;padding:2px 6px;text-align:left;vertical-align:top;background:transparent;color:inherit"


def weight_bars(explanation: Explanation) -> Figure:
    """Nominal against effective weight of every reward."""
    table = explanation.weights
    figure, (axes,) = canvas.panels(1, 1, 5.2, 0.55 * len(table) + 1.2)
    rows = np.arange(len(table))
    axes.barh(rows - 0.2, table.share, 0.36, color=COLORS[5], label="nominal: share of the sum of weights")
    axes.barh(rows + 0.2, table.effective, 0.36, color=COLORS[0], label="effective: correlation with the advantage")
    for row, line in enumerate(table.itertuples()):
        if not line.acts and line.nominal:
            axes.text(0.02, row + 0.2, "cannot act", va="center", fontsize=8, color=COLORS[1])
    low = min(0.0, float(table.effective.min()), float(table.share.min()))
    axes.set(xlim=(1.1 * low, 1.05), ylim=(len(table) - 0.4, -0.6))
    axes.set_yticks(rows, table.reward)
    axes.axvline(0, color=canvas.INK, linewidth=0.8)
    axes.legend(frameon=False, fontsize=8, labelcolor=canvas.INK, loc="lower left", bbox_to_anchor=(0, 1.0))
    canvas.label(axes, "", "share, or correlation (no unit)")
    figure.tight_layout()
    return figure


def cloud(explanation: Explanation, drawn: Rollout, config: TrainConfig) -> Figure:
    """Samples by passes and quality, their fates, and lines of equal reward; size: how much is won or lost."""
    table = explanation.samples
    figure, (axes,) = canvas.panels(1, 1, 5.6, 3.8)
    jitter = np.random.default_rng(0).uniform(-0.18, 0.18, len(table))  # many samples share a count
    sizes = 14 + 26 * np.abs(explanation.advantages.advantage.numpy(force=True))
    for fate, look in FATES.items():
        rows = np.flatnonzero(table.fate == fate)
        if len(rows):
            x = table.forwards.to_numpy()[rows] + jitter[rows]
            label = f"{fate} ({len(rows)})"
            axes.scatter(x, table.quality.iloc[rows], s=sizes[rows], alpha=0.9, linewidths=1, label=label, **look)
    if "speed" in drawn.rewards:
        _iso_lines(axes, table, drawn, config)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=8, labelcolor=canvas.INK, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    canvas.label(axes, "dotted: equal reward", AXES["forwards"], "quality (weighted z-scores)")
    figure.tight_layout()
    return figure


def _iso_lines(axes: Axes, table: pd.DataFrame, drawn: Rollout, config: TrainConfig) -> None:
    passes = torch.linspace(max(0.5, float(table.forwards.min()) - 0.5), float(table.forwards.max()) + 0.5, 60)
    margin = 0.05 * float(table.quality.max() - table.quality.min()) + 0.1
    quality = torch.linspace(float(table.quality.min()) - margin, float(table.quality.max()) + margin, 60)
    total = total_reward(quality[:, None], passes[None], drawn, config)  # (Q, S)
    look = {"colors": canvas.INK, "linewidths": 0.9, "linestyles": "dotted", "negative_linestyles": "dotted"}
    axes.contour(passes, quality, total, levels=8, **look)


def image_uri(picture: Tensor) -> str:
    """A picture uint8 (3, H, W) as a data URI, in its own size."""
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def picture_table(table: pd.DataFrame, uris: list[str], title: str, most: int = 6) -> str:
    """HTML of the first `most` rows of `samples`: thumbnail, prompt, passes, raw rewards, advantage, reason.

    `uris` holds a picture for each index of the table.
    """
    rewards = list(table.columns[4 : table.columns.get_loc("quality")])
    cells = []
    for row, line in table.head(most).iterrows():
        raw = ", ".join(f"{html.escape(name)} {line[name]:.3g}" for name in rewards if name != "speed")
        why = f"<br><i>{html.escape(line.why)}</i>" if line.why else ""
        cost = f"{line.steps} steps, {line.forwards} passes"
        cells.append(
            f'<tr style="background:transparent"><td style="{CELL}"><img src="{uris[row]}" alt="" width="64" '
            f'style="image-rendering:pixelated;width:64px;max-width:none"></td><td style="{CELL}">'
            f"<b>{line.advantage:+.2f}</b> {html.escape(line.prompt)}<br>{cost}{why}<br>"
            f'<span style="font-size:85%">{raw}</span></td></tr>'
        )
    body = "".join(cells) or f'<tr><td style="{CELL}">none</td></tr>'
    return f"<b>{html.escape(title)}</b><table style='border-collapse:collapse;line-height:1.3'>{body}</table>"


def sides(explanation: Explanation, uris: list[str], most: int = 5) -> str:
    """HTML: who wins, who loses, who is filtered, side by side; biggest first."""
    table = explanation.samples
    wins = table[table.fate == "wins"].nlargest(most, "advantage")
    loses = table[table.fate == "loses"].nsmallest(most, "advantage")
    filtered = table[table.fate.isin(["clipped", "dropped"])].nsmallest(most, "quality")
    parts = {"Wins": wins, "Loses": loses, f"Filtered ({table.fate.isin(['clipped', 'dropped']).sum()})": filtered}
    tables = [picture_table(rows, uris, title, most) for title, rows in parts.items()]
    blocks = "".join(f'<div style="flex:1 1 14rem;max-width:19rem">{rows}</div>' for rows in tables)
    return f'<div style="display:flex;flex-wrap:wrap;gap:1.5rem;align-items:flex-start">{blocks}</div>'


def verdict(explanation: Explanation) -> str:
    """One sentence on where this pushes: passes and quality of winners and losers."""
    table = explanation.samples
    wins, loses = (table[table.fate == fate] for fate in ("wins", "loses"))
    if not len(wins) or not len(loses):
        return "No sample is told from another: these weights teach nothing."
    return (
        f"Winners take {wins.forwards.mean():.2f} passes at quality {wins.quality.mean():+.2f}, "
        f"losers {loses.forwards.mean():.2f} at {loses.quality.mean():+.2f}."
    )
