"""A filter over runs for a notebook: type, and table, differing settings and curves follow."""

from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets
import plotly.graph_objects as go

from speedrl_lab import comparison, page, report
from speedrl_lab.comparison import RunFolder

STYLE = """<style>.runs td, .runs th {padding: 1px 10px; text-align: right; white-space: nowrap; line-height: 1.5}
.runs td:first-child, .runs th:first-child {text-align: left} .runs .table {overflow-x: auto}</style>"""


def run_browser(runs: Sequence[RunFolder], text: str = "") -> ipywidgets.VBox:
    """Filter runs as `comparison.matching` does.

    Children: a row of the filter and its message, the table, the differing settings, the curves, errors.
    """
    box = ipywidgets.Text(
        text, description="filter", placeholder="speed_weight=0.5 or part of a name or card", continuous_update=False,
        layout={"width": "32em"},
    )  # fmt: skip
    message, cards, settings = ipywidgets.Label(), ipywidgets.HTML(), ipywidgets.HTML()
    errors = ipywidgets.Output()
    curves = go.FigureWidget(comparison.overlay(runs))

    @errors.capture()
    def show(change: Mapping[str, Any]) -> None:
        try:
            chosen = comparison.matching(runs, change["new"])
        except ValueError as error:
            message.value = str(error)
            return
        names = {run.name for run in chosen}
        message.value = f"{len(chosen)} of {len(runs)} runs"
        cards.value = _styled(page.table(comparison.shown(comparison.table(chosen)))) if chosen else ""
        settings.value = _styled(report.differences(chosen)) if len(chosen) > 1 else ""
        with curves.batch_update():
            for trace in curves.data:
                trace.visible = trace.meta in names

    box.observe(show, "value")
    show({"new": text})
    return ipywidgets.VBox([ipywidgets.HBox([box, message]), cards, settings, curves, errors])


def _styled(table: str) -> str:
    return f'{STYLE}<div class="runs">{table}</div>'
