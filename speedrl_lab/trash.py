"""Delete a run safely: its folder moves to `.trash` below the outputs, and comes back by moving it.

Only a folder that holds a run and nothing else is taken, never a link, and never a run that may still be going on.
"""

import os
import time
from pathlib import Path

from speedrl_lab.comparison import folders, last_change, name_of
from speedrl_lab.config import nearest
from speedrl_lab.events import PREFIX
from speedrl_lab.runs import outputs_root

TRASH = ".trash"
FILES = ("config.json", "metrics.jsonl", "checkpoint.pt", "policy.safetensors", "rollouts.pt", "card.md")
RESULTS = (".csv", ".html", ".png", ".svg", ".gif", ".jpg", ".ipynb", ".partial")
PICTURES = ("figures", "samples")
"""Folders that a run may hold."""
QUIET = 600.0  # seconds without a record after which a run is taken for ended


def delete(name: str | Path, force: bool = False) -> Path:
    """Move the run of that name below `outputs_root()` to `.trash/<name>`, and return where it is now.

    Raises:
        FileNotFoundError: no such run; names the nearest.
        ValueError: a folder outside the root or behind a link, or one that holds other things than a run's files.
        OSError: the run's records changed in the last minutes, and `force` is False; or nothing can be moved there.
    """
    root = outputs_root()
    path = root / name
    if ".." in path.parts or not path.is_relative_to(root) or path == root:
        raise ValueError(f"{name} is not a run below {root}")
    inside = path.relative_to(root)
    if inside.parts[0] == TRASH:
        raise ValueError(f"{name} is deleted already; {emptying()}")
    places = [root / Path(*inside.parts[:depth]) for depth in range(1, len(inside.parts) + 1)]
    if links := [place for place in places if place.is_symlink()]:
        raise ValueError(f"{links[0]} is a link; links are not followed")
    if not (path / "config.json").is_file():
        known = [name_of(folder) for folder in folders(root)]
        hint = f"; nearest: {nearest(str(inside), known)!r}" if known else ""
        raise FileNotFoundError(f"no run {str(inside)!r} (a folder with config.json) below {root}{hint}")
    if (other := foreign(path)) is not None:
        raise ValueError(f"{path} holds {other.relative_to(path)}, which is no file of a run; move that away first")
    idle = time.time() - last_change(path)
    if idle < QUIET and not force:
        raise OSError(f"run {inside} changed {idle:.0f} seconds ago and may be going on; stop it, or --force")
    target = _free(root / TRASH / inside)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.parent.resolve() != target.parent:
        raise ValueError(f"{target.parent} leads through a link; links are not followed")
    path.rename(target)
    return target


def emptying() -> str:
    """How to get a run back, and how to erase for good."""
    trash = outputs_root() / TRASH
    return f"to get it back, move it out of {trash}; to erase everything there for good: rm -r '{trash}'"


def foreign(path: Path) -> Path | None:
    """The first thing in a run folder that is no file of a run, if there is one."""
    for entry in sorted(path.iterdir()):
        if entry.is_symlink():
            return entry
        if entry.is_dir():
            inner = sorted(entry.iterdir()) if entry.name in PICTURES else [entry]
            odd = [file for file in inner if file.is_symlink() or file.is_dir() or file.suffix not in RESULTS]
            if odd:
                return odd[0]
        elif not (entry.name in FILES or entry.name.startswith(PREFIX) or entry.suffix in RESULTS):
            return entry
    return None


def _free(path: Path) -> Path:
    """The path, or the first `<path>-2`, `<path>-3`, ... that is not there."""
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
