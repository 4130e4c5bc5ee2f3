"""One HTML page of figures and tables that needs nothing else, online or off.

`write_page` makes one of named figures and tables; `write_parts` takes the pieces below in any order.
"""

import base64
import html
from collections.abc import Mapping, Sequence
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
img {{ max-width: 100%; image-rendering: pixelated; }} figure {{ margin: 1rem 0; }}
summary {{ cursor: pointer; }} details {{ margin: 1rem 0; }} pre {{ overflow-x: auto; font-size: .85rem; }}
a {{ color: light-dark(#0b5cad, #7db8f0); }} figcaption {{ font-size: .85rem; opacity: .75; }}
.table {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }}
th, td {{ padding: .3rem .5rem; text-align: right; border-bottom: 1px solid light-dark(#d8dbe0, #3a3f45); }}
td, th:first-child {{ white-space: nowrap; }} th {{ vertical-align: bottom; }}
th:first-child, td:first-child {{ text-align: left; }}
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
    parts = [paragraphs(text)]
    for name, figure in figures.items():
        parts += [heading(name), embedded(figure, name)]
    for name, frame in (tables or {}).items():
        parts += [heading(name), table(frame)]
    return write_parts(path, parts, title)


def write_parts(path: Path | str, parts: Sequence[str], title: str) -> Path:
    """Write one HTML page of pieces of HTML, with plotly.js in it once if a piece is a plotly figure."""
    path, body = Path(path), "\n".join(part for part in parts if part)
    script = f"\n<script>{get_plotlyjs()}</script>" if "plotly-graph-div" in body else ""
    write_atomic(path, PAGE.format(title=html.escape(title), script=script, body=body))
    return path


def paragraphs(text: str) -> str:
    """Text as paragraphs, which an empty line separates."""
    parts = [part for part in text.split("\n\n") if part.strip()]
    return "\n".join(f"<p>{html.escape(' '.join(part.split()))}</p>" for part in parts)


def heading(text: str, anchor: str = "") -> str:
    """A heading, with a name that a link `#anchor` finds."""
    place = f' id="{html.escape(anchor)}"' if anchor else ""
    return f"<h2{place}>{html.escape(text)}</h2>"


def table(frame: pd.DataFrame, index: bool = False, header: bool = True, anchors: Sequence[str] = ()) -> str:
    """A table that scrolls sideways where it is too wide; with anchors, texts whose first column are links."""
    if anchors:
        frame = frame.map(html.escape)
        frame[frame.columns[0]] = [
            f'<a href="#{html.escape(anchor)}">{text}</a>'
            for text, anchor in zip(frame[frame.columns[0]], anchors, strict=True)
        ]
    rows = frame.to_html(
        index=index, header=header, border=0, float_format="{:.3g}".format, na_rep="-", escape=not anchors
    )
    return f'<div class="table">{rows}</div>'


def folded(summary: str, content: str, shown: bool = False) -> str:
    """A piece that a click opens."""
    return f"<details{' open' if shown else ''}><summary>{html.escape(summary)}</summary>\n{content}\n</details>"


def preformatted(text: str) -> str:
    """Text as it stands."""
    return f"<pre>{html.escape(text)}</pre>"


def picture(data: bytes, kind: str, caption: str) -> str:
    """An image file of the kind `png`, `jpeg`, `gif` or `svg+xml` inside the page."""
    source, text = base64.b64encode(data).decode(), html.escape(caption)
    image = f'<img alt="{text}" src="data:image/{kind};base64,{source}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def embedded(figure: Figure | go.Figure, name: str) -> str:
    """A figure inside the page: plotly stays interactive, matplotlib is a picture."""
    if isinstance(figure, go.Figure):
        return figure.to_html(
            full_html=False, include_plotlyjs=False, config={"responsive": True, "displaylogo": False}
        )
    data = base64.b64encode(png(figure)).decode()
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'
