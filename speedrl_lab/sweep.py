"""Sweep a notebook: every combination of knob values is a trial, run by the strict runner in its own process.

    outputs/<name>/sweep.json    notebook, knobs, trials
    outputs/<name>/table.csv     one row a trial, written anew whenever a trial ends
    outputs/<name>/<trial>/      what trial.py says

Called again with the same name, on the same or on another backend, a sweep skips finished trials and goes on with
the others. It holds a lock on sweep.json and a trial's process one on its log (POSIX), so no trial is ever run twice
at once, not even after a killed sweep.
"""

import fcntl
import json
import os
import re
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from tqdm import tqdm

from speedrl_lab import notebooks, ray_backend, trial
from speedrl_lab.runs import outputs_root, write_atomic
from speedrl_lab.trial import Ended, Job, Trial

DESCRIBED, TABLE = "sweep.json", "table.csv"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
LONGEST_NAME = 120  # characters of a trial's folder name
WORKERS = 2  # trials at a time on this machine


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
    notebook: str | Path,
    knobs: Mapping[str, Sequence[Any]],
    name: str | None = None,
    workers: int | None = None,
    backend: Literal["local", "ray"] = "local",
    cpus: int | None = None,
    gpus: float = 0.0,
) -> pd.DataFrame:
    """Execute the unfinished trials of outputs/<name> and return the table.

    A failed trial is a row of the table; the rest goes on.

    Args:
        name: `sweep/<UTC time>` where it is not given; give it again to go on with a sweep.
        workers: trials at a time; 2 on this machine, on Ray as many as fit.
        backend: processes of this machine, or tasks of a Ray cluster: see ray_backend.py.
        cpus: threads of a trial. On this machine cores/workers where it is not given, and no more than
            OMP_NUM_THREADS where that is set; on Ray 1.
        gpus: GPUs of a trial, on Ray only; 0.5 puts two trials on one.

    Raises:
        TypeError, ValueError: what `plan` raises, other settings than the sweep was started with, or more cpus or
            gpus than any machine has.
        ImportError: Ray is asked for and not installed.
        FileExistsError: the folder is there and is no sweep.
        OSError: the folder cannot be written, the sweep is running already, or the Ray cluster does not answer.
        KeyboardInterrupt: after the running trials were stopped; the same call goes on.
    """
    _check_backend(backend, workers, cpus, gpus)
    path = notebooks.notebook_path(notebook).resolve()
    name = name or f"sweep/{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    folder = outputs_root() / name
    trials = _open(folder, path, knobs)
    tqdm.write(f"sweep folder: {folder}")
    with (folder / DESCRIBED).open() as lock:
        _lock(lock, folder, trials)
        try:
            if backend == "ray":
                jobs = _jobs(path, name, trials, cpus or 1)
                ended = ray_backend.run(jobs, workers, cpus or 1, gpus, _cores())
            else:
                jobs = _jobs(path, name, trials, cpus or _threads(workers or WORKERS))
                ended = _run_here(jobs, workers or WORKERS)
            _follow(ended, folder, len(trials), len(jobs))
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
        {knob: knobs[knob] for knob in varied}
        | trial.result(folder / name, file)
        | trial.metrics(folder / name / "run")
        for name, knobs in described["trials"].items()
    ]
    frame = pd.DataFrame(rows, index=pd.Index(described["trials"], name="trial"))
    return frame[[column for column in frame if column != "error"] + ["error"]]


def _run_here(jobs: Sequence[Job], workers: int) -> Iterator[Ended]:
    """Keep `workers` processes of this machine busy, and yield each job that ends; leaves none behind."""
    waiting = list(jobs)
    running: dict[subprocess.Popen, tuple[Job, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                running[trial.start(job)] = job, time.monotonic()
            time.sleep(0.1)
            for process in [process for process in running if process.poll() is not None]:
                job, began = running.pop(process)
                yield Ended(job, process.returncode, time.monotonic() - began)
    finally:
        trial.stop(running)


def _follow(ended: Iterator[Ended], folder: Path, total: int, left: int) -> None:
    """Report and note each job that ends."""
    with closing(ended), tqdm(total=total, initial=total - left, desc="trials") as bar:
        for one in ended:
            if error := trial.settle(one):
                tqdm.write(f"{one.job.folder.name}: {error}")
            _write_table(folder)
            bar.update()


def _jobs(path: Path, name: str, trials: Sequence[Trial], threads: int) -> list[Job]:
    """What is left to do."""
    own = {key: value for key, value in os.environ.items() if key.startswith("SPEEDRL_")}
    environment = own | {"SPEEDRL_OUTPUTS": str(outputs_root()), "PYTHONUNBUFFERED": "1"}
    environment |= dict.fromkeys(THREADS, str(threads))
    jobs = []
    for place, knobs in trials:
        folder = outputs_root() / name / place
        if not trial.finished(folder / path.name):
            all_knobs = knobs | _run_knobs(path, f"{name}/{place}/run")
            arguments = trial.arguments(path, all_knobs, folder)
            jobs.append(Job(folder, path.name, arguments, environment, str(Path.cwd())))
    return jobs


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
    settings |= {"knobs": dict(knobs), "trials": {one.name: one.knobs for one in trials}}
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


def _lock(file: Any, folder: Path, trials: Iterable[Trial]) -> None:
    """Lock the open description of a sweep none of whose trials is running."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(f"sweep {folder} is running; wait for it or end it") from None
    running = [one.name for one in trials if trial.is_running(folder / one.name)]
    if running:
        raise OSError(f"trial {running[0]} of a killed sweep {folder} is running; wait for it or end it")


def _write_table(folder: Path) -> pd.DataFrame:
    frame = table(folder)
    write_atomic(folder / TABLE, frame.to_csv())
    return frame


def _run_knobs(path: Path, run_folder: str) -> dict[str, Any]:
    """What makes a notebook keep its run in the trial's folder, where it declares how."""
    can = {"run", "resume"} <= notebooks.parameters(path).keys()
    return {"run": run_folder, "resume": True} if can else {}


def _check_backend(backend: str, workers: int | None, cpus: int | None, gpus: float) -> None:
    for name, value in (("workers", workers), ("cpus", cpus)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    if gpus < 0 or (gpus > 1 and gpus % 1):
        raise ValueError(f"gpus={gpus:g}: expected a whole number, or a share below 1")
    if backend == "ray":
        ray_backend.require()
    elif backend != "local":
        raise ValueError(f"backend {backend!r}: expected 'local' or 'ray'")
    elif gpus:
        raise ValueError(f"gpus={gpus:g}: only backend 'ray' hands out GPUs; 'local' shows all of them to every trial")


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


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _threads(workers: int) -> int:
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(_cores() // workers, int(asked) if asked.isdigit() else _cores()))


def _word(value: Any) -> str:
    """A value as part of a folder name."""
    text = value if isinstance(value, str) else repr(value).replace(" ", "").replace("'", "")
    return re.sub(r"[^\w.,+=\[\]{}-]", "_", text)
