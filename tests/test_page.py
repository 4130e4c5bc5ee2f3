"""Pages need nothing else: no network, no neighbour files."""

import pandas as pd

from speedrl_lab import plots
from speedrl_lab.page import write_page

RECORD = {"iteration": 1, "rewards": {"clip": 0.5, "speed": -0.1}, "steps": 4.0, "kl": 0.0, "diversity": 0.3}
TABLE = pd.DataFrame(
    {"model": "base", "budget": budget, "forwards": budget, "accuracy": budget / 10, "kid": 1 / budget}
    for budget in (1, 2, 4)
)


def test_page_is_self_contained(tmp_path):
    figures = {"Quality <now>": plots.frontier(TABLE), "Again": plots.frontier(TABLE, metric="kid")}
    figures["Training"] = plots.curves([RECORD])
    table = pd.DataFrame({"model": ["base"], "passes": [4.0]})
    path = write_page(tmp_path / "page.html", figures, {"Passes": table}, "One & two.\n\nThree.")
    text = path.read_text()
    assert text.count("plotly.js v") == 1  # the library, once
    assert text.count("<h2>") == 4 and "<h2>Quality &lt;now&gt;</h2>" in text
    assert "<p>One &amp; two.</p>\n<p>Three.</p>" in text
    assert 'alt="Training" src="data:image/png;base64,' in text
    body = text[text.index("</script></head>") :]
    assert "http" not in body.replace("https://plot.ly", "")
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_a_page_without_interactive_figures_stays_small(tmp_path):
    path = write_page(tmp_path / "page.html", {"Training": plots.curves([RECORD])})
    assert path.stat().st_size < 300_000
