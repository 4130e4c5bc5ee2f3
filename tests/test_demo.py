"""`make demo`: which notebooks it runs, with which settings, and what an interrupted or finished one leaves."""

from pathlib import Path

import pytest
import torch

from speedrl_lab import contenders, demo, notebooks
from speedrl_lab.generator import can_revise
from speedrl_lab.generators import load_generator


@pytest.fixture
def executed(tmp_path, monkeypatch) -> list[tuple[str, dict]]:
    """What would have been run: every notebook's settings pass the real checks, then its results are there."""
    calls = []

    def pretend(name: str, output: Path, **knobs) -> Path:
        notebooks.resolved(notebooks.notebook_path(name), knobs)
        folder = Path(knobs["run"])
        folder.mkdir(parents=True, exist_ok=knobs["resume"] or folder == output)
        result = demo.TRAINED if name == "03_speed_rl" else demo.PAGE
        (folder / result).touch()
        calls.append((name, knobs))
        return output / f"{name}.ipynb"

    monkeypatch.setenv("SPEEDRL_OUTPUTS", str(tmp_path))
    monkeypatch.setattr(demo.notebooks, "run", pretend)
    return calls


def test_a_demo_trains_from_halfway_between_two_distillations_and_shows_that_start(executed, tmp_path):
    assert demo.main() == tmp_path / "demo" / demo.PAGE
    (first, training), (second, frontier) = executed
    assert (first, second) == ("03_speed_rl", "05_frontier")
    start, fast, revising = (
        load_generator("emoji", "cpu", file) for file in (training["policy"], demo.FAST, demo.REVISING)
    )
    assert start.revises and not can_revise(fast)
    # files are half precision
    halves = zip(*(generator.policy.parameters() for generator in (start, fast, revising)), strict=True)
    assert all(torch.allclose(middle, (one + other) / 2, atol=2e-3) for middle, one, other in halves)
    assert not training["resume"] and not frontier["resume"]
    shown = contenders.read_policies(frontier["policies"])
    assert list(shown) == ["before RL", "speed-rl, short", "speed-rl"]
    assert shown["before RL"] == [Path(training["policy"])]
    assert shown["speed-rl, short"] == [Path(training["run"]) / demo.TRAINED]


def test_an_interrupted_demo_goes_on_where_it_stopped(executed, tmp_path):
    run = tmp_path / "demo" / "speed_rl"
    run.mkdir(parents=True)
    (tmp_path / "demo" / "03_speed_rl.ipynb").write_text("half of a notebook")
    demo.main()
    assert [knobs["resume"] for _, knobs in executed] == [True, False]
    (tmp_path / "demo" / demo.PAGE).unlink()
    (tmp_path / "demo" / "config.json").touch()  # the frontier had begun
    demo.main()
    assert [name for name, _ in executed[2:]] == ["05_frontier"] and executed[2][1]["resume"]


def test_a_finished_demo_is_never_touched(executed, tmp_path):
    demo.main()
    assert demo.main() == tmp_path / "demo-2" / demo.PAGE
    with pytest.raises(FileExistsError, match="finished demo; choose another --output"):
        demo.main(tmp_path / "demo")
