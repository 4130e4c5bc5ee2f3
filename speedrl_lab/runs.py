"""One folder a run: config.json, metrics.jsonl, event files, checkpoint.pt, policy.safetensors, card.md.

Files are written to a temporary name and moved into place, so none is ever half-written; an existing
run is gone on with or refused, never overwritten.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speedrl_lab.events import EventFile

if TYPE_CHECKING:  # loaded where they are used: the command line needs no more of this module than the folder's name
    import pandas as pd
    import torch

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT_VERSION = 2


def outputs_root() -> Path:
    """The folder of all runs: $SPEEDRL_OUTPUTS, or `outputs` beside the package."""
    return Path(os.environ.get("SPEEDRL_OUTPUTS") or ROOT / "outputs").resolve()


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that readers see the old or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors and plain values so that readers see the old or the new file, never a part."""
    import torch

    partial = path.with_suffix(".partial")
    torch.save(dict(state), partial)
    partial.replace(path)


def read_checkpoint(path: Path, device: "torch.device | str" = "cpu") -> Any:
    """What `write_checkpoint` wrote, no pickled code; ValueError in one line for a truncated or foreign file."""
    import torch

    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is truncated or no checkpoint: {reason}") from None


class Run:
    """A run folder that is open for writing."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings = path, settings
        self._events: EventFile | None = None

    @classmethod
    def open(cls, name: str | Path, settings: Mapping[str, Any], resume: bool = False) -> "Run":
        """Create outputs/<name> (or the given absolute folder), or go on with it when `resume` is True.

        Raises FileExistsError when the run exists and `resume` is False, ValueError when it was started
        with other settings, and OSError in one line when the folder cannot be written.
        """
        path = Path(name) if Path(name).is_absolute() else outputs_root() / name
        settings = json.loads(json.dumps(dict(settings), default=dict))
        described = path / "config.json"
        if described.is_file():
            if not resume:
                raise FileExistsError(f"run {path} exists; go on with resume=True, or choose another run name")
            before = json.loads(described.read_text())
            changed = sorted(key for key in before | settings if before.get(key) != settings.get(key))
            if changed:
                key = changed[0]
                raise ValueError(
                    f"run {path} was started with {key}={before.get(key)!r}, now {settings.get(key)!r}; "
                    "resume with the same settings, or choose another run name"
                )
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_atomic(described, json.dumps(settings, indent=1) + "\n")
        except OSError as error:
            raise OSError(f"cannot write run folder {path}: {error.strerror}; set SPEEDRL_OUTPUTS") from None
        return cls(path, settings)

    @property
    def metrics(self) -> Path:
        """The file of records, one JSON object a line."""
        return self.path / "metrics.jsonl"

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a record to metrics.jsonl, and its numbers to the event file of this session (TensorBoard)."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(record, default=float) + "\n")
        if self._events is None:
            self._events = EventFile(self.path, record["iteration"])
        self._events.write(record)

    def records(self) -> "pd.DataFrame":
        """All records so far, nested rewards as `rewards.<name>` columns."""
        import pandas as pd

        return pd.json_normalize(self._read())

    def _read(self) -> list[dict[str, Any]]:
        """The records on disk; a last line that a kill cut short is left out."""
        lines = self.metrics.read_text().splitlines() if self.metrics.is_file() else []
        records = []
        for number, line in enumerate(lines, 1):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                if number < len(lines):
                    raise ValueError(f"{self.metrics} is broken in line {number}; remove that line") from None
        return records

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write checkpoint.pt: tensors and plain values only, no pickled code."""
        write_checkpoint(self.path / "checkpoint.pt", {"version": CHECKPOINT_VERSION, **state})

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint or None; drops records written after it. ValueError for a broken file.

        Of several processes that train together all read, and the main one drops.
        """
        from speedrl_lab import parallel

        self._events = None  # what comes next replaces what was logged after the checkpoint
        path = self.path / "checkpoint.pt"
        if not path.is_file():
            if parallel.is_main():
                self.metrics.unlink(missing_ok=True)  # of a run that ended before its first checkpoint
            return None
        state = read_checkpoint(path)
        if not isinstance(state, dict) or state.get("version") != CHECKPOINT_VERSION:
            raise ValueError(f"{path} is not a version {CHECKPOINT_VERSION} checkpoint of this project")
        if self.metrics.is_file() and parallel.is_main():
            kept = [record for record in self._read() if record["iteration"] <= state["iteration"]]
            write_atomic(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))
        return state

    def write_card(self, facts: Mapping[str, Any]) -> Path:
        """Write card.md, the run's facts and settings for people."""
        lines = [f"# Run `{self.path.name}`", ""]
        lines += [f"- **{name}**: {value}" for name, value in facts.items()]
        lines += ["", "Settings:", "", "```json", json.dumps(self.settings, indent=1), "```", ""]
        write_atomic(self.path / "card.md", "\n".join(lines))
        return self.path / "card.md"
