"""Runs side by side: found everywhere below the root, compared by what differs, filtered by setting and text."""

import json
import os
import time

import numpy as np
import pytest

from speedrl_lab import comparison
from speedrl_lab.browser import run_browser
from speedrl_lab.config import RunConfig
from speedrl_lab.runs import Run


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Make a run folder below a fresh root; distillations are made by `method`."""
    monkeypatch.setenv("SPEEDRL_OUTPUTS", str(tmp_path / "outputs"))

    def make(name, count=10, older=0, method="", card=None, **knobs):
        settings = RunConfig.from_flat("smoke", **knobs, **({"method": method} if method else {})).flat()
        run = Run.open(name, settings)
        for iteration in range(1, count + 1):
            plain = {"iteration": iteration, "seconds": 6.0}
            tuned = {"rewards": {"clip": iteration / 10, "detector": 0.5}, "steps": 4.0, "kl": 0.1, "diversity": 0.2}
            run.log(plain | ({"loss": 1.0} if method else tuned))
        if card:
            run.write_card(card)
        for file in run.path.iterdir():
            os.utime(file, (time.time() - older, time.time() - older))
        return run.path

    return make


def names(runs):
    return [run.name for run in runs]


def test_runs_are_found_at_and_below_folders_newest_first(make, tmp_path):
    make("old", older=300)
    make("group/one/run", older=200)
    make("group/two/run", older=100)
    make(".trash/gone")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    make(elsewhere / "alone")
    (tmp_path / "outputs" / "link").symlink_to(elsewhere)
    assert names(comparison.find()) == ["group/two/run", "group/one/run", "old"]
    assert names(comparison.find(["group"])) == ["group/two/run", "group/one/run"]
    assert names(comparison.find(["group/one/run", "group/one"])) == ["group/one/run"]
    assert names(comparison.find([elsewhere])) == [str(elsewhere / "alone")]


def test_nothing_found_is_one_line_with_the_nearest_name(make):
    with pytest.raises(FileNotFoundError, match="no runs below .* yet; make one: python -m"):
        comparison.find()
    make("weights/one")
    with pytest.raises(FileNotFoundError, match=r"no run .*; nearest: 'weights/one'"):
        comparison.find(["wieghts/one"])


def test_the_table_holds_what_is_done_and_the_last_metrics(make):
    make("tuned", count=10, iterations=20)
    make("distilled", count=3, older=60, method="dimo", distill_iterations=5)
    make("empty", count=0, older=120)
    frame = comparison.table(comparison.find()).set_index("run")
    assert list(frame.method) == ["speed-rl", "dimo", "-"]
    assert list(frame.done) == [10, 3, 0]
    assert list(frame.asked[:2]) == [20, 5] and frame.asked.isna()["empty"]
    assert frame.minutes["tuned"] == pytest.approx(1.0)
    assert frame["rewards.clip"]["tuned"] == pytest.approx(0.95)  # of iterations 9 and 10
    assert frame.loss["distilled"] == 1.0 and np.isnan(frame.loss["tuned"])
    texts = comparison.shown(frame.reset_index()).set_index("run")
    assert list(texts.iterations) == ["10 of 20", "3 of 5", "-"]
    assert texts["exact counts"]["tuned"] == "0.5" and texts.loss["tuned"] == "-"


def test_only_differing_settings_are_shown(make):
    make("a", speed_weight=0.2, quality_weights={"clip": 1.0, "novelty": 0.4})
    make("b", older=60, speed_weight=0.5, quality_weights={"clip": 1.0})
    frame = comparison.differing(comparison.find())
    assert set(frame) == {"quality_weights.novelty", "speed_weight"}
    assert frame.speed_weight.to_dict() == {"a": 0.2, "b": 0.5}
    assert frame["quality_weights.novelty"].to_dict() == {"a": 0.4, "b": "-"}
    assert comparison.differing(comparison.find(["a"])).columns.empty


def test_a_setting_younger_than_a_run_counts_with_its_default(make):
    path = make("old")
    make("new")
    settings = json.loads((path / "config.json").read_text())
    del settings["start_noise"]
    (path / "config.json").write_text(json.dumps(settings))
    assert comparison.differing(comparison.find()).columns.empty


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {"slow", "fast/run", "student"}),
        ("speed_weight=0.2", {"slow"}),
        ("speed_weight=2e-1", {"slow"}),
        ("speed_weight=0.5 run", {"fast/run"}),
        ("quality_weights.clip=3", {"student"}),
        ("schedule=paced", {"slow", "fast/run"}),
        ("DIMO", {"student"}),
        ("frogs", {"slow"}),
        ("frogs dimo", set()),
    ],
)
def test_filters_compare_settings_and_texts(make, text, expected):
    make("slow", count=1, speed_weight=0.2, card={"start": "Frogs only"})
    make("fast/run", count=1, speed_weight=0.5)
    make("student", count=1, method="dimo", schedule="power", speed_weight=0.0, quality_weights={"clip": 3.0})
    assert set(names(comparison.matching(comparison.find(), text))) == expected


def test_a_filter_by_an_unknown_setting_names_the_nearest(make):
    make("a", count=1)
    with pytest.raises(ValueError, match="no run has a setting 'sped_weight'; nearest: 'speed_weight'"):
        comparison.matching(comparison.find(), "sped_weight=1")


def test_curves_of_all_runs_lie_over_each_other(make):
    make("group/a/run", count=30)
    make("group/b/run", count=12, older=60)
    make("group/c/run", count=0, older=120)
    runs = comparison.find()
    figure = comparison.overlay(runs)
    clip = [trace for trace in figure.data if trace.yaxis == "y"]
    assert [(trace.name, trace.meta, len(trace.x)) for trace in clip] == [
        ("a", "group/a/run", 30), ("b", "group/b/run", 12),
    ]  # fmt: skip
    assert float(clip[0].y[0]) == pytest.approx(0.1) and float(clip[0].y[-1]) == pytest.approx(2.55)  # mean of 2.1 to 3
    assert [trace.name for trace in figure.data if trace.showlegend] == ["a", "b"]
    assert clip[0].line.color != clip[1].line.color
    with pytest.raises(ValueError, match="none of the runs has records"):
        comparison.overlay(comparison.find(["group/c"]))


def test_twenty_runs_have_twenty_looks(make):
    for number in range(20):
        make(f"run-{number}", count=1)
    figure = comparison.overlay(comparison.find())
    assert len({(trace.line.color, trace.line.dash) for trace in figure.data}) == 20


def test_text_tables_fit_the_window(make):
    make("a_folder_with_a_long_name/and_one_below_it/seed=1")
    make("b", method="sdtt")
    frame = comparison.shown(comparison.table(comparison.find()))
    whole = comparison.as_text(frame)
    assert "a_folder_with_a_long_name/and_one_below_it/seed=1" in whole and "in a wider window" not in whole
    for width in (60, 100):
        lines = comparison.as_text(frame, width).splitlines()
        assert max(map(len, lines[:-1])) <= width
        assert "seed=1" in "".join(lines) and "..." in "".join(lines)
    assert "last change" in comparison.as_text(frame, 60).splitlines()[-1]


def test_every_part_of_the_browser_follows_the_filter(make):
    make("slow", speed_weight=0.2)
    make("fast", speed_weight=0.5)
    make("faster", speed_weight=0.5, seed=1)
    browser = run_browser(comparison.find())
    (box, message), cards, settings, curves, errors = browser.children[0].children, *browser.children[1:]
    visible = lambda: {trace.meta for trace in curves.data if trace.visible}  # noqa: E731
    assert message.value == "3 of 3 runs" and visible() == {"slow", "fast", "faster"}
    assert "speed_weight" in settings.value and "seed" in settings.value
    box.value = "speed_weight=0.5"
    assert message.value == "2 of 3 runs" and visible() == {"fast", "faster"}
    assert "slow" not in cards.value and "faster" in cards.value
    assert "speed_weight" not in settings.value and "seed" in settings.value
    box.value = "sped_weight=0.5"
    assert "nearest: 'speed_weight'" in message.value and visible() == {"fast", "faster"}
    box.value = "nothing"
    assert message.value == "0 of 3 runs" and visible() == set() and cards.value == ""
    assert errors.outputs == ()
