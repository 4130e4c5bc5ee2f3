"""The strict notebook runner and the command line, on a small notebook made here."""

import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from speedrl_lab import notebooks
from speedrl_lab.__main__ import main
from speedrl_lab.presets import PRESETS

PARAMETERS = """\
preset: str = None  # named start
iterations: int = 70  # rounds
speed_weight: float = 0.3
budgets: list[int] = [1, 2]
order: str = "halton"
label: str = "plain"  # not a config field
fail: bool = False"""


@pytest.fixture
def notebook(tmp_path, monkeypatch) -> Path:
    """A notebook that prints its parameters, and divides by zero when told to."""
    monkeypatch.delenv("SPEEDRL_PRESET", raising=False)
    monkeypatch.setenv("SPEEDRL_OUTPUTS", str(tmp_path / "outputs"))
    cells = [
        new_markdown_cell("# Tiny\n\n> Do the values arrive?"),
        new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        new_code_cell("print(preset, iterations, speed_weight, budgets, order, label)"),
        new_code_cell("1 / (not fail)"),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path = tmp_path / "07_tiny.ipynb"
    nbformat.write(new_notebook(cells=cells, metadata=kernel), path)
    return path


@pytest.fixture
def no_kernel(monkeypatch):
    """Fail the test when a kernel would be started."""
    monkeypatch.setattr(notebooks, "_execute", lambda *_: pytest.fail("a kernel was started"))


@pytest.fixture
def injected(monkeypatch) -> dict:
    """What the runner would inject, without a kernel."""
    seen: dict = {}
    monkeypatch.setattr(notebooks, "_execute", lambda path, target, values: seen.update(values))
    return seen


def test_parameters_have_type_default_and_help(notebook):
    table = notebooks.parameters(notebook)
    assert list(table) == ["preset", "iterations", "speed_weight", "budgets", "order", "label", "fail"]
    assert table["iterations"] == ("int", 70, "rounds")
    assert table["budgets"] == ("list[int]", [1, 2], "")
    assert table["preset"] == ("str", None, "named start")


def test_executed_copy_holds_preset_then_knobs(notebook, capsys):
    before = notebook.read_bytes()
    executed = notebooks.run(notebook, preset="smoke", speed_weight=0.7, label="knob")
    assert executed.parent.parent == notebook.parent / "outputs" / "07_tiny"
    assert re.fullmatch(r"\d{8}T\d{6}Z", executed.parent.name)
    smoke = PRESETS["smoke"].flat()
    expected = f"smoke {smoke['iterations']} 0.7 {list(smoke['budgets'])} {smoke['order']} knob"
    assert expected in capsys.readouterr().out  # shown while it runs
    cells = nbformat.read(executed, as_version=4).cells
    assert any(expected in output.get("text", "") for cell in cells for output in cell.get("outputs", []))
    assert notebook.read_bytes() == before
    with pytest.raises(FileExistsError, match="not overwritten"):
        notebooks.run(notebook, output=executed.parent)


def test_failed_cell_names_the_error_and_the_partial_notebook(notebook, tmp_path):
    target = tmp_path / "failed" / "07_tiny.ipynb"
    with pytest.raises(notebooks.NotebookError, match=rf"ZeroDivisionError.*{re.escape(str(target))}"):
        notebooks.run(notebook, output=target.parent, fail=True)
    assert "ZeroDivisionError" in target.read_text()


@pytest.mark.parametrize(
    ("knobs", "error", "message"),
    [
        ({"speed_wieght": 0.1}, TypeError, "unknown parameter 'speed_wieght'; nearest: 'speed_weight'"),
        ({"iterations": "3"}, TypeError, "iterations='3' has type str, expected int"),
        ({"iterations": 3.0}, TypeError, "expected int"),
        ({"iterations": True}, TypeError, "has type bool, expected int"),
        ({"iterations": None}, TypeError, "expected int"),
        ({"fail": "false"}, TypeError, "has type str, expected bool"),
        ({"budgets": [1, "2"]}, TypeError, r"expected list\[int\]"),
        ({"preset": "smok"}, ValueError, "unknown preset 'smok'; nearest: 'smoke'"),
        ({"iterations": -1}, ValueError, "iterations=-1: expected at least 1"),
        ({"order": "haltom"}, ValueError, "nearest: 'halton'"),
        ({"budgets": []}, ValueError, "budgets"),
    ],
)
def test_wrong_knob_is_refused_before_a_kernel_or_folder_exists(notebook, no_kernel, tmp_path, knobs, error, message):
    with pytest.raises(error, match=message):
        notebooks.run(notebook, output=tmp_path / "fresh", **knobs)
    assert not (tmp_path / "fresh").exists()


def test_environment_names_the_preset_and_knobs_win(notebook, injected, monkeypatch):
    monkeypatch.setenv("SPEEDRL_PRESET", "smoke")
    notebooks.run(notebook, iterations=5)
    assert injected["preset"] == "smoke"
    assert injected["iterations"] == 5
    assert injected["budgets"] == list(PRESETS["smoke"].evaluation.budgets)
    assert "label" not in injected


def test_without_a_preset_only_the_knobs_are_injected(notebook, injected):
    notebooks.run(notebook, budgets=(1, 4), order="confidence")
    assert injected == {"budgets": [1, 4], "order": "confidence"}


def test_folder_that_cannot_be_written_is_refused_before_a_kernel(notebook, no_kernel):
    with pytest.raises(OSError, match="cannot write to"):
        notebooks.run(notebook, output=notebook / "below_a_file")


def test_notebooks_are_found_by_name_number_and_path(notebook, monkeypatch):
    monkeypatch.setattr(notebooks, "NOTEBOOKS", notebook.parent)
    assert [notebooks.notebook_path(name) for name in ("07", "07_tiny", notebook)] == [notebook] * 3
    assert notebooks.questions() == {"07_tiny": "Do the values arrive?"}
    with pytest.raises(FileNotFoundError, match="unknown notebook '07_tinny'; nearest: '07_tiny'"):
        notebooks.notebook_path("07_tinny")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("speed_weight=0.3", ("speed_weight", 0.3)),
        ("learning_rate=1e-4", ("learning_rate", 1e-4)),
        ("resume=False", ("resume", False)),
        ("order=halton", ("order", "halton")),
        ("run='a = b'", ("run", "a = b")),
        ("prompt=a dog, a cat", ("prompt", "a dog, a cat")),
        ("budgets=[1, 2, 4]", ("budgets", [1, 2, 4])),
        ("quality_weights={'clip': 1.0}", ("quality_weights", {"clip": 1.0})),
    ],
)
def test_assignments_are_python_literals_or_words(text, expected):
    assert notebooks.parse_assignment(text) == expected


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("resume=false", "write resume=False"),
        ("resume=TRUE", "write resume=True"),
        ("run=null", "write run=None"),
        ("speed_weight", "expected name=value"),
        ("speed_weight=", "expected name=value"),
        ("speed-weight=1", "expected name=value"),
        ("budgets=[1, 2", "not a complete Python literal"),
    ],
)
def test_unclear_assignments_are_refused_with_a_hint(text, hint):
    with pytest.raises(ValueError, match=hint):
        notebooks.parse_assignment(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed_wieght=1"], "nearest: 'speed_weight'"),
        (["--output", "somewhere", "fail=false"], "write fail=False"),
        (["iterations=1", "iterations=2"], "given twice"),
    ],
)
def test_command_line_errors_are_one_line_and_status_2(notebook, no_kernel, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(["run", str(notebook), *arguments])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_command_line_runs_and_describes(notebook, injected, tmp_path, capsys):
    main(["run", str(notebook), "iterations=4", "--output", str(tmp_path / "here"), "label=x"])
    assert injected == {"iterations": 4, "label": "x"}
    assert capsys.readouterr().out.strip().endswith(str(tmp_path / "here" / "07_tiny.ipynb"))
    main(["params", str(notebook)])
    assert re.search(r"iterations: int = 70 +rounds", capsys.readouterr().out)
