"""One HTML page of figures and tables that needs nothing else, online or off."""

import base64
import html
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from matplotlib.figure import Figure
from plotly.offline import get_plotlyjs

from speedrl_lab.plots import png
from speedrl_lab.runs import write_atomic

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  background: light-dark(#fff, #16181b); color: light-dark(#1c1e21, #dfe2e6); }}
h1, h2 {{ line-height: 1.25; }} h2 {{ margin-top: 2.5rem; }}
img {{ max-width: 100%; }}
.table {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }}
th, td {{ padding: .3rem .8rem; text-align: right; border-bottom: 1px solid light-dark(#d8dbe0, #3a3f45); }}
th, td {{ white-space: nowrap; }} th:first-child, td:first-child {{ text-align: left; }}
</style>{script}</head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def write_page(
    path: Path | str,
    figures: Mapping[str, Figure | go.Figure],
    tables: Mapping[str, pd.DataFrame] | None = None,
    text: str = "",
    title: str = "Quality against speed",
) -> Path:
    """Write one HTML page that needs nothing else, online or off; returns its path.

    Paragraphs of `text` are separated by an empty line. Each figure and table gets its heading.
    """
    path = Path(path)
    paragraphs = [part for part in text.split("\n\n") if part.strip()]
    parts = [f"<p>{html.escape(' '.join(part.split()))}</p>" for part in paragraphs]
    for name, figure in figures.items():
        parts.append(f"<h2>{html.escape(name)}</h2>\n{_embedded(figure, name)}")
    for name, table in (tables or {}).items():
        rows = table.to_html(index=False, border=0, float_format="{:.3g}".format, na_rep="-")
        parts.append(f'<h2>{html.escape(name)}</h2>\n<div class="table">{rows}</div>')
    interactive = any(isinstance(figure, go.Figure) for figure in figures.values())
    script = f"\n<script>{get_plotlyjs()}</script>" if interactive else ""
    write_atomic(path, PAGE.format(title=html.escape(title), script=script, body="\n".join(parts)))
    return path


def _embedded(figure: Figure | go.Figure, name: str) -> str:
    if isinstance(figure, go.Figure):
        return figure.to_html(
            full_html=False, include_plotlyjs=False, config={"responsive": True, "displaylogo": False}
        )
    data = base64.b64encode(png(figure)).decode()
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'
