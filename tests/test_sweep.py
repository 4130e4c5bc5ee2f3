"""Sweeps: every combination once, nothing overwritten, and going on after failures and kills.

One test a backend runs real notebooks; elsewhere the children are small scripts that leave what the runner would.
"""

import json
import os
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from speedrl_lab import ray_backend, sweep, trial
from speedrl_lab.__main__ import main

PARAMETERS = """\
speed_weight: float = 0.3
seed: int = 0
budgets: list[int] = [1]
order: str = "halton"
label: str = "plain"
run: str = ""
resume: bool = False"""
STORY = """\
import json, os, pathlib
outputs = pathlib.Path(os.environ["SPEEDRL_OUTPUTS"])
(outputs / run).mkdir(parents=True, exist_ok=resume)
records = [{"iteration": i, "quality": speed_weight * i, "rewards": {"clip": i}, "warnings": ["x"],
            "threads": int(os.environ["OMP_NUM_THREADS"])} for i in range(1, 11)]
(outputs / run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in records))
assert seed == 0 or (outputs / "repaired").exists(), "seed 1 is broken"
"""
CHILD = """\
import sys, time
from pathlib import Path
target, text, seconds, words, status = sys.argv[1:]
Path(target).write_text(text)
Path(target).with_name("begun").touch()
time.sleep(float(seconds))
sys.exit(words or int(status))
"""

LOSES_ITS_WORKER = """\
import os, signal, sys, time
from pathlib import Path
target, text, seed = sys.argv[1:]
begun = Path(target).with_name("begun")
if seed == "1" or not begun.exists():
    begun.touch()
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)
Path(target).write_text(text)
"""


@pytest.fixture
def notebook(tmp_path, monkeypatch) -> Path:
    """A notebook that writes metrics, and fails for seed 1 until a file `repaired` is there."""
    monkeypatch.delenv("SPEEDRL_PRESET", raising=False)
    monkeypatch.setenv("SPEEDRL_OUTPUTS", str(tmp_path / "outputs"))
    cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell(STORY)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path = tmp_path / "tiny.ipynb"
    nbformat.write(new_notebook(cells=cells, metadata=kernel), path)
    return path


@pytest.fixture
def outputs(notebook, tmp_path) -> Path:
    return tmp_path / "outputs"


@pytest.fixture
def no_child(monkeypatch):
    """Fail the test when a process would be started."""
    monkeypatch.setattr(trial, "start", lambda *_: pytest.fail("a process was started"))


@pytest.fixture
def children(monkeypatch):
    """Replace the runner by a script; returns the commands it was asked for."""
    asked = []

    def replace(answered: bool = True, seconds: float = 0, words: str = "", status: int = 0) -> list:
        def arguments(path, knobs, output):
            asked.append(knobs)
            text = executed(answered)
            return ["-S", "-c", CHILD, str(output / path.name), text, str(seconds), words, str(status)]

        monkeypatch.setattr(trial, "arguments", arguments)
        return asked

    return replace


def executed(answered: bool) -> str:
    """An executed notebook as papermill leaves it; one that was interrupted is "completed", too."""
    metadata = {"execution": {"shell.execute_reply": "now"} if answered else {}, "papermill": {"status": "completed"}}
    cells = [new_code_cell("1", metadata=metadata), new_code_cell("")]
    notes = {"end_time": "now", "duration": 2.5, "exception": None}
    return nbformat.writes(new_notebook(cells=cells, metadata={"papermill": notes}))


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("seed=0,1,2", [0, 1, 2]),
        ("seed = 3", [3]),
        ("order=halton, random", ["halton", "random"]),
        ("budgets=[1,2],[4]", [[1, 2], [4]]),
        ("quality_weights={'clip': 1.0, 'b': [1,2]},{}", [{"clip": 1.0, "b": [1, 2]}, {}]),
        ("prompt='a dog, a cat',\"it's, b\",plain", ["a dog, a cat", "it's, b", "plain"]),
        ("prompt=it's,b", ["it's", "b"]),
        ("prompts=['a, [b', 'c'],[]", [["a, [b", "c"], []]),
        (r"label='it\'s, b',c", ["it's, b", "c"]),
    ],
)
def test_values_are_split_outside_brackets_and_quotes(text, values):
    assert sweep.parse_assignment(text) == (text.split("=")[0].strip(), values)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("seed=0,,1", "a value is missing"),
        ("seed=0,", "a value is missing"),
        ("seed=", "expected name=value"),
        ("seed", "expected name=value"),
        ("resume=True,false", "write resume=False"),
        ("budgets=[1,2],[4", "not a complete Python literal"),
    ],
)
def test_unclear_values_are_refused(text, hint):
    with pytest.raises(ValueError, match=hint):
        sweep.parse_assignment(text)


def test_a_plan_has_every_combination_named_by_what_differs(notebook):
    trials = sweep.plan(notebook, {"speed_weight": [0, 0.1], "label": ["fixed"], "seed": [0, 1, 2]})
    assert [trial.name for trial in trials] == [f"speed_weight={w},seed={s}" for w in (0, 0.1) for s in (0, 1, 2)]
    assert trials[-1].knobs == {"speed_weight": 0.1, "label": "fixed", "seed": 2}
    assert len({json.dumps(trial.knobs) for trial in trials}) == 6


def test_folder_names_are_safe_short_and_unique(notebook):
    def names(values):
        return [trial.name for trial in sweep.plan(notebook, {"label": values})]

    assert names(["../up", "b c"]) == ["label=.._up", "label=b_c"]
    assert names(["a/b", "a b", "c"]) == ["trial-1", "trial-2", "label=c"]
    assert names(["x" * 200, "y"]) == ["trial-1", "label=y"]
    assert names(["one"]) == ["trial-1"]
    assert [trial.name for trial in sweep.plan(notebook, {"budgets": [[1, 2], [4]]})] == [
        "budgets=[1,2]",
        "budgets=[4]",
    ]


@pytest.mark.parametrize(
    ("knobs", "error", "message"),
    [
        ({"speed_wieght": [0.1]}, TypeError, "unknown parameter 'speed_wieght'; nearest: 'speed_weight'"),
        ({"seed": [0, 1, "two"]}, TypeError, "seed='two' has type str, expected int"),
        ({"order": ["halton", "haltom"]}, ValueError, "nearest: 'halton'"),
        ({"seed": [0, 1, 0]}, ValueError, "seed: value 0 is given twice"),
        ({"speed_weight": [1, 1.0]}, ValueError, "given twice"),
        ({"seed": []}, ValueError, "no value"),
        ({"seed": 3}, TypeError, "expected a list"),
        ({"run": ["a", "b"]}, ValueError, "run is set by the sweep"),
    ],
)
def test_a_wrong_value_is_refused_before_a_process_or_folder(notebook, outputs, no_child, knobs, error, message):
    with pytest.raises(error, match=message):
        sweep.run(notebook, {"label": ["a", "b"], **knobs})
    assert not outputs.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed_wieght=1,2"], "nearest: 'speed_weight'"),
        (["seed=0,1,0"], "given twice"),
        (["seed=0", "--name", "x", "seed=1"], "seed is given twice"),
        (["seed=0", "--workers", "0"], "workers=0: expected at least 1"),
    ],
)
def test_command_line_errors_are_one_line_and_status_2(notebook, no_child, capsys, arguments, message):
    assert message in refusal(notebook, arguments, capsys)


def refusal(notebook: Path, arguments: list[str], capsys) -> str:
    """What the command line says, in one line, when it does not start a sweep."""
    with pytest.raises(SystemExit) as stop:
        main(["sweep", str(notebook), *arguments])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def half_failed(command: list[str], folder: Path, capfd) -> pd.DataFrame:
    """The table of a sweep of two trials, of which the command line says that one failed."""
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 1
    assert "1 of 2 trials done, 1 failed" in capfd.readouterr().out
    return pd.read_csv(folder / "table.csv", index_col="trial")


def test_a_failed_trial_is_reported_and_repeated_while_finished_ones_are_left_alone(notebook, outputs, capfd):
    command = ["sweep", str(notebook), "seed=0,1", "speed_weight=0.5", "--name", "seeds", "--workers", "2"]
    folder = outputs / "seeds"
    table = half_failed(command, folder, capfd)
    assert list(table.seed) == [0, 1] and list(table.status) == ["done", "failed"]
    assert (table.seconds > 0).all()
    assert "AssertionError: seed 1 is broken" in table.error["seed=1"]
    assert table.quality_last["seed=0"] == 5.0 and table.quality_mean["seed=0"] == pytest.approx(4.75)
    assert table["rewards.clip_last"]["seed=0"] == 10
    assert "speed_weight" not in table and "warnings_last" not in table
    assert (table.threads_last >= 1).all()
    first = snapshot(folder / "seed=0")
    assert {path.name for path in first} == {"tiny.ipynb", "log.txt", "metrics.jsonl"}
    failed = (folder / "seed=1" / "tiny.ipynb").read_bytes()

    (outputs / "repaired").touch()
    main(["sweep", str(notebook), "speed_weight=0.5", "seed=0,1", "--name", "seeds"])
    assert list(sweep.table("seeds").status) == ["done", "done"]
    assert snapshot(folder / "seed=0") == first
    assert (folder / "seed=1" / "tiny.attempt-1.ipynb").read_bytes() == failed
    assert not (folder / "seed=1" / "failure.json").exists()


def test_an_interrupt_stops_the_children_and_the_next_call_goes_on(notebook, outputs, children, monkeypatch, capsys):
    processes, sleep = [], time.sleep
    start = trial.start
    monkeypatch.setattr(trial, "start", lambda job: processes.append(start(job)) or processes[-1])

    def interrupt(seconds):
        if processes and all((outputs / "kept" / name / "begun").exists() for name in ("seed=0", "seed=1")):
            monkeypatch.setattr(time, "sleep", sleep)
            raise KeyboardInterrupt
        sleep(seconds)

    children(answered=False, seconds=600)
    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(SystemExit) as stop:
        main(["sweep", str(notebook), "seed=0,1,2", "--name", "kept"])
    assert stop.value.code == 130
    assert len(processes) == 2 and all(process.returncode is not None for process in processes)
    assert "--name kept" in capsys.readouterr().out
    assert list(pd.read_csv(outputs / "kept" / "table.csv").status) == ["waiting"] * 3

    asked = children()
    asked.clear()
    assert list(sweep.run(notebook, {"seed": [0, 1, 2]}, "kept").status) == ["done"] * 3
    assert [knobs["seed"] for knobs in asked] == [0, 1, 2]
    assert (outputs / "kept" / "seed=0" / "tiny.attempt-1.ipynb").exists()
    asked.clear()
    assert list(sweep.run(notebook, {"seed": [0, 1, 2]}, "kept").seconds) == [2.5] * 3
    assert asked == []


@pytest.mark.parametrize(
    ("child", "error"),
    [
        ({"words": "speedrl_lab: out of luck"}, "exit status 1, .*: speedrl_lab: out of luck"),
        ({"status": 0}, "exit status 0, and the notebook is not complete"),
    ],
)
def test_a_child_that_leaves_no_complete_notebook_has_failed(notebook, children, child, error):
    children(answered=False, **child)
    table = sweep.run(notebook, {"seed": [0]}, "one")
    assert table.status["trial-1"] == "failed"
    assert pd.Series(table.error["trial-1"]).str.contains(error)[0]


def test_a_killed_child_has_failed_and_the_rest_goes_on(notebook, children, monkeypatch):
    children()
    start = trial.start

    def start_and_kill(job):
        if job.folder.name != "seed=0":
            return start(job)
        process = start(job._replace(arguments=["-S", "-c", "import time; time.sleep(600)"]))
        process.kill()
        return process

    monkeypatch.setattr(trial, "start", start_and_kill)
    table = sweep.run(notebook, {"seed": [0, 1]}, "one", workers=1)
    assert list(table.status) == ["failed", "done"]
    assert table.error["seed=0"] == "killed by signal 9"


def test_a_sweep_runs_once_at_a_time_even_when_only_its_children_are_left(notebook, outputs, children, monkeypatch):
    children(seconds=600)
    orphans, start = [], trial.start
    monkeypatch.setattr(trial, "start", lambda job: orphans.append(start(job)) or orphans[-1])
    monkeypatch.setattr(trial, "stop", lambda processes: None)  # as after a kill -9 of the sweep

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(notebook, {"seed": [0]}, "one")
    monkeypatch.undo()
    monkeypatch.setenv("SPEEDRL_OUTPUTS", str(outputs))
    monkeypatch.delenv("SPEEDRL_PRESET", raising=False)
    try:
        with pytest.raises(OSError, match="trial trial-1 of a killed sweep .* is running"):
            sweep.run(notebook, {"seed": [0]}, "one")
    finally:
        for process in orphans:
            process.kill()
            process.wait()


def test_other_settings_and_other_folders_are_refused_untouched(notebook, outputs, children, monkeypatch):
    children()
    sweep.run(notebook, {"seed": [0, 1]}, "one")
    (outputs / "demo").mkdir()
    (outputs / "demo" / "page.html").touch()
    before = snapshot(outputs)
    for knobs, message in [
        ({"seed": [0, 1, 2]}, r"started with seed=\[0, 1\], now \[0, 1, 2\]"),
        ({"seed": [0, 1], "label": ["b"]}, "started with label=None"),
    ]:
        with pytest.raises(ValueError, match=message):
            sweep.run(notebook, knobs, "one")
    with pytest.raises(FileExistsError, match="is no sweep; choose another --name"):
        sweep.run(notebook, {"seed": [0, 1]}, "demo")
    monkeypatch.setenv("SPEEDRL_PRESET", "smoke")
    with pytest.raises(ValueError, match="started with SPEEDRL_PRESET=None, now 'smoke'"):
        sweep.run(notebook, {"seed": [0, 1]}, "one")
    assert snapshot(outputs) == before
    with pytest.raises(FileNotFoundError, match="is no sweep"):
        sweep.table("demo")


def test_workers_share_the_cores_and_get_a_run_folder_each(notebook, children, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    asked = children()
    threads, running, start, settle = [], [], trial.start, trial.settle

    def count(job):
        threads.append((job.environment["OMP_NUM_THREADS"], job.environment["MKL_NUM_THREADS"]))
        running.append(running[-1] + 1 if running else 1)
        return start(job)

    monkeypatch.setattr(trial, "start", count)
    monkeypatch.setattr(trial, "settle", lambda ended: running.append(running[-1] - 1) or settle(ended))
    sweep.run(notebook, {"seed": [0, 1, 2, 3]}, "deep/one", workers=3)
    assert max(running) == 3 and running[-1] == 0
    assert threads == [("2", "2")] * 4
    assert [knobs["run"] for knobs in asked] == [f"deep/one/seed={seed}/run" for seed in range(4)]
    assert all(knobs["resume"] is True for knobs in asked)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads.clear()
    sweep.run(notebook, {"seed": [5]}, workers=1)
    assert threads == [("1", "1")]
    threads.clear()
    sweep.run(notebook, {"seed": [5]}, "three", cpus=3)
    assert threads == [("3", "3")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "slurm"], "invalid choice: 'slurm'"),
        (["--cpus", "0"], "cpus=0: expected at least 1"),
        (["--gpus", "1"], "gpus=1: only backend 'ray' hands out GPUs"),
        (["--gpus", "1.5", "--backend", "ray"], "gpus=1.5: expected a whole number, or a share below 1"),
        (["--backend", "ray"], "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1: "),
    ],
)
def test_a_backend_that_cannot_be_had_is_said_before_a_folder(
    notebook, outputs, no_child, monkeypatch, capsys, arguments, message
):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(ray_backend, "find_spec", lambda name: name)
    assert message in refusal(notebook, ["seed=0", *arguments], capsys)
    assert not outputs.exists()


def test_a_missing_ray_is_said_in_one_line_with_what_to_install(notebook, outputs, no_child, monkeypatch, capsys):
    monkeypatch.setattr(ray_backend, "find_spec", lambda name: None)
    line = refusal(notebook, ["seed=0", "--backend", "ray"], capsys)
    assert line == "speedrl_lab: backend 'ray' needs ray, not installed: pip install 'speedrl_lab[ray]'"
    assert not outputs.exists()


@pytest.fixture
def ray():
    """Ray, not started."""
    return pytest.importorskip("ray", reason="backend 'ray' needs the extra speedrl_lab[ray]")


@pytest.fixture(scope="module")
def local_ray():
    """A Ray of this machine with two cores."""
    ray = pytest.importorskip("ray", reason="backend 'ray' needs the extra speedrl_lab[ray]")
    size = {"num_cpus": 2, "num_gpus": 0, "object_store_memory": ray_backend.STORE}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ray_backend.SETTINGS.items():
            patch.setenv(name, value)
        ray.init("local", include_dashboard=False, log_to_driver=False, logging_level="error", **size)
    yield ray
    ray.shutdown()


def attempts(folder: Path) -> int:
    return sum(line.startswith("$ ") for line in (folder / "log.txt").read_text().splitlines())


def test_ray_makes_the_same_folders_and_table_and_goes_on_here(notebook, outputs, ray, children, monkeypatch, capfd):
    """Starts a Ray of its own. A trial that fails by its own error is not tried again."""
    monkeypatch.setenv("RAY_ADDRESS", "local")
    command = ["sweep", str(notebook), "seed=0,1", "speed_weight=0.5", "--name", "seeds", "--backend", "ray"]
    folder = outputs / "seeds"
    table = half_failed(command, folder, capfd)
    assert list(table.status) == ["done", "failed"] and (table.seconds > 0).all()
    assert "AssertionError: seed 1 is broken" in table.error["seed=1"]
    assert table.quality_last["seed=0"] == 5.0 and table.threads_last["seed=0"] == 1
    assert attempts(folder / "seed=1") == 1
    first = snapshot(folder / "seed=0")
    assert {path.name for path in first} == {"tiny.ipynb", "log.txt", "metrics.jsonl"}

    assert not ray.is_initialized()
    children()
    main([*command, "--backend", "local"])
    assert list(sweep.table("seeds").status) == ["done", "done"]
    assert snapshot(folder / "seed=0") == first and attempts(folder / "seed=1") == 2


def test_a_trial_whose_worker_is_lost_is_tried_again(notebook, outputs, local_ray, monkeypatch):
    def arguments(path, knobs, output):
        return ["-S", "-c", LOSES_ITS_WORKER, str(output / path.name), executed(True), str(knobs["seed"])]

    monkeypatch.setattr(trial, "arguments", arguments)
    table = sweep.run(notebook, {"seed": [0, 1]}, "lost", backend="ray")
    assert list(table.status) == ["done", "failed"]
    assert table.error["seed=1"].startswith("its worker was lost 3 times: ")
    assert [attempts(outputs / "lost" / f"seed={seed}") for seed in (0, 1)] == [2, 3]


@pytest.mark.parametrize("finishes", [True, False])
def test_an_attempt_waits_for_a_lost_one_that_goes_on(tmp_path, finishes):
    """What that one finishes counts, and is not done again."""
    folder = tmp_path / "one"
    arguments = ["-S", "-c", CHILD, str(folder / "tiny.ipynb"), executed(finishes), "1", "", "0"]
    job = trial.Job(folder, "tiny.ipynb", arguments, {}, str(tmp_path))
    lost = trial.start(job)
    assert trial.is_running(folder)
    status, seconds = trial.attempt(job._replace(arguments=["-S", "-c", "raise SystemExit(7)"]))
    assert (status, attempts(folder)) == ((0, 1) if finishes else (7, 2))
    assert seconds > 0.5 and lost.wait() == 0 and not trial.is_running(folder)


def test_what_fails_on_a_worker_before_the_trial_begins_is_said_in_one_line(notebook, local_ray, children, monkeypatch):
    children()
    monkeypatch.setattr(Path, "cwd", lambda: Path("/nowhere"))
    table = sweep.run(notebook, {"seed": [0]}, "one", backend="ray")
    assert table.error["trial-1"].startswith("FileNotFoundError: ") and "/nowhere" in table.error["trial-1"]


def test_an_interrupt_stops_the_tasks(notebook, outputs, local_ray, children, monkeypatch):
    places = [outputs / "kept" / f"seed={seed}" for seed in (0, 1)]
    wait = local_ray.wait

    def interrupt(*given, **named):
        if all((place / "begun").exists() for place in places):
            monkeypatch.setattr(local_ray, "wait", wait)
            raise KeyboardInterrupt
        return wait(*given, **named)

    children(answered=False, seconds=600)
    monkeypatch.setattr(local_ray, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(notebook, {"seed": [0, 1, 2]}, "kept", backend="ray")
    assert not any(map(trial.is_running, places))
    assert list(sweep.table("kept").status) == ["waiting"] * 3
    asked = children()
    asked.clear()
    assert list(sweep.run(notebook, {"seed": [0, 1, 2]}, "kept", workers=1, backend="ray").status) == ["done"] * 3
    assert [knobs["seed"] for knobs in asked] == [0, 1, 2]


def test_more_than_any_machine_has_is_refused(notebook, local_ray, no_child):
    with pytest.raises(ValueError, match=r"cpus=64, gpus=0 fits on no machine of the Ray cluster \(2 CPUs, 0 GPUs\)"):
        sweep.run(notebook, {"seed": [0]}, cpus=64, backend="ray")
