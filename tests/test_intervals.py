"""Bootstraps over prompts and trainings against their formulas, and passes against a slow loop."""

import math

import numpy as np
import pandas as pd
import pytest

from speedrl_lab import intervals


def frame_of(values: np.ndarray, model: str = "base", budget: int = 4, forwards: float | None = None) -> pd.DataFrame:
    """A frame of accuracies (trainings, prompts): two sampling seeds of two equal samples each."""
    rows = [
        {"model": model, "budget": budget, "seed": seed, "training_seed": training, "prompt": f"prompt {prompt:03d}"}
        | dict.fromkeys(intervals.COSTS, float(budget if forwards is None else forwards))
        | {"accuracy": value, "clip": -value, "size_entropy": value if prompt % 2 else np.nan, "kid": 0.1 * training}
        for (training, prompt), value in np.ndenumerate(values)
        for seed in range(2)
        for _ in range(2)
    ]
    return pd.DataFrame(rows)


def test_one_training_resamples_prompts_alone():
    values = np.random.default_rng(0).random((1, 100))
    row = intervals.frontier(frame_of(values), draws=4000).iloc[0]
    assert row.accuracy == pytest.approx(values.mean())
    assert row.accuracy_high - row.accuracy_low == pytest.approx(2 * 1.96 * values.std() / 10, rel=0.1)
    assert "color" not in row  # a frame of fewer judges gives a table of fewer


def test_intervals_include_the_spread_between_trainings():
    """Equal prompts: the variance of the mean is that of the trainings, s^2 / S, without bias."""
    offsets = np.array([-0.2, 0.0, 0.2, 0.1, -0.1])
    values = 0.5 + offsets[:, None] + np.zeros((5, 30))
    resampled = intervals.Resamples(sorted(frame_of(values).prompt.unique()), 20000, np.random.default_rng(0))
    mean, drawn = resampled(frame_of(values), "accuracy")
    assert mean == pytest.approx(0.5)
    assert drawn.var() == pytest.approx(offsets.var(ddof=1) / 5, rel=0.05)


def test_both_levels_add_up():
    rng = np.random.default_rng(1)
    prompts, trainings = rng.normal(0, 1, 60), rng.normal(0, 0.3, 4)
    values = prompts[None] + trainings[:, None]
    frame = frame_of(values)
    _, drawn = intervals.Resamples(sorted(frame.prompt.unique()), 20000, rng)(frame, "accuracy")
    expected = prompts.var() / 60 + trainings.var(ddof=1) / 4
    assert drawn.var() == pytest.approx(expected, rel=0.06)
    alone = intervals.frontier(frame[frame.training_seed == 0]).iloc[0]
    both = intervals.frontier(frame).iloc[0]
    assert both.accuracy_high - both.accuracy_low > alone.accuracy_high - alone.accuracy_low


def test_sets_have_errors_over_trainings():
    row = intervals.frontier(frame_of(np.zeros((3, 4)))).iloc[0]
    assert row.kid == pytest.approx(0.1)
    assert row.kid_high - row.kid == pytest.approx(2 * 0.1 / math.sqrt(3))


def test_missing_values_are_left_out():
    values = np.arange(8.0)[None]
    row = intervals.frontier(frame_of(values)).iloc[0]
    assert row.size_entropy == pytest.approx(np.mean([1, 3, 5, 7]))
    assert 1 <= row.size_entropy_low < row.size_entropy < row.size_entropy_high <= 7
    nothing = frame_of(values).assign(size_entropy=np.nan)
    assert math.isnan(intervals.frontier(nothing).iloc[0].size_entropy_low)


def test_a_frame_without_training_seeds_is_one_training():
    frame = frame_of(np.random.default_rng(0).random((1, 20)))
    assert intervals.frontier(frame.drop(columns="training_seed")).equals(intervals.frontier(frame))


def test_paired_differences_of_one_model_pair_its_trainings():
    """Trainings differ much, but each gains exactly .1 from budget 2 to 4."""
    rng = np.random.default_rng(0)
    values = rng.random((3, 20)) + np.array([0.0, 2.0, 5.0])[:, None]
    frame = pd.concat([frame_of(values, budget=2), frame_of(values + 0.1, budget=4)])
    found = intervals.paired_difference(frame, ("base", 4), ("base", 2), "accuracy")
    assert found == pytest.approx((0.1, 0.1, 0.1))
    other = pd.concat([frame_of(values, budget=2), frame_of(values + 0.1, "tuned", 4)])
    mean, low, high = intervals.paired_difference(other, ("tuned", 4), ("base", 2), "accuracy")
    assert mean == pytest.approx(0.1) and low < -1 and high > 1  # two models were trained apart
    with pytest.raises(ValueError, match="'base' has 3 trainings at one budget and 2 at another"):
        uneven = pd.concat([frame_of(values, budget=2), frame_of(values[:2], budget=4)])
        intervals.paired_difference(uneven, ("base", 4), ("base", 2), "accuracy")


def slow_crossing(passes, quality, wanted) -> float:
    """Walk along the curve in small steps until it is high enough."""
    points = sorted(zip(passes, quality, strict=True))
    if points[0][1] >= wanted:
        return points[0][0]
    for (x0, y0), (x1, y1) in zip(points[:-1], points[1:], strict=True):
        for share in np.linspace(0, 1, 20001):
            if y0 + share * (y1 - y0) >= wanted:
                return x0 + share * (x1 - x0)
    return math.inf


def test_first_crossing_equals_a_slow_loop():
    rng = np.random.default_rng(0)
    passes = rng.permuted(np.tile([1.0, 2.0, 4.0, 8.0, 16.0], (60, 1)), axis=1)  # in any order
    quality, wanted = rng.random((60, 5)), rng.random(60) * 1.3  # rising, falling, some never there
    found = intervals.first_crossing(passes, quality, wanted)
    slow = [slow_crossing(*row) for row in zip(passes, quality, wanted, strict=True)]
    assert np.isinf(found).any() and (found == 1).any()
    assert found == pytest.approx(np.array(slow), abs=2e-3)


def curve(model: str, points: dict[int, float], trainings: int = 1, noise: float = 0.0) -> pd.DataFrame:
    rng = np.random.default_rng(len(model))
    spread = rng.normal(0, noise, (trainings, 40))
    return pd.concat([frame_of(spread + quality, model, budget) for budget, quality in points.items()])


def test_passes_to_reach_the_quality_of_the_base():
    base = curve("base", {4: 0.3, 8: 0.5, 16: 0.7, 32: 0.8})
    tuned = curve("tuned", {1: 0.4, 2: 0.6, 4: 0.75})
    table = intervals.passes_to_reach(pd.concat([base, tuned]), draws=50).set_index(["baseline_budget", "model"])
    assert [table.passes[budget, "base"] for budget in (8, 16, 32)] == pytest.approx([8, 16, 32])
    assert table.passes[8, "tuned"] == pytest.approx(1.5)
    assert table.passes[16, "tuned"] == pytest.approx(2 + 2 * (0.1 / 0.15))
    assert table.ratio[8, "tuned"] == pytest.approx(8 / 1.5)
    assert table.passes[32, "tuned"] == math.inf == table.passes_high[32, "tuned"]
    assert table.ratio[32, "tuned"] == 0 == table.reached[32, "tuned"]
    assert table.passes_low[8, "tuned"] == pytest.approx(1.5) == table.passes_high[8, "tuned"]  # no noise


def test_passes_have_intervals_over_prompts_and_trainings():
    base = curve("base", {4: 0.3, 8: 0.5, 16: 0.7, 32: 0.8}, noise=0.4)
    tuned = curve("tuned", {1: 0.4, 2: 0.6, 4: 0.72}, trainings=3, noise=0.4)
    table = intervals.passes_to_reach(pd.concat([base, tuned]), budgets=[8, 16])
    other = table[table.model == "tuned"]
    assert (other.passes_low < other.passes_high).all()
    assert (other.passes_low <= other.passes).all() and (other.passes <= other.passes_high).all()
    assert (other.reached > 0.1).all() and other.passes_high.iloc[1] == math.inf
    shifted = tuned.assign(accuracy=tuned.accuracy + 0.3 * (tuned.training_seed - 1))
    wide = intervals.passes_to_reach(pd.concat([base, shifted]), budgets=[8])
    assert wide.passes_high[1] > other.passes_high.iloc[0]  # trainings that differ widen it


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"metric": "kid"}, "metric='kid': expected a judge of single images"),
        ({"metric": "psnr"}, "metric='psnr'"),
        ({"baseline": "bse"}, "'bse' at budget 8 is not in the frame"),
        ({"budgets": [9]}, "'base' at budget 9 is not in the frame; there are: .*'base', 8"),
    ],
)
def test_passes_to_reach_refuses_what_it_cannot_answer(arguments, words):
    with pytest.raises(ValueError, match=words):
        intervals.passes_to_reach(curve("base", {8: 0.5, 16: 0.7, 32: 0.8}), **arguments)


def test_passes_to_reach_needs_the_same_prompts():
    base = curve("base", {8: 0.5})
    tuned = curve("tuned", {2: 0.5})
    with pytest.raises(ValueError, match="'tuned' has not all 40 prompts"):
        intervals.passes_to_reach(pd.concat([base, tuned[tuned.prompt != "prompt 000"]]), budgets=[8])
