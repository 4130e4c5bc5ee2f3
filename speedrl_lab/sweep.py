"""Sweep a notebook: every combination of knob values is a trial, run by the strict runner in its own process.

    outputs/<name>/sweep.json    notebook, knobs, trials
    outputs/<name>/table.csv     one row a trial, written anew whenever a trial ends
    outputs/<name>/<trial>/      executed notebook, log.txt, run/ (the notebook's run folder), failure.json

Called again with the same name, a sweep skips finished trials and goes on with the others. Processes hold
a lock on sweep.json (POSIX), so no trial is ever run twice at once, not even after a killed sweep.
"""

import fcntl
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import pandas as pd
from tqdm import tqdm

from speedrl_lab import notebooks
from speedrl_lab.runs import Run, outputs_root, write_atomic

DESCRIBED, TABLE, LOG, FAILURE = "sweep.json", "table.csv", "log.txt", "failure.json"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
LONGEST_NAME = 120  # characters of a trial's folder name
PATIENCE = 15.0  # seconds between asking a child to end and killing it


class Trial(NamedTuple):
    """One combination: its folder name (what differs between trials) and all its knobs."""

    name: str
    knobs: dict[str, Any]


def parse_assignment(text: str) -> tuple[str, list[Any]]:
    """Split `name=value,value,...` at the commas that are outside brackets and quotes.

    Values are Python literals or bare words; ValueError for an unclear or missing one.
    """
    name, _, raw = text.partition("=")
    parts = _split(raw)
    if len(parts) > 1 and "" in parts:
        raise ValueError(f"{text!r}: a value is missing beside a comma")
    return name.strip(), [notebooks.parse_assignment(f"{name}={part}")[1] for part in parts]


def plan(notebook: str | Path, knobs: Mapping[str, Sequence[Any]]) -> list[Trial]:
    """Every combination of the knobs' values, checked as `notebooks.run` would; nothing is started.

    Args:
        knobs: knob -> list of its values; a knob with one value is the same in all trials.

    Raises:
        TypeError: unknown or mistyped knob, or values that are not in a list.
        ValueError: a value given twice, none at all, or one that no configuration allows.
    """
    path = notebooks.notebook_path(notebook)
    for name, values in knobs.items():
        _check_values(name, values)
    own = knobs.keys() & _run_knobs(path, "")
    if own:
        raise ValueError(f"{min(own)} is set by the sweep, one run folder a trial; leave it out")
    chosen = [dict(zip(knobs, values, strict=True)) for values in product(*knobs.values())]
    for values in chosen:
        notebooks.resolved(path, values)
    varied = [name for name in knobs if len(knobs[name]) > 1]
    names = [",".join(f"{name}={_word(values[name])}" for name in varied) for values in chosen]
    unclear = {name for name in names if not name or len(name) > LONGEST_NAME or names.count(name) > 1}
    return [
        Trial(f"trial-{number}" if name in unclear else name, values)
        for number, (name, values) in enumerate(zip(names, chosen, strict=True), start=1)
    ]


def run(
    notebook: str | Path, knobs: Mapping[str, Sequence[Any]], name: str | None = None, workers: int = 2
) -> pd.DataFrame:
    """Execute the unfinished trials of outputs/<name>, `workers` at a time, and return the table.

    A failed trial is a row of the table; the rest goes on. A trial gets cores/workers threads, and no
    more than OMP_NUM_THREADS where that is set.

    Args:
        name: `sweep/<UTC time>` where it is not given; give it again to go on with a sweep.

    Raises:
        TypeError, ValueError: what `plan` raises, or other settings than the sweep was started with.
        FileExistsError: the folder is there and is no sweep.
        OSError: the folder cannot be written, or the sweep is running already.
        KeyboardInterrupt: after the running trials were stopped; the same call goes on.
    """
    if workers < 1:
        raise ValueError(f"workers={workers}: expected at least 1")
    path = notebooks.notebook_path(notebook).resolve()
    name = name or f"sweep/{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    folder = outputs_root() / name
    trials = _open(folder, path, knobs)
    tqdm.write(f"sweep folder: {folder}")
    with (folder / DESCRIBED).open() as lock:
        _lock(lock, folder)
        environment = {**os.environ, **dict.fromkeys(THREADS, str(_threads(workers))), "PYTHONUNBUFFERED": "1"}
        try:
            _work(path, name, trials, workers, environment, lock.fileno())
        except KeyboardInterrupt:
            tqdm.write(f"sweep stopped; go on with the same command and --name {name}")
            raise
        finally:
            frame = _write_table(folder)
    counts = frame.status.value_counts()
    tqdm.write(
        f"{counts.get('done', 0)} of {len(frame)} trials done, {counts.get('failed', 0)} failed: {folder / TABLE}"
    )
    return frame


def table(folder: str | Path) -> pd.DataFrame:
    """One row a trial (its index) of the sweep in outputs/<folder>, or in the given absolute folder.

    Columns: the varied knobs; status (done, failed, waiting); seconds of the last attempt; for every
    numeric column of run/metrics.jsonl `<column>_last` and `<column>_mean`, over the last fifth of the
    records; error. FileNotFoundError where there is no sweep.
    """
    folder = outputs_root() / folder
    if not (folder / DESCRIBED).is_file():
        raise FileNotFoundError(f"{folder} is no sweep: it has no {DESCRIBED}")
    described = json.loads((folder / DESCRIBED).read_text())
    varied = [name for name, values in described["knobs"].items() if len(values) > 1]
    file = Path(described["notebook"]).stem + ".ipynb"
    rows = [
        {name: knobs[name] for name in varied} | _result(folder / trial, file) | _metrics(folder / trial / "run")
        for trial, knobs in described["trials"].items()
    ]
    frame = pd.DataFrame(rows, index=pd.Index(described["trials"], name="trial"))
    return frame[[column for column in frame if column != "error"] + ["error"]]


def _work(
    path: Path, name: str, trials: Sequence[Trial], workers: int, environment: Mapping[str, str], lock: int
) -> None:
    """Keep `workers` children busy until all trials are finished or failed; leaves none behind."""
    folder = outputs_root() / name
    waiting = [trial for trial in trials if not _finished(folder / trial.name / path.name)]
    running: dict[subprocess.Popen, tuple[Path, float]] = {}
    with tqdm(total=len(trials), initial=len(trials) - len(waiting), desc="trials") as bar:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    trial = waiting.pop(0)
                    knobs = trial.knobs | _run_knobs(path, f"{name}/{trial.name}/run")
                    place, began = folder / trial.name, time.monotonic()
                    _make_room(place, path.name)
                    running[_start(_command(path, knobs, place), place, environment, lock)] = place, began
                time.sleep(0.1)
                for process in [process for process in running if process.poll() is not None]:
                    place, began = running.pop(process)
                    _settle(place, path.name, process.returncode, time.monotonic() - began)
                    _write_table(folder)
                    bar.update()
        finally:
            _stop(running)


def _command(path: Path, knobs: Mapping[str, Any], output: Path) -> list[str]:
    assignments = [f"{name}={value!r}" for name, value in knobs.items()]
    return [sys.executable, "-m", "speedrl_lab", "run", str(path), *assignments, "--output", str(output)]


def _make_room(folder: Path, file: str) -> None:
    """Make a trial's folder; what an earlier attempt executed is moved aside."""
    folder.mkdir(exist_ok=True)
    (folder / FAILURE).unlink(missing_ok=True)
    executed, number = folder / file, 1
    while (aside := executed.with_name(f"{executed.stem}.attempt-{number}.ipynb")).exists():
        number += 1
    if executed.exists():
        executed.rename(aside)


def _start(command: Sequence[str], folder: Path, environment: Mapping[str, str], lock: int) -> subprocess.Popen:
    with (folder / LOG).open("a") as log:
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, pass_fds=[lock]
        )


def _settle(folder: Path, file: str, status: int, seconds: float) -> None:
    """Note why an ended trial is not finished."""
    if not _finished(folder / file):
        error = _reason(status, (folder / LOG).read_text(errors="replace"))
        write_atomic(folder / FAILURE, json.dumps({"seconds": round(seconds, 1), "error": error}) + "\n")
        tqdm.write(f"{folder.name}: {error}")


def _stop(processes: Iterable[subprocess.Popen]) -> None:
    """End children, and kill those that do not end in time; a kernel ends when its parent does."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _open(folder: Path, path: Path, knobs: Mapping[str, Sequence[Any]]) -> list[Trial]:
    """The trials of a new sweep, or of one that was started with the same settings."""
    trials = plan(path, knobs)  # raises before a folder is made
    described = folder / DESCRIBED
    own = path.parent != notebooks.NOTEBOOKS
    settings = {"notebook": str(path) if own else path.stem, "SPEEDRL_PRESET": os.environ.get("SPEEDRL_PRESET")}
    if described.is_file():
        before = json.loads(described.read_text())
        _check_same(folder, before, json.loads(json.dumps(settings | {"knobs": dict(knobs)})))
        return plan(path, {name: knobs[name] for name in before["knobs"]})  # names as before, in whatever order given
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} exists and is no sweep; choose another --name")
    settings |= {"knobs": dict(knobs), "trials": {trial.name: trial.knobs for trial in trials}}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(described, json.dumps(settings, indent=1) + "\n")
    except OSError as error:
        raise OSError(f"cannot write sweep folder {folder}: {error.strerror}; set SPEEDRL_OUTPUTS") from None
    return trials


def _check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    old, new = (side["knobs"] | {name: side[name] for name in ("notebook", "SPEEDRL_PRESET")} for side in (before, now))
    for name in old | new:
        if old.get(name) != new.get(name):
            raise ValueError(
                f"sweep {folder} was started with {name}={old.get(name)!r}, now {new.get(name)!r}; "
                "go on with the same settings, or choose another --name"
            )


def _lock(file: Any, folder: Path) -> None:
    """Lock an open file; children inherit the lock and hold it as long as they live."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(f"sweep {folder} is running, or trials of a killed one are; wait for them or end them") from None


def _finished(notebook: Path) -> dict[str, Any] | None:
    """papermill's notes in an executed notebook, if the kernel answered every cell and none with an error.

    papermill's own marks are not enough: to it, cells that an interrupt cut off are "completed".
    """
    if not notebook.is_file():
        return None
    try:
        content = nbformat.read(notebook, as_version=4)
    except ValueError:  # half-written
        return None
    cells = [cell for cell in content.cells if cell.cell_type == "code" and cell.source.strip()]
    answered = all("shell.execute_reply" in cell.metadata.get("execution", {}) for cell in cells)
    notes = content.metadata.get("papermill", {})
    return notes if answered and notes.get("end_time") and not notes.get("exception") else None


def _result(folder: Path, file: str) -> dict[str, Any]:
    """Status, seconds and error of a trial, from its files."""
    if notes := _finished(folder / file):
        return {"status": "done", "seconds": round(notes["duration"], 1), "error": ""}
    if (folder / FAILURE).is_file():
        return {"status": "failed", **json.loads((folder / FAILURE).read_text())}
    return {"status": "waiting", "seconds": float("nan"), "error": ""}


def _metrics(run_folder: Path) -> dict[str, float]:
    """Last value and mean over the last fifth of every numeric column of a run's records."""
    try:
        records = Run(run_folder, {}).records()
    except ValueError:  # a line torn by a kill
        return {}
    if records.empty:
        return {}
    numbers = records.select_dtypes("number")
    last, mean = numbers.iloc[-1], numbers.tail(max(1, len(numbers) // 5)).mean()
    return {f"{name}_{kind}": row[name] for name in numbers for kind, row in (("last", last), ("mean", mean))}


def _write_table(folder: Path) -> pd.DataFrame:
    frame = table(folder)
    write_atomic(folder / TABLE, frame.to_csv())
    return frame


def _reason(status: int, log: str) -> str:
    """One line on why a child ended, from its exit status and its output."""
    if status < 0:
        return f"killed by signal {-status}"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    said = [line.partition("speedrl_lab: ")[2] for line in lines if "speedrl_lab: " in line]
    if status == 2 and said:  # the runner's own words
        return said[-1]
    return f"exit status {status}, and the notebook is not complete: {lines[-1]}"


def _run_knobs(path: Path, run_folder: str) -> dict[str, Any]:
    """What makes a notebook keep its run in the trial's folder, where it declares how."""
    can = {"run", "resume"} <= notebooks.parameters(path).keys()
    return {"run": run_folder, "resume": True} if can else {}


def _check_values(name: str, values: Sequence[Any]) -> None:
    if not isinstance(values, list | tuple):
        raise TypeError(f"knob {name}={values!r}: expected a list of values")
    if not values:
        raise ValueError(f"knob {name}: no value is given")
    twice = [value for index, value in enumerate(values) if value in values[:index]]
    if twice:
        raise ValueError(f"knob {name}: value {twice[0]!r} is given twice")


def _split(text: str) -> list[str]:
    """Parts between the commas outside brackets and quotes; a quote inside a bare word is a letter."""
    parts, depth, quote = [""], 0, ""
    for index, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote and text[index - 1] != "\\" else quote
        elif letter in "'\"" and (depth or not parts[-1].strip()):
            quote = letter
        elif letter == "," and not depth:
            parts.append("")
            continue
        else:
            depth = max(0, depth + (letter in "([{") - (letter in ")]}"))
        parts[-1] += letter
    return [part.strip() for part in parts]


def _threads(workers: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores // workers, int(asked) if asked.isdigit() else cores))


def _word(value: Any) -> str:
    """A value as part of a folder name."""
    text = value if isinstance(value, str) else repr(value).replace(" ", "").replace("'", "")
    return re.sub(r"[^\w.,+=\[\]{}-]", "_", text)
