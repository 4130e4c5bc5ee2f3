"""Runs as one HTML page that a person can mail: cards, differing settings, curves, pictures, results.

The page needs no network and no neighbour files. It holds what the run folders hold; nothing is computed anew.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from speedrl_lab import comparison, page, plots
from speedrl_lab.comparison import RunFolder
from speedrl_lab.runs import outputs_root

KINDS = {".png": "png", ".jpg": "jpeg", ".gif": "gif", ".svg": "svg+xml"}
PICTURES = 4
"""Most pictures of a run on the page, the last by name: samples are numbered by iteration."""
LARGEST = 2_000_000
"""Bytes; larger pictures stay out, a page is to be mailed."""
ROWS = 60
"""Longer results tables stay out."""
UNFOLDED = 4
"""Run cards are folded on a page of more runs."""
LONGEST_VALUE = 48  # characters of a setting in a table


def write(places: Iterable[str | Path] = (), path: Path | str | None = None) -> Path:
    """Write the page of the runs at and below some folders (all runs, where none is given) and return its path.

    Args:
        path: a file that does not exist; `outputs/09_report/<UTC time>/report.html` where it is not given.

    Raises:
        FileNotFoundError: no run there; names the nearest.
        FileExistsError: the file exists; it is left alone.
        OSError: the folder cannot be written.
    """
    stamp = datetime.now(UTC)
    path = Path(path) if path is not None else outputs_root() / "09_report" / f"{stamp:%Y%m%dT%H%M%SZ}" / "report.html"
    if path.exists():
        raise FileExistsError(f"{path} exists and is not overwritten; choose another --output")
    runs = comparison.find(places)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return page.write_parts(path, list(parts(runs, stamp)), title(runs))
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}; choose another --output") from None


def title(runs: Sequence[RunFolder]) -> str:
    """What the page is called."""
    return f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs side by side"


def parts(runs: Sequence[RunFolder], stamp: datetime) -> Iterator[str]:
    """The pieces of the page: an overview of all runs, then each run by itself."""
    drawn = [run for run in runs if not run.records.empty]
    yield page.paragraphs(
        f"Written {stamp:%Y-%m-%d %H:%M} UTC by speedrl_lab, the workbench for Speed-RL (arXiv 2512.01094).\n\n"
        "Numbers are means over the last fifth of a run's iterations, on training prompts; steps are rounds of "
        "unmasking an image. What counts is measured on other prompts: see the results of a run, where it has them."
    )
    yield page.table(comparison.shown(comparison.table(runs)), anchors=[anchor(run) for run in runs])
    if len(drawn) > 1:
        yield page.heading("Settings that differ")
        yield differences(drawn)
    if drawn:
        yield page.heading("Training curves")
        yield page.paragraphs(
            f"Running means of {comparison.SMOOTHING} iterations. Click a name to hide its run, twice to see it alone."
        )
        yield page.embedded(comparison.overlay(drawn), "Training curves")
    for run in runs:
        yield from _run_parts(run, unfolded=len(runs) <= UNFOLDED)


def differences(runs: Sequence[RunFolder]) -> str:
    """The settings that differ between trained runs as an HTML table, the shorter side across."""
    frame = comparison.differing(runs)
    if frame.columns.empty:
        return "<p>None.</p>"
    frame = frame.map(lambda value: comparison.shortened(str(value), LONGEST_VALUE) or "(empty)")
    frame.index = comparison.labels(runs)
    if len(frame.columns) > len(frame):
        return page.table(frame.T.rename_axis("setting").reset_index())
    return page.table(frame.rename_axis("run").reset_index())


def _run_parts(run: RunFolder, unfolded: bool) -> Iterator[str]:
    """Card, pictures, results and all settings of one run."""
    yield page.heading(run.name, anchor(run))
    facts = re.findall(r"^- \*\*(.+?)\*\*: (.*)$", run.card, re.MULTILINE)
    if facts:
        yield page.folded("Run card", page.table(pd.DataFrame(facts), header=False), shown=unfolded)
    elif not run.records.empty:
        yield page.paragraphs(f"{len(run.records)} of {run.asked} iterations; a run card is written at the end.")
    for file in pictures(run.path):
        yield page.picture(file.read_bytes(), KINDS[file.suffix], str(file.relative_to(run.path)))
    for file in sorted(run.path.glob("*.csv")):
        yield from _results(file)
    yield page.folded("All settings", page.preformatted(json.dumps(run.settings, indent=1)))


def pictures(folder: Path) -> list[Path]:
    """The last PICTURES images of a run folder, its `figures/` and `samples/`."""
    files = [file for place in (".", "figures", "samples") for file in sorted((folder / place).glob("*"))]
    usable = [file for file in files if file.suffix in KINDS and file.is_file() and file.stat().st_size <= LARGEST]
    return usable[-PICTURES:]


def _results(file: Path) -> Iterator[str]:
    """A results table, with its figure where it is a frontier; a long one is only named."""
    try:
        frame = pd.read_csv(file)
    except ValueError as error:
        yield page.paragraphs(f"{file.name} cannot be read: {error}")
        return
    if len(frame) > ROWS:
        yield page.paragraphs(f"{file.name}: {len(frame)} rows, in the run folder.")
        return
    if {"model", "budget", "forwards", "accuracy"} <= set(frame):
        yield page.embedded(plots.frontier(frame), file.stem)
    yield page.folded(f"{file.name}, {len(frame)} rows", page.table(frame), shown=len(frame.columns) <= 10)


def anchor(run: RunFolder) -> str:
    """The run's name in letters that a link may have, another one for each name."""
    return re.sub(r"[\W_]", lambda found: f"_{ord(found[0]):x}_", run.name)
