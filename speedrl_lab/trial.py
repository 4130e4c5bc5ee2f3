"""One trial of a sweep: its folder, the process that runs its notebook, and what became of it.

    <trial>/    executed notebook, log.txt, run/ (the notebook's run folder), failure.json

A process holds a lock on its log (POSIX), its output, for as long as it lives: whoever is to start a trial can see
that an earlier attempt goes on, even when the program that began it is gone. A Ray worker imports this module and
runs `attempt`; it needs neither PyTorch nor pandas for that.
"""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

LOG, FAILURE = "log.txt", "failure.json"
PAUSE = 0.2  # seconds between two looks at a process
PATIENCE = 15.0  # seconds between asking a process to end and killing it


class Trial(NamedTuple):
    """One combination: its folder name (what differs between trials) and all its knobs."""

    name: str
    knobs: dict[str, Any]


class Job(NamedTuple):
    """What a process needs to execute a trial's notebook, on whatever machine."""

    folder: Path
    file: str  # of the executed notebook
    arguments: list[str]  # of Python
    environment: dict[str, str]  # set over the machine's own
    cwd: str


class Ended(NamedTuple):
    """How an attempt ended: exit status (negative: a signal), or in words why there is none."""

    job: Job
    status: int | str
    seconds: float


def arguments(notebook: Path, knobs: Mapping[str, Any], output: Path) -> list[str]:
    """Python's arguments by which a trial's notebook is executed."""
    assignments = [f"{name}={value!r}" for name, value in knobs.items()]
    return ["-m", "speedrl_lab", "run", str(notebook), *assignments, "--output", str(output)]


def start(job: Job) -> subprocess.Popen:
    """Start an attempt when an earlier one has ended; moves aside what that one executed."""
    job.folder.mkdir(exist_ok=True)
    command = [sys.executable, *job.arguments]
    with (job.folder / LOG).open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # inherited with the output
        _make_room(job)
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=job.cwd,
            env={**os.environ, **job.environment},
        )  # fmt: skip


def attempt(job: Job) -> tuple[int, float]:
    """Execute a trial in the main thread; exit status and seconds. What a lost attempt finishes is not done again.

    An interrupt ends the process. It is noted when it comes and acted upon between two looks, so that none is lost
    between a process's start and the place that ends it, or comes while it is being ended.
    """
    asked: list[int] = []
    usual = signal.signal(signal.SIGINT, lambda number, _: asked.append(number))
    try:
        began = time.monotonic()
        while is_running(job.folder):
            _pause(asked)
        if finished(job.folder / job.file):
            return 0, time.monotonic() - began
        process = start(job)
        try:
            while process.poll() is None:
                _pause(asked)
            return process.returncode, time.monotonic() - began
        finally:
            stop([process])
    finally:
        signal.signal(signal.SIGINT, usual)


def _pause(asked: list[int]) -> None:
    time.sleep(PAUSE)
    if asked:
        raise KeyboardInterrupt


def is_running(folder: Path) -> bool:
    """Whether a process of this or of an earlier sweep executes the trial now."""
    if not (folder / LOG).exists():
        return False
    with (folder / LOG).open("a") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def settle(ended: Ended) -> str:
    """Note why an ended trial is not finished, in one line, which is returned; "" where it is."""
    from speedrl_lab.runs import write_atomic

    folder, status = ended.job.folder, ended.status
    if finished(folder / ended.job.file):
        return ""
    log = folder / LOG
    error = status if isinstance(status, str) else _reason(status, log.read_text(errors="replace"))
    folder.mkdir(exist_ok=True)
    write_atomic(folder / FAILURE, json.dumps({"seconds": round(ended.seconds, 1), "error": error}) + "\n")
    return error


def stop(processes: Iterable[subprocess.Popen]) -> None:
    """End processes, and kill those that do not end in time; a kernel ends when its parent does."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.terminate()
    deadline = time.monotonic() + PATIENCE
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def finished(notebook: Path) -> dict[str, Any] | None:
    """papermill's notes in an executed notebook, if the kernel answered every cell and none with an error.

    papermill's own marks are not enough: to it, cells that an interrupt cut off are "completed".
    """
    if not notebook.is_file():
        return None
    try:
        content = json.loads(notebook.read_text(encoding="utf-8"))
    except ValueError:  # half-written
        return None
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
    answered = all("shell.execute_reply" in cell["metadata"].get("execution", {}) for cell in cells)
    notes = content["metadata"].get("papermill", {})
    return notes if answered and notes.get("end_time") and not notes.get("exception") else None


def result(folder: Path, file: str) -> dict[str, Any]:
    """Status, seconds and error of a trial, from its files."""
    if notes := finished(folder / file):
        return {"status": "done", "seconds": round(notes["duration"], 1), "error": ""}
    if (folder / FAILURE).is_file():
        return {"status": "failed", **json.loads((folder / FAILURE).read_text())}
    return {"status": "waiting", "seconds": float("nan"), "error": ""}


def metrics(run_folder: Path) -> dict[str, float]:
    """Last value and mean over the last fifth of every numeric column of a run's records."""
    from speedrl_lab.runs import Run

    try:
        records = Run(run_folder, {}).records()
    except ValueError:  # a line torn by a kill
        return {}
    if records.empty:
        return {}
    numbers = records.select_dtypes("number")
    last, mean = numbers.iloc[-1], numbers.tail(max(1, len(numbers) // 5)).mean()
    return {f"{name}_{kind}": row[name] for name in numbers for kind, row in (("last", last), ("mean", mean))}


def _make_room(job: Job) -> None:
    """Move aside what an earlier attempt executed."""
    (job.folder / FAILURE).unlink(missing_ok=True)
    executed, number = job.folder / job.file, 1
    while (aside := executed.with_name(f"{executed.stem}.attempt-{number}.ipynb")).exists():
        number += 1
    if executed.exists():
        executed.rename(aside)


def _reason(status: int, log: str) -> str:
    """One line on why a process ended, from its exit status and its output."""
    if status < 0:
        return f"killed by signal {-status}"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    said = [line.partition("speedrl_lab: ")[2] for line in lines if "speedrl_lab: " in line]
    if status == 2 and said:  # the runner's own words
        return said[-1]
    return f"exit status {status}, and the notebook is not complete: {lines[-1]}"
