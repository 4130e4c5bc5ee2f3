"""Runs side by side: what is there, what differs in their settings, and their curves in one figure.

A run folder is any folder below `outputs_root()` with a config.json: Speed-RL runs, distillations, and folders of
notebooks that only measure (they have no records). Links are not followed, hidden folders not entered.
"""

import ast
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from speedrl_lab import canvas, plots
from speedrl_lab.config import RunConfig, nearest
from speedrl_lab.runs import Run, outputs_root

METRICS = {
    "rewards.detector": "exact counts",
    "rewards.clip": "CLIP",
    "steps": "steps",
    "diversity": "diversity",
    "kl": "KL",
    "loss": "loss",
}
"""Columns of the records that a table shows, with their headings."""
DASHES = ("solid", "dash", "dot", "dashdot")
SMOOTHING = 10
"""Iterations of the running mean in the overlaid curves."""
ABSENT = "-"
NAME_WIDTH = 40
"""Characters of a run's name that a narrow window keeps."""


@dataclass(frozen=True)
class RunFolder:
    """A run folder as it is on disk: its name below the root of all outputs, settings and records."""

    name: str
    path: Path
    settings: dict[str, Any]
    records: pd.DataFrame

    @property
    def method(self) -> str:
        """`speed-rl`, `schedule` (pace head alone), `sdtt` or `dimo`; "-" without records."""
        if self.records.empty:
            return ABSENT
        if "loss" in self.records:
            return self.settings.get("method", "distillation")
        return "schedule" if self.settings.get("trained") == "schedule" else "speed-rl"

    @property
    def asked(self) -> int | None:
        """Iterations the run was started for."""
        return self.settings.get("distill_iterations" if "loss" in self.records else "iterations")

    @property
    def changed(self) -> datetime:
        """When the last record was written, in local time; when the run was opened, where there is none."""
        return datetime.fromtimestamp(last_change(self.path))

    @property
    def card(self) -> str:
        """The facts of card.md, or nothing."""
        file = self.path / "card.md"
        return file.read_text().partition("\nSettings:")[0] if file.is_file() else ""


def last_change(path: Path) -> float:
    """Time of the newest sign of life of a run: its records, or its config.json."""
    files = [path / name for name in ("metrics.jsonl", "config.json")]
    return max(file.stat().st_mtime for file in files if file.is_file())


def find(places: Iterable[str | Path] = ()) -> list[RunFolder]:
    """The run folders at and below some folders, newest first.

    Args:
        places: names below `outputs_root()`, or absolute folders; all runs where none is given.

    Raises:
        FileNotFoundError: no such folder (names the nearest run), or no run in it.
        ValueError: a config.json or metrics.jsonl that cannot be read.
    """
    root, found = outputs_root(), {}
    for place in [root / place for place in places] or [root]:
        inside = folders(place)
        if not inside and place == root:
            raise FileNotFoundError(f"no runs below {root} yet; make one: python -m speedrl_lab run 03 preset=smoke")
        if not inside:
            known = [name_of(path) for path in folders(root)]
            hint = f"; nearest: {nearest(name_of(place), known)!r}" if known else ""
            raise FileNotFoundError(f"no run (a folder with config.json) at or below {place}{hint}")
        found |= dict.fromkeys(inside)
    runs = [_read(path) for path in found]
    return sorted(runs, key=lambda run: run.changed, reverse=True)


def folders(root: Path) -> list[Path]:
    """Folders with a config.json at and below `root`, sorted."""
    found = []
    for folder, inner, files in os.walk(root):  # does not follow links
        inner[:] = [name for name in inner if not name.startswith(".")]
        if "config.json" in files:
            found.append(Path(folder))
    return sorted(found)


def name_of(path: Path) -> str:
    """The name that commands take: the path below the root, or the path itself elsewhere."""
    root = outputs_root()
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _read(path: Path) -> RunFolder:
    try:
        settings = json.loads((path / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'} is no JSON: {error}") from None
    return RunFolder(name_of(path), path, settings, Run(path, settings).records())


def table(runs: Sequence[RunFolder]) -> pd.DataFrame:
    """One row a run: run, method, changed, done and asked iterations, minutes, and the METRICS there are.

    Metrics are means over the last fifth of the records.
    """
    rows = []
    for run in runs:
        records = run.records
        row = {"run": run.name, "method": run.method, "changed": run.changed, "done": len(records)}
        row |= {"asked": run.asked if len(records) else None}
        row |= {"minutes": records.seconds.sum() / 60 if "seconds" in records else math.nan}
        last = records.tail(max(1, len(records) // 5))
        rows.append(row | {name: last[name].mean() for name in METRICS if name in records})
    facts = ["run", "method", "changed", "done", "asked", "minutes"]
    frame = pd.DataFrame(rows, columns=facts + [name for name in METRICS if any(name in row for row in rows)])
    return frame.astype({"asked": "Int64"})


def shown(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame of `table` as short texts for people."""
    asked = [f"{row.done} of {row.asked}" if row.done else ABSENT for row in frame.itertuples()]
    texts = pd.DataFrame({"run": frame.run, "method": frame.method, "iterations": asked})
    texts["minutes"] = [ABSENT if math.isnan(value) else f"{value:.1f}" for value in frame.minutes]
    for name in METRICS:
        if name in frame:
            texts[METRICS[name]] = [ABSENT if math.isnan(value) else f"{value:.3g}" for value in frame[name]]
    texts["last change"] = frame.changed.dt.strftime("%Y-%m-%d %H:%M")
    return texts


def differing(runs: Sequence[RunFolder]) -> pd.DataFrame:
    """Only the settings that differ between the runs: one row a run (its name is the index).

    Weights of rewards have a column each. A setting that is younger than a run counts with its default.
    """
    frame = pd.DataFrame([flat(run.settings) for run in runs], index=pd.Index([run.name for run in runs], name="run"))
    frame = frame.astype(object).where(frame.notna(), ABSENT)
    texts = frame.map(repr)
    return frame[[name for name in frame if texts[name].nunique() > 1]]


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with defaults filled in, and those that are dictionaries as `<name>.<key>`."""
    if "preset" in settings:
        settings = json.loads(RunConfig().to_json()) | settings
    flattened: dict[str, Any] = {}
    for name, value in settings.items():
        parts = {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
        flattened |= parts
    return flattened


def matching(runs: Sequence[RunFolder], text: str) -> list[RunFolder]:
    """The runs for which every word of `text` holds.

    `setting=value` compares a setting (`speed_weight=0.2`, `quality_weights.clip=1`); another word must be part of
    the run's name, method or card. ValueError for a setting that no run has; names the nearest.
    """
    known = sorted({name for run in runs for name in flat(run.settings)})
    chosen = list(runs)
    for word in text.split():
        name, equals, raw = word.partition("=")
        if equals and name not in known:
            hint = f"; nearest: {nearest(name, known)!r}" if known else ""
            raise ValueError(f"no run has a setting {name!r}{hint}")
        chosen = [run for run in chosen if (_equals(flat(run.settings), name, raw) if equals else _says(run, word))]
    return chosen


def _equals(settings: dict[str, Any], name: str, raw: str) -> bool:
    try:
        wanted = ast.literal_eval(raw)
    except (ValueError, SyntaxError):
        wanted = raw
    value = settings.get(name)
    return str(value) == raw or (name in settings and value == wanted)


def _says(run: RunFolder, word: str) -> bool:
    return word.lower() in f"{run.name}\n{run.method}\n{run.card}".lower()


def labels(runs: Sequence[RunFolder]) -> list[str]:
    """Names without the folders that all of them share at the beginning and at the end."""
    parts = [run.name.split("/") for run in runs]
    while len(parts) > 1 and all(len(names) > 1 for names in parts):
        if len({names[0] for names in parts}) == 1:
            parts = [names[1:] for names in parts]
        elif len({names[-1] for names in parts}) == 1:
            parts = [names[:-1] for names in parts]
        else:
            break
    return ["/".join(names) for names in parts]


def overlay(runs: Sequence[RunFolder]) -> go.Figure:
    """Training curves of several runs, one panel a quantity, a line a run: running means of SMOOTHING iterations.

    Raises ValueError where no run has records.
    """
    drawn = [run for run in runs if not run.records.empty]
    if not drawn:
        raise ValueError("none of the runs has records to draw")
    rewards = sorted({name for run in drawn for name in run.records if name.startswith("rewards.")})
    titles = {name: f"reward: {name[8:]}" for name in rewards} | plots.PANELS | {"loss": "distillation loss"}
    titles = {name: title for name, title in titles.items() if any(name in run.records for run in drawn)}
    columns = min(3, len(titles))
    rows = math.ceil(len(titles) / columns)
    figure = make_subplots(rows, columns, subplot_titles=list(titles.values()), vertical_spacing=0.32 / rows)
    for number, (run, label) in enumerate(zip(drawn, labels(drawn), strict=True)):
        line = {"color": plots.COLORS[number % len(plots.COLORS)], "width": 2}
        line["dash"] = DASHES[number // len(plots.COLORS) % len(DASHES)]
        mode = "lines+markers" if len(run.records) < 5 else "lines"
        first = True
        for place, name in enumerate(titles):
            if name not in run.records:
                continue
            smooth = run.records[name].rolling(SMOOTHING, min_periods=1).mean()
            figure.add_scatter(
                x=run.records.iteration.to_numpy("int32"), y=smooth.to_numpy("float32"), mode=mode, line=line,
                name=label, legendgroup=run.name, showlegend=first, meta=run.name, row=place // columns + 1,
                col=place % columns + 1, hovertemplate="%{y:.3g} at iteration %{x}",
            )  # fmt: skip
            first = False
    return _dressed(figure, rows, len(drawn))


def _dressed(figure: go.Figure, rows: int, lines: int) -> go.Figure:
    """The neutral look of the other figures, with the legend below the panels."""
    axis = {"gridcolor": "rgba(125, 125, 125, 0.25)", "linecolor": canvas.INK, "zeroline": False}
    figure.update_xaxes(title={"text": "iteration", "font_size": 11}, title_standoff=4, **axis).update_yaxes(**axis)
    figure.update_annotations(font_size=13)
    height = 240 * rows + 60
    return figure.update_layout(
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", font={"color": canvas.INK, "size": 12},
        height=height + 22 * math.ceil(lines / 2), margin={"l": 45, "r": 15, "t": 40, "b": 60},
        legend={"orientation": "h", "y": -70 / height, "yanchor": "top", "x": 0}, hovermode="closest",
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": canvas.INK},
    )  # fmt: skip


def as_text(frame: pd.DataFrame, width: int | None = None) -> str:
    """A table of texts in columns; with a width, long cells of the first column lose their middle.

    Columns that still do not fit are left out from the right, and named in the last line.
    """
    cells = [list(map(str, frame.columns)), *([str(value) for value in row] for row in frame.to_numpy())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if width is not None:
        widths[0] = min(widths[0], max(NAME_WIDTH, width - sum(widths[1:]) - 2 * len(widths[1:])))
        while len(widths) > 1 and sum(widths) + 2 * (len(widths) - 1) > width:
            widths.pop()
    left_out = cells[0][len(widths) :]
    lines = []
    for row in cells:
        first = shortened(row[0], widths[0]).ljust(widths[0])
        rest = [cell.rjust(size) for cell, size in zip(row[1:], widths[1:], strict=False)]
        lines.append("  ".join([first, *rest]).rstrip())
    return "\n".join(lines + [f"(in a wider window also: {', '.join(left_out)})"] * bool(left_out))


def shortened(text: str, most: int) -> str:
    """Text of at most `most` characters; a longer one loses its middle."""
    if len(text) <= most:
        return text
    return f"{text[: (most - 3) // 2]}...{text[len(text) - (most - 3 - (most - 3) // 2) :]}"
