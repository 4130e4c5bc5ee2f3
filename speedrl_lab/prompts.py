"""Prompts from files of the user's own: one a line, tables (DrawBench, PartiPrompts), JSON lines (GenEval)."""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speedrl_lab import scenes
from speedrl_lab.config import nearest

ENDINGS = (".txt", ".jsonl", ".tsv", ".csv")
COLUMNS = ("prompt", "prompts", "caption", "text")
"""Names of the column, or key, that holds the prompt, whatever their case; the first one found."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, what its file says of it, and the line it stands in (from 1)."""

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    line: int = 0


def load_prompts(split: str = "test", count: int | None = None) -> list[str]:
    """The prompts of a committed split of EmojiScenes, or of a file by path: all or the first `count`.

    Raises as `scenes.load_prompts` and `read_prompts`, and ValueError where there are too few.
    """
    path = Path(split)
    if split in scenes.SPLITS or (path.suffix not in ENDINGS and not path.is_file()):
        return scenes.load_prompts(split, count)
    prompts = [prompt.text for prompt in read_prompts(path)]
    if count is not None and not 0 < count <= len(prompts):
        raise ValueError(f"asked for {count} prompts; {path.name} holds {len(prompts)}")
    return prompts[:count]


def read_prompts(path: Path | str) -> list[Prompt]:
    """All prompts of a file in its order, each text once: .txt, .jsonl, .tsv or .csv.

    A .txt has one prompt a line, a .jsonl one object a line with the key `prompt`, a table a header with
    such a column; everything else in a line becomes metadata. Blank lines are skipped and repetitions
    dropped, since a group of samples belongs to a text. Raises FileNotFoundError, or ValueError in one
    line with the number of the line: no prompt, broken JSON or UTF-8, one text with two sets of metadata.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file {path}; expected one prompt a line (.txt), .jsonl, .tsv or .csv")
    if path.suffix not in ENDINGS:
        raise ValueError(
            f"prompt file {path} ends in {path.suffix!r}; nearest: {nearest(path.suffix, list(ENDINGS))!r} "
            f"(one of {', '.join(ENDINGS)})"
        )
    found: dict[str, Prompt] = {}
    for prompt in _READERS[path.suffix](path):
        first = found.setdefault(prompt.text, prompt)
        if first.metadata != prompt.metadata and path.suffix == ".jsonl":
            raise ValueError(
                f"{path} line {prompt.line}: prompt {prompt.text!r} stands in line {first.line} with other metadata; "
                "keep one of them"
            )
    if not found:
        raise ValueError(f"{path} holds no prompts; expected at least one")
    return list(found.values())


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without a byte order mark; ValueError that names the line which is not UTF-8."""
    for number, raw in enumerate(path.read_bytes().splitlines(), 1):
        try:
            yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} line {number}: not UTF-8 ({error.reason}); save the file as UTF-8") from None


def _read_text(path: Path) -> Iterator[Prompt]:
    for number, line in _lines(path):
        if line.strip():
            yield Prompt(line.strip(), line=number)


def _read_json_lines(path: Path) -> Iterator[Prompt]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number}: no JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} line {number}: a {type(values).__name__}; expected an object with a 'prompt'")
        yield _prompt(path, number, values, _column(path, number, list(values)))


def _read_table(path: Path) -> Iterator[Prompt]:
    lines = [line for _, line in _lines(path)]
    rows = csv.reader((line + "\n" for line in lines), delimiter="\t" if path.suffix == ".tsv" else ",")
    header: list[str] | None = None
    while True:
        number = rows.line_num + 1  # of the first line of a row; quoted cells may span several
        row = next(rows, None)
        if row is None:
            return
        if not any(cell.strip() for cell in row):
            continue
        if header is None:
            header = [cell.strip() for cell in row]
            column = _column(path, number, header)
        elif len(row) > len(header):
            raise ValueError(f"{path} line {number}: {len(row)} cells under {len(header)} columns; quote the prompt")
        else:
            yield _prompt(path, number, dict(zip(header, row, strict=False)), column)


_READERS = {".txt": _read_text, ".jsonl": _read_json_lines, ".tsv": _read_table, ".csv": _read_table}


def _column(path: Path, number: int, names: list[str]) -> str:
    """The name that holds the prompt; ValueError where there is none."""
    by_lower = {name.lower(): name for name in reversed(names)}
    for wanted in COLUMNS:
        if wanted in by_lower:
            return by_lower[wanted]
    raise ValueError(f"{path} line {number}: no 'prompt' among {', '.join(map(repr, names)) or 'no names'}")


def _prompt(path: Path, number: int, values: dict[str, Any], column: str) -> Prompt:
    text = values.get(column)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{path} line {number}: {column}={text!r}; expected words")
    return Prompt(text.strip(), {name: value for name, value in values.items() if name != column}, number)
