"""Reports are one file with everything in it, and the command line says in one line what is wrong."""

import base64
import re
import tomllib
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest

from speedrl_lab import __main__ as command_line
from speedrl_lab import report
from speedrl_lab.__main__ import main
from speedrl_lab.config import RunConfig
from speedrl_lab.runs import Run

ROOT = Path(__file__).resolve().parent.parent
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """Two trained runs, one of them with pictures and results."""
    monkeypatch.setenv("SPEEDRL_OUTPUTS", str(tmp_path / "outputs"))
    for name, weight in (("weights/<slow>", 0.2), ("weights/fast", 0.5)):
        run = Run.open(name, RunConfig.from_flat("smoke", speed_weight=weight).flat())
        for iteration in (1, 2, 3):
            record = {"iteration": iteration, "rewards": {"clip": 0.5}, "steps": 4.0, "kl": 0.1, "diversity": 0.2}
            run.log(record | {"seconds": 1.0})
    run.write_card({"start": "the <committed> base", "warnings": "none"})
    (run.path / "samples").mkdir()
    for number in range(6):
        (run.path / "samples" / f"{number:03d}.png").write_bytes(PIXEL)
    table = [{"model": "base", "budget": n, "forwards": n, "steps": n, "accuracy": n / 10} for n in (1, 2, 4)]
    pd.DataFrame(table).to_csv(run.path / "frontier.csv")
    pd.DataFrame({"x": range(report.ROWS + 1)}).to_csv(run.path / "samples.csv")
    return tmp_path / "outputs"


def test_the_page_holds_everything_and_asks_for_nothing(outputs, tmp_path):
    path = report.write(["weights"], tmp_path / "page.html")
    text = path.read_text()
    assert text.count("plotly.js v") == 1
    body = text[text.index("</script></head>") :]
    assert "<h1>2 runs side by side</h1>" in body
    assert "http" not in body.replace("https://plot.ly", "")
    assert body.count("plotly-graph-div") == 2  # curves and frontier
    for heading in ("Settings that differ", "Training curves", "weights/fast", "weights/&lt;slow&gt;"):
        assert re.search(rf"<h2[^>]*>{heading}</h2>", body)
    assert "<slow>" not in body and "the &lt;committed&gt; base" in body
    differing = body[body.index("Settings that differ") : body.index("Training curves")]
    assert "speed_weight" in differing and "0.2" in differing and "learning_rate" not in differing
    assert re.findall(r'alt="(samples/\d+.png)"', body) == [f"samples/{number:03d}.png" for number in (2, 3, 4, 5)]
    assert base64.b64encode(PIXEL).decode() in body
    assert "samples.csv: 61 rows, in the run folder" in body and "frontier.csv, 3 rows" in body
    for anchor in re.findall(r'href="#([^"]+)"', body):
        assert body.count(f'id="{anchor}"') == 1
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["page.html"]


def test_one_run_is_a_report_too(outputs, tmp_path):
    text = report.write(["weights/fast"], tmp_path / "page.html").read_text()
    assert "<h1>Run weights/fast</h1>" in text and "Settings that differ" not in text


def test_an_existing_file_is_left_alone(outputs, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("mine")
    with pytest.raises(FileExistsError, match="page.html exists and is not overwritten; choose another --output"):
        report.write(["weights"], page)
    assert page.read_text() == "mine"
    first = report.write(["weights"])
    assert first.parent.parent == outputs / "09_report"


def test_unknown_runs_are_refused_before_anything_is_written(outputs, tmp_path):
    with pytest.raises(FileNotFoundError, match="nearest: 'weights/fast'"):
        report.write(["weights/fats"], tmp_path / "new" / "page.html")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_is_one_line(outputs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write .*; choose another --output"):
        report.write(["weights"], tmp_path / "file" / "page.html")


def test_the_command_shows_reports_and_deletes_runs(outputs, tmp_path, capsys):
    main(["runs", "weights", "--filter", "speed_weight=0.5"])
    shown = capsys.readouterr().out
    assert "weights/fast" in shown and "slow" not in shown and "3 of 3" in shown
    main(["runs"])
    assert re.search(r"settings that differ:\nrun +speed_weight\n", capsys.readouterr().out)
    main(["runs", "--filter", "nothing"])
    assert capsys.readouterr().out == "none of 2 runs matches 'nothing'\n"
    main(["report", "weights", "--output", str(tmp_path / "page.html")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    main(["runs", "--delete", "weights/<slow>", "--force"])
    assert f"-> {outputs}/.trash/weights/<slow>\nto get it back" in capsys.readouterr().out
    assert (outputs / ".trash" / "weights" / "<slow>" / "metrics.jsonl").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reprot"], "unknown command 'reprot'; nearest: 'report'"),
        (["runs", "--fitler", "x"], "unknown option '--fitler' of runs; nearest: '--filter'"),
        (["run", "03", "--outptu", "x"], "unknown option '--outptu' of run; nearest: '--output'"),
        (["runs", "wieghts/fast"], "nearest: 'weights/fast'"),
        (["runs", "--delete", "weights/fats"], "nearest: 'weights/fast'"),
        (["runs", "--delete", "weights/fast"], "changed"),
        (["runs", "--filter", "sped_weight=1"], "nearest: 'speed_weight'"),
        (["report", "wieghts/fast"], "nearest: 'weights/fast'"),
        (["params", "03_sped_rl"], "nearest: '03_speed_rl'"),
        (["run", "03_sped_rl"], "nearest: '03_speed_rl'"),
        (["run", "03", "sped_weight=1"], "nearest: 'speed_weight'"),
        (["sweep", "03", "sped_weight=1,2"], "nearest: 'speed_weight'"),
        (["sweep", "03", "seed=0,1", "--workers", "many"], "invalid int value: 'many'; see"),
        (["params"], "required: notebook; see"),
        (["list", "extra"], "list does not take 'extra'"),
    ],
)
def test_what_is_wrong_is_one_line_with_the_nearest_name(outputs, capsys, arguments, message):
    before = set(outputs.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("speedrl_lab: ") and message in lines[0]
    assert set(outputs.rglob("*")) == before


def test_help_names_every_command_with_an_example(capsys):
    main([])
    whole = capsys.readouterr().out
    for name, (text, example) in command_line.COMMANDS.items():
        assert re.search(rf"^    {name} ", whole, re.MULTILINE)
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        assert text[1:20] in shown and example.replace("speedrl ", "") in shown.replace("python -m speedrl_lab ", "")


def test_the_installed_command_is_this_one():
    target = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["speedrl"]
    module, name = target.split(":")
    assert getattr(import_module(module), name) is main


def test_a_notebook_with_a_page_gets_it_beside_its_executed_copy(outputs, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(command_line.notebooks, "run", lambda name, output, **knobs: seen.append((output, knobs)))
    main(["run", "09_report", "runs=['weights']", "--output", str(tmp_path / "here")])
    main(["run", "09_report", "--output", str(tmp_path / "here"), f"page={tmp_path}/mine.html"])
    main(["run", "09_report"])
    assert seen[0] == (tmp_path / "here", {"runs": ["weights"], "page": str(tmp_path / "here" / "report.html")})
    assert seen[1][1] == {"page": f"{tmp_path}/mine.html"}
    assert seen[2][1]["page"] == str(seen[2][0] / "report.html") and seen[2][0].parent == outputs / "09_report"
