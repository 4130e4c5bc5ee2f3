"""Frontiers show means and intervals, keep a model's look, and name the nearest of what they are asked for."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from speedrl_lab import canvas, frontier_plots
from speedrl_lab.evaluate import METRICS, SET_METRICS


def per_seed(models=("base", "tuned"), budgets=(1, 2, 4), seeds=3):
    """A table as `evaluate` makes it; the accuracy of seed s is budget / 10 + s / 100."""
    rows = [
        {
            "model": model, "budget": budget, "seed": seed, "steps": budget, "forwards": 2 * budget,
            "seconds_loop": budget / 100, "seconds_total": budget / 100 + 0.01,
            "accuracy": budget / 10 + seed / 100, "kid": 1 / budget,
        }
        for model in models for budget in budgets for seed in range(seeds)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_frontier_of_seeds_draws_means_and_bands():
    figure = frontier_plots.frontier(per_seed())
    band, line = figure.data[:2]
    assert line.name == "base" and list(line.x) == [2, 4, 8]
    assert np.allclose(line.y, [0.11, 0.21, 0.41])
    assert max(band.y) <= 0.42 + 1e-9 and min(band.y) >= 0.10 - 1e-9 and max(band.y) > 0.41
    assert figure.layout.xaxis.type == "log" and "4" in figure.layout.xaxis.ticktext
    assert "kid: 0.500 [0.500, 0.500]" in line.text[1] and "forwards: 4" in line.text[1]


def test_frontier_takes_given_intervals_as_they_are():
    table = frontier_plots.with_intervals(per_seed())
    table["accuracy_low"], table["accuracy_high"] = 0.0, 1.0
    band = frontier_plots.frontier(table, x="seconds_total").data[0]
    assert set(band.y) == {0.0, 1.0}
    pd.testing.assert_frame_equal(frontier_plots.with_intervals(table), table)


def test_a_single_point_has_an_error_bar():
    figure = frontier_plots.frontier(per_seed(models=["paced"], budgets=[4]))
    assert figure.data[1].error_y.visible and not frontier_plots.frontier(per_seed()).data[1].error_y.visible


def test_frontier_names_the_nearest_metric():
    with pytest.raises(ValueError, match="no 'acuracy' to plot; nearest: 'accuracy'"):
        frontier_plots.frontier(per_seed(), metric="acuracy")
    with pytest.raises(ValueError, match="no 'psnr' to plot"):
        frontier_plots.frontier(per_seed(), metric="psnr")


@pytest.mark.parametrize(
    ("low", "high", "base", "expected"),
    [(1, 16, 2, [1, 2, 4, 8, 16]), (0.03, 0.2, 10, [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1])],
)
def test_log_ticks_are_round_numbers_around_the_data(low, high, base, expected):
    ticks = frontier_plots.log_ticks(low, high, base)
    assert set(np.round(ticks, 9)) <= {*expected, 0.5, 32, 2, 0.005}
    assert min(ticks) <= low and max(ticks) >= high


def test_every_judge_can_be_drawn():
    assert set(frontier_plots.METRICS) == {*METRICS, *SET_METRICS}


def test_hidden_models_keep_the_others_as_they_are():
    both = frontier_plots.frontier(per_seed())
    one = frontier_plots.frontier(per_seed(), models=["tuned"])
    assert [trace.visible for trace in one.data] == [False, False, True, True]
    assert one.data[3].line == both.data[3].line and one.data[3].marker == both.data[3].marker
    assert not any(trace.visible for trace in frontier_plots.frontier(per_seed(), models=[]).data)


def test_bands_can_be_left_out():
    bare = frontier_plots.frontier(per_seed(), bands=False)
    assert len(bare.data[0].x) == 0 and list(bare.data[1].x) == [2, 4, 8]
    single = frontier_plots.frontier(per_seed(budgets=[4]), bands=False)
    assert not single.data[1].error_y.visible


def test_variants_take_the_colour_of_their_model_and_no_two_models_look_alike():
    names = ["base", "base, usual", "a", "a, own pace", *"bcdefgh", "short, own"]
    looks = frontier_plots.looks(names)
    assert looks["base"]["color"] == looks["base, usual"]["color"] and looks["base, usual"]["variant"]
    assert looks["a, own pace"]["color"] == looks["a"]["color"] and not looks["short, own"]["variant"]
    assert len({tuple(look.values()) for look in looks.values()}) == len(names)
    assert {look["color"] for look in looks.values()} == set(canvas.COLORS)


def test_panels_share_one_legend():
    figure = frontier_plots.frontier_panels(per_seed(), ["accuracy", "kid"])
    assert len(figure.data) == 8 and sum(trace.showlegend is not False for trace in figure.data) == 2
    assert figure.layout.yaxis.title.text.startswith("exact") and figure.layout.yaxis2.title.text.startswith("KID")
    assert list(figure.data[-1].y) == [1, 0.5, 0.25] and figure.data[-1].xaxis == "x2"
    with pytest.raises(ValueError, match="no 'kdi' to plot; nearest: 'kid'"):
        frontier_plots.frontier_panels(per_seed(), ["accuracy", "kdi"])


def test_the_print_shows_the_same_lines():
    figure = frontier_plots.frontier_print(per_seed(), ["accuracy", "kid"], models=["tuned"])
    assert len(figure.axes) == 2 and list(figure.axes[1].lines[0].get_ydata()) == [1, 0.5, 0.25]
    assert [line.get_label() for line in figure.axes[0].lines] == ["tuned"]
    filled = len(figure.axes[0].collections)
    assert filled and not frontier_plots.frontier_print(per_seed(), ["kid"], bands=False).axes[0].collections
    many = frontier_plots.frontier_print(per_seed(models="abcde"), ["kid"])
    assert [text.get_text() for text in many.legends[0].get_texts()] == list("abcde")
    assert not frontier_plots.frontier_print(per_seed(), ["kid"], models=[]).axes[0].lines
    assert plt.get_fignums() == []
