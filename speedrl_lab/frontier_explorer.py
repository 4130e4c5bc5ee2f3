"""The frontier explorer: choose cost, judge and models; click a point and see its samples.

A thin shell: figures come from `frontier_plots`, tables from `standings`, pictures from `gallery`. Errors in a
callback would vanish in JupyterLab, so every callback writes into an Output that is shown. Without a front end
(papermill, a page) what is stored is the figure as a picture.
"""

import html
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import ipywidgets
import pandas as pd
import plotly.graph_objects as go

from speedrl_lab import canvas, frontier_plots, gallery, page, plots, standings
from speedrl_lab.contenders import Contender
from speedrl_lab.frontier_plots import AXES, METRICS
from speedrl_lab.intervals import SET_METRICS, frontier
from speedrl_lab.whatif_plots import image_uri

COUNT = 8
"""Samples shown of a point."""
FORMATS = ("png", "svg", "html")
STYLE = """<style>.equal td, .equal th {padding: 1px 10px; text-align: right; white-space: nowrap; line-height: 1.5}
.equal td:first-child, .equal th:first-child {text-align: left} .equal .table {overflow-x: auto}</style>"""
SHORT = {"style": {"description_width": "5em"}, "layout": {"width": "24em"}}
Point = tuple[str, int]


class FrontierExplorer:
    """Controls over a frontier; `.box` is shown.

    `samples` is the frame of `contenders.score`, `field` its models, `folder` where exports go. `controls` holds x,
    judge, models, bands, point, rank, draw (training and sampling seed), pinned and format; `figure`, `equal` and
    `pictures` are what they act on. Hovering over a point shows its samples, a click pins it.
    """

    def __init__(self, samples: pd.DataFrame, field: Mapping[str, Contender], folder: Path | str):
        self.samples, self.field, self.folder = samples, field, Path(folder)
        self.table = frontier(samples)
        self.controls = controls(samples, self.table)
        self.figure = go.FigureWidget(self._fresh())
        self.figure.add_scatter(mode="markers", hoverinfo="skip", showlegend=False, marker={
            "size": 19, "symbol": "circle-open", "color": canvas.INK, "line": {"width": 2}})  # fmt: skip
        self.equal, self.pictures, self.exported = (ipywidgets.HTML() for _ in range(3))
        self.export_button = ipywidgets.Button(description="Export")
        self._errors = ipywidgets.Output()
        self._gallery = lru_cache(maxsize=256)(self._draw)
        safe = self._errors.capture()
        for names, act in (
            (("x", "judge", "models", "bands"), self.draw_figure), (("x", "judge", "models"), self.draw_table),
            (("x", "judge", "point"), self.mark), (("judge", "point", "rank", "draw"), self.draw_pictures),
        ):  # fmt: skip
            for name in names:
                self.controls[name].observe(safe(lambda change, act=act: act()), "value")
        for trace in self.figure.data[1:-1:2]:
            trace.on_click(safe(self._clicked))
            trace.on_hover(safe(self._hovered))
        self.export_button.on_click(safe(lambda button: self._export()))
        self.box = self._layout()
        for act in (self.draw_table, self.mark, self.draw_pictures):
            act()

    def _layout(self) -> ipywidgets.VBox:
        made = self.controls
        wrap = {"flex_flow": "row wrap"}
        left = ipywidgets.VBox([made["x"], made["judge"], ipywidgets.HBox([made["format"], self.export_button]),
                                made["bands"]])  # fmt: skip
        return ipywidgets.VBox([
            ipywidgets.HBox([left, made["models"]], layout=wrap), self.figure, self.exported, self.equal,
            ipywidgets.HBox([made["point"], made["rank"], made["draw"], made["pinned"]], layout=wrap),
            self.pictures, self._errors,
        ])  # fmt: skip

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """The widget, and the figure as a picture for whoever has no widgets."""
        return {**self.box._repr_mimebundle_(**kwargs), "image/png": plots.png(self._print())}

    @property
    def point(self) -> Point:
        """Model and budget whose samples are shown."""
        return self.controls["point"].value

    def _view(self) -> dict[str, Any]:
        return {name: self.controls[name].value for name in ("x", "models", "bands")}

    def _fresh(self) -> go.Figure:
        return frontier_plots.frontier(self.table, metric=self.controls["judge"].value, **self._view())

    def _print(self) -> Any:
        return frontier_plots.frontier_print(self.table, (self.controls["judge"].value,), **self._view())

    def draw_figure(self) -> None:
        """Move the lines of the figure to what the controls say."""
        fresh = self._fresh()
        with self.figure.batch_update():
            for old, new in zip(self.figure.data, fresh.data, strict=False):  # the last is the mark
                parts = ("x", "y", "visible") if new.name is None else ("x", "y", "visible", "text", "error_y")
                old.update({name: new[name] for name in parts}, overwrite=True)
            self.figure.layout.xaxis.update(fresh.layout.xaxis.to_plotly_json())
            self.figure.layout.yaxis.update(fresh.layout.yaxis.to_plotly_json())

    def draw_table(self) -> None:
        """What each model needs for the quality of the base, in the chosen cost and judge."""
        x, judge, models = (self.controls[name].value for name in ("x", "judge", "models"))
        title = f"{AXES[x].capitalize()} at equal {METRICS[judge].split(' (')[0]}"
        found = standings.equal_quality(self.samples, self.table, judge, x, models)
        rows = page.table(standings.readable(found, x)) if len(found) else "choose a model beside the base"
        self.equal.value = f'{STYLE}<div class="equal"><b>{html.escape(title)}</b>{rows}</div>'

    def mark(self) -> None:
        """Put a ring around the point whose samples are shown."""
        model, budget = self.point
        row = self.table[(self.table.model == model) & (self.table.budget == budget)].iloc[0]
        with self.figure.batch_update():
            self.figure.data[-1].update(x=[row[self.controls["x"].value]], y=[row[self.controls["judge"].value]])

    def draw_pictures(self) -> None:
        """Samples of the chosen point."""
        values = [self.controls[name].value for name in ("judge", "rank", "draw")]
        self.pictures.value = self._gallery(self.point, *values)

    def _draw(self, point: Point, judge: str, rank: str, draw: tuple[int, int]) -> str:
        model, budget = point
        part = self.samples[(self.samples.model == model) & (self.samples.budget == budget)]
        training = min(draw[0], part.training_seed.max())  # the base has one
        part = part[(part.training_seed == training) & (part.seed == draw[1])]
        rows = gallery.chosen(part, judge, rank, COUNT)
        return strip(rows, gallery.redraw(self.field, rows), judge)

    def _clicked(self, trace: Any, points: Any, state: Any) -> None:
        self.controls["pinned"].value = True
        self._select(trace, points)

    def _hovered(self, trace: Any, points: Any, state: Any) -> None:
        if not self.controls["pinned"].value:
            self._select(trace, points)

    def _select(self, trace: Any, points: Any) -> None:
        """Take the point of a line under the mouse; lines are sorted by cost, as they are drawn."""
        if points.point_inds:
            rows = self.table[self.table.model == trace.name].sort_values(self.controls["x"].value)
            self.controls["point"].value = (trace.name, int(rows.iloc[points.point_inds[0]].budget))

    def export(self) -> Path:
        """Write what is shown into the folder, in the chosen format; an existing file is never replaced."""
        kind, judge, x = (self.controls[name].value for name in ("format", "judge", "x"))
        stem, number = f"frontier-{judge}-{x}", 1
        while (path := self.folder / f"{stem}{'' if number == 1 else f'-{number}'}.{kind}").exists():
            number += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        if kind == "html":
            equal = standings.equal_quality(self.samples, self.table, judge, x, self.controls["models"].value)
            tables = {f"At equal {METRICS[judge].split(' (')[0]}": standings.readable(equal, x)}
            return page.write_page(path, {METRICS[judge]: self._fresh()}, tables, "Bands are 95% intervals.")
        partial = path.with_name(path.name + ".partial")
        self._print().savefig(partial, format=kind, dpi=192, bbox_inches="tight", transparent=True)
        return partial.replace(path)

    def _export(self) -> None:
        self.exported.value = html.escape(f"wrote {self.export()}")


def controls(samples: pd.DataFrame, table: pd.DataFrame) -> dict[str, Any]:
    """A widget for each thing that can be chosen."""
    models = list(dict.fromkeys(table.model))
    points = [
        (f"{row.model}, {row.forwards:.3g} passes", (row.model, int(row.budget)))
        for row in table.sort_values("forwards").sort_values("model", key=lambda m: m.map(models.index), kind="stable")
        .itertuples()
    ]  # fmt: skip
    draws = sorted({(int(t), int(s)) for t, s in zip(samples.training_seed, samples.seed, strict=True)})
    judges = [(label, name) for name, label in METRICS.items() if name in table]
    last = [value for _, value in points if value[0] == models[-1]]
    made: dict[str, Any] = {
        "x": ipywidgets.Dropdown(options=[(label, name) for name, label in AXES.items()], description="cost", **SHORT),
        "judge": ipywidgets.Dropdown(options=judges, description="judge", **SHORT),
        "models": ipywidgets.SelectMultiple(
            options=models, value=models, rows=min(8, len(models)), description="models", **SHORT
        ),
        "bands": ipywidgets.Checkbox(True, description="95% intervals", indent=False, layout={"width": "12em"}),
        "point": ipywidgets.Dropdown(options=points, value=last[len(last) // 2], description="point", **SHORT),
        "rank": ipywidgets.Dropdown(options=gallery.RANKS, description="samples", **_narrow(13)),
        "draw": ipywidgets.Dropdown(
            options=[(f"training {t}, seed {s}", (t, s)) for t, s in draws], description="drawn by", **_narrow(19)
        ),
        "pinned": ipywidgets.ToggleButton(False, description="pinned", tooltip="hovering changes nothing"),
        "format": ipywidgets.Dropdown(options=FORMATS, description="export as", **_narrow(13)),
    }
    made["draw"].disabled = len(draws) == 1
    return made


def _narrow(width: int) -> dict[str, Any]:
    return {"style": {"description_width": "5em"}, "layout": {"width": f"{width}em"}}


def strip(rows: pd.DataFrame, pictures: Any, judge: str) -> str:
    """HTML of pictures with their prompts and scores, enlarged by whole pixels."""
    cells = []
    for row, picture in zip(rows.to_dict("records"), pictures, strict=True):
        uri = image_uri((picture.clamp(0, 1) * 255).round().byte())
        scores = [f"{row[judge]:.3g}" if judge not in ("psnr", *SET_METRICS) else "", f"{row['psnr']:.1f} dB"]
        text = f"{html.escape(row['prompt'])}<br>{', '.join(score for score in scores if score)}"
        cells.append(
            f'<div style="width:96px;font-size:80%;line-height:1.25"><img src="{uri}" alt="" width="96" '
            f'style="image-rendering:pixelated;max-width:none;margin:0">{text}</div>'
        )
    return f'<div style="display:flex;flex-wrap:wrap;gap:8px">{"".join(cells)}</div>'
