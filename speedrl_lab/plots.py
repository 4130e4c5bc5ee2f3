"""Figures: a Trajectory, pictures or a DataFrame in, a matplotlib or Plotly figure out.

Nothing here trains or samples. Lines take the Okabe-Ito colours (safe for colour-blind eyes);
backgrounds are transparent and the ink is a grey that is legible on white and on black.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from speedrl_lab import canvas
from speedrl_lab.frontier_plots import AXES as AXES
from speedrl_lab.frontier_plots import METRICS as METRICS
from speedrl_lab.frontier_plots import frontier as frontier
from speedrl_lab.frontier_plots import frontier_panels as frontier_panels
from speedrl_lab.frontier_plots import frontier_print as frontier_print
from speedrl_lab.generator import MaskedGenerator
from speedrl_lab.trajectory import Trajectory

States = Trajectory | Sequence[Mapping[str, Any]]
"""A trajectory, or the list of what `on_step` of the sampler received."""
COLORS = canvas.COLORS
PANELS = {
    "steps": "steps per image",
    "kl": "KL (nats per token)",
    "diversity": "diversity (RMS pixels)",
}


def tokens_by_step(states: States) -> Tensor:
    """Tokens after each step, int64 (T, B, N), with masks where nothing is known yet."""
    if isinstance(states, Trajectory):
        steps = range(1, int(states.steps.max()) + 1)
        return torch.stack([states.state(step) for step in steps])
    if not states:
        raise ValueError("no states given; expected one for each step (collect them with on_step)")
    return torch.stack([state["tokens"] for state in states])


def frames(states: States, generator: MaskedGenerator) -> Tensor:
    """Previews of an unmasking, float32 (T + 1, B, 3, H, W) in [0, 1]: all masked, then after each step.

    A known token shows its patch of the final picture, a masked one a grey chequer.
    """
    tokens, mask_id = tokens_by_step(states), generator.spec.mask_id
    known = torch.cat([torch.zeros_like(tokens[:1], dtype=torch.bool), tokens != mask_id])  # (T + 1, B, N)
    images = generator.decode(torch.where(tokens[-1] == mask_id, 0, tokens[-1])).cpu()  # (B, 3, H, W)
    (rows, columns), (height, width) = generator.spec.grid, images.shape[-2:]
    tall, wide = height // rows, width // columns
    shown = known.cpu().unflatten(2, (rows, columns)).repeat_interleave(tall, 2).repeat_interleave(wide, 3)
    down, across = torch.arange(height) // max(1, tall // 2), torch.arange(width) // max(1, wide // 2)
    chequer = torch.where((down[:, None] + across) % 2 == 0, 0.58, 0.66)  # (H, W)
    return torch.where(shown[:, :, None], images, chequer)


def film_strip(states: States, generator: MaskedGenerator, prompts: Sequence[str], most: int = 9) -> Figure:
    """The unmasking of B prompts, one row a prompt, at most `most` moments from all masked to done."""
    film = frames(states, generator)
    moments = np.unique(np.linspace(0, len(film) - 1, min(most, len(film))).round().astype(int))
    pictures = film[torch.from_numpy(moments)].transpose(0, 1).flatten(0, 1)  # (B * moments, 3, H, W)
    titles = ["start" if moment == 0 else f"step {moment}" for moment in moments]
    return _pictures(pictures, len(moments), row_titles=list(prompts), column_titles=titles)


def image_grid(
    images: Tensor,
    prompts: Sequence[str] | None = None,
    scores: Sequence[float | str] | None = None,
    columns: int = 8,
    row_titles: Sequence[str] | None = None,
    column_titles: Sequence[str] | None = None,
) -> Figure:
    """Images (B, 3, H, W) in [0, 1] in rows of `columns`, each with its prompt and score below it."""
    for name, given in (("prompts", prompts), ("scores", scores)):
        if given is not None and len(given) != len(images):
            raise ValueError(f"got {len(given)} {name} for {len(images)} images; expected one an image")
    captions = ["" for _ in images] if prompts is None else list(prompts)
    if scores is not None:
        texts = [score if isinstance(score, str) else f"{score:.3g}" for score in scores]
        captions = [f"{caption} ({text})".strip() for caption, text in zip(captions, texts, strict=True)]
    return _pictures(images, columns, captions, row_titles, column_titles)


def _pictures(
    images: Tensor,
    columns: int,
    captions: Sequence[str] | None = None,
    row_titles: Sequence[str] | None = None,
    column_titles: Sequence[str] | None = None,
) -> Figure:
    """Pictures one inch wide on a sheet measured in inches."""
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    below = [canvas.wrapped(text, 17) for text in captions or [""] * len(images)]
    above = [canvas.wrapped(text, 14) for text in column_titles or []]
    lines = max(text.count("\n") + 1 if text else 0 for text in below)
    left = 1.5 if row_titles else 0.05
    top = 0.1 + max((0.16 * (text.count("\n") + 1) for text in above), default=0)
    across, down = 1 + 1 / 12, 1 + 1 / 12 + lines / 8
    width, height = left + columns * across, top + rows * down
    figure = canvas.blank(width, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    for index, image in enumerate(images.detach().float().cpu()):
        x, y = left + index % columns * across, top + index // columns * down
        pixels = image.permute(1, 2, 0).clamp(0, 1).numpy()
        axes.imshow(pixels, extent=(x, x + 1, y + 1, y), interpolation="nearest")
        axes.text(x + 0.5, y + 1.03, below[index], ha="center", va="top", fontsize=7.5, color=canvas.INK)
    for row, title in enumerate(row_titles or []):
        y = top + row * down + 0.5
        axes.text(left - 0.1, y, canvas.wrapped(title, 20), ha="right", va="center", fontsize=9, color=canvas.INK)
    for column, title in enumerate(above):
        x = left + column * across + 0.5
        axes.text(x, top - 0.05, title, ha="center", va="bottom", fontsize=9, color=canvas.INK)
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    return figure


def reveal_map(
    trajectory: Trajectory, grid: tuple[int, int], prompts: Sequence[str] | None = None, columns: int = 4
) -> Figure:
    """In which step, from 1, each position of the token grid (rows, columns) was revealed; B maps."""
    steps = int(trajectory.steps.max())
    figure, panels = canvas.panels(len(trajectory), columns, 2.4, 2.6)
    maps = trajectory.reveal_step.long().cpu().unflatten(1, grid).numpy() + 1  # (B, rows, columns)
    colors = plt.get_cmap("cividis", steps)
    for index, (axes, values) in enumerate(zip(panels, maps, strict=True)):
        shown = axes.imshow(values, cmap=colors, vmin=0.5, vmax=steps + 0.5, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        if values.size <= 64:
            for row, column in np.ndindex(*values.shape):
                step = int(values[row, column])
                ink = "white" if step <= (steps + 1) / 2 else "black"
                axes.text(column, row, step, ha="center", va="center", fontsize=7, color=ink)
        canvas.label(axes, canvas.wrapped(prompts[index], 28) if prompts else "")
    figure.tight_layout()
    bar = figure.colorbar(shown, ax=panels, fraction=0.03, pad=0.02)
    bar.locator = MaxNLocator(integer=True, nbins=8)
    bar.update_ticks()
    bar.ax.tick_params(colors=canvas.INK, labelsize=9)
    bar.outline.set_visible(False)
    bar.set_label("revealed in step", color=canvas.INK, fontsize=9)
    return figure


def tokens_per_step(trajectory: Trajectory) -> Figure:
    """How many tokens each step reveals: bars are means over the samples still unmasking, dots samples."""
    counts = torch.stack([trajectory.revealed(step).sum(1) for step in range(int(trajectory.steps.max()))])
    counts = counts.cpu().double().numpy()  # (T, B)
    steps = np.arange(1, len(counts) + 1)
    active = counts > 0
    means = counts.sum(1) / active.sum(1)
    figure, (axes,) = canvas.panels(1, 1, max(3.5, 0.45 * len(steps) + 1.5), 2.6)
    bars = axes.bar(steps, means, color=COLORS[0], width=0.75)
    axes.bar_label(bars, [f"{mean:.3g}" for mean in means], fontsize=8, color=canvas.INK, padding=2)
    if (counts.max(1) != counts.min(1)).any():  # a pace that differs between samples
        axes.plot(active.nonzero()[0] + 1, counts[active], "o", color=COLORS[1], markersize=3, alpha=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=20))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.set(xlim=(0.4, len(steps) + 0.6))
    axes.margins(y=0.12)
    canvas.label(axes, f"{float(trajectory.steps.double().mean()):.3g} steps per image", "step", "tokens revealed")
    figure.tight_layout()
    return figure


def curves(records: pd.DataFrame | Sequence[Mapping[str, Any]]) -> Figure:
    """Training curves, one small panel a quantity: raw rewards by name, steps, KL, diversity.

    `records` are those of `train`, or `run.records()`. Thin: each iteration; thick: running mean of 10.
    """
    table = records if isinstance(records, pd.DataFrame) else pd.json_normalize(list(records))
    if len(table) == 0:
        raise ValueError("no records given; expected at least one iteration")
    rewards = {name: f"reward: {name[8:]}" for name in table.columns if name.startswith("rewards.")}
    shown = {name: title for name, title in (rewards | PANELS).items() if name in table}
    figure, panels = canvas.panels(len(shown), 3, 3.3, 2.1)
    for axes, (name, title) in zip(panels, shown.items(), strict=True):
        smooth = table[name].rolling(10, min_periods=1).mean()
        color = COLORS[2] if name in rewards else COLORS[0]
        axes.plot(table["iteration"], table[name], color=color, alpha=0.35, linewidth=0.9)
        axes.plot(table["iteration"], smooth, color=color, linewidth=2, marker="." if len(table) < 5 else "")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        canvas.label(axes, f"{title}: {smooth.iloc[-1]:.3g}", "iteration")
    figure.tight_layout()
    return figure


def png(figure: Figure) -> bytes:
    """A matplotlib figure as a PNG file with a transparent background."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144, bbox_inches="tight", transparent=True)
    return buffer.getvalue()
