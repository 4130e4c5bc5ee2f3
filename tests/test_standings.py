"""Sentences, tables of equal quality and paired differences follow from the frames they are given."""

import numpy as np
import pandas as pd
import pytest

from speedrl_lab import standings
from speedrl_lab.intervals import frontier

PROMPTS = [f"prompt {number}" for number in range(40)]


def table_of(points: dict[tuple[str, int, float], tuple], judge: str = "accuracy") -> pd.DataFrame:
    """A frontier of (model, budget, passes): (value, low, high)."""
    rows = [
        {"model": model, "budget": budget, "forwards": passes, judge: value, f"{judge}_low": low, f"{judge}_high": high}
        for (model, budget, passes), (value, low, high) in points.items()
    ]
    return pd.DataFrame(rows)


def samples_of(accuracy: dict[str, dict[int, float]]) -> pd.DataFrame:
    """A frame of `score_samples`: the first share of the prompts is right; seconds are a hundredth of the passes."""
    rows = [
        {"model": model, "budget": budget, "seed": 0, "training_seed": 0, "prompt": prompt, "steps": budget,
         "forwards": float(budget), "seconds_loop": budget / 100, "seconds_total": budget / 100 + 0.05,
         "accuracy": float(number < share * len(PROMPTS)), "kid": 1 - share}
        for model, points in accuracy.items() for budget, share in points.items()
        for number, prompt in enumerate(PROMPTS)
    ]  # fmt: skip
    return pd.DataFrame(rows)


SAMPLES = samples_of({
    "base": {1: 0.1, 4: 0.4, 8: 0.6, 16: 0.8},
    "ours": {1: 0.3, 2: 0.6, 4: 0.7},
    "rival": {1: 0.5, 2: 0.5, 4: 0.6},
})  # fmt: skip


def test_a_rival_that_wins_is_named_with_its_lead_and_the_overlap():
    table = table_of({
        ("ours", 1, 1.0): (0.30, 0.28, 0.32), ("ours", 4, 4.0): (0.70, 0.65, 0.75),
        ("first", 1, 1.0): (0.20, 0.1, 0.3), ("second", 1, 1.0): (0.50, 0.48, 0.52),
        ("second", 4, 4.0): (0.72, 0.68, 0.76), ("first", 4, 4.0): (0.60, 0.55, 0.65),
    })  # fmt: skip
    tally, one, four = standings.verdicts(table, ["ours"], ["accuracy"])
    assert tally == ("A rival wins 2 of 2 comparisons with ours (judge and number of passes), "
                     "1 of them with 95% intervals that do not overlap.")  # fmt: skip
    assert one == ("Exact object counts, 1 pass: second wins by 0.2 (second 0.5 [0.48, 0.52] against "
                   "ours 0.3 [0.28, 0.32]); the intervals do not overlap.")  # fmt: skip
    assert "4 passes: second wins by 0.02" in four and four.endswith("the intervals overlap.")


def test_no_rival_wins_is_said_too_and_a_tie_is_no_win():
    table = table_of({("ours", 1, 1.0): (0.5, 0.4, 0.6), ("other", 1, 1.0): (0.5, 0.4, 0.6)})
    tally, sentence = standings.verdicts(table, ["ours"], ["accuracy"])
    assert tally.startswith("A rival wins 0 of 1") and sentence == "Exact object counts: no rival wins at 1 pass."
    alone = table[table.model == "ours"]
    assert standings.verdicts(alone, ["ours"], ["accuracy"]) == ["There is no rival at any number of passes."]


def test_less_is_better_for_judges_of_sets_and_unknown_intervals_are_said():
    nan = float("nan")
    table = table_of({("ours", 2, 2.0): (0.02, nan, nan), ("rival", 2, 2.0): (0.01, 0.0, 0.02)}, "kid2")
    assert standings.verdicts(table, ["ours"], ["kid2"])[1].endswith("; one has no interval.")
    table = table_of({("ours", 2, 2.0): (0.01, 0.0, 0.02), ("rival", 2, 2.0): (0.02, 0.01, 0.03)}, "kid2")
    assert standings.standings(table, ["ours"], ["kid2"]).ahead.tolist() == pytest.approx([-0.01])


def test_a_point_counts_at_the_passes_that_cover_it():
    """Own pace at 3.3 passes stands at 4; more passes than ours were ever given are no comparison."""
    table = table_of({
        ("ours", 2, 2.0): (0.4, 0.3, 0.5), ("ours", 4, 4.0): (0.6, 0.5, 0.7),
        ("ours, own pace", 8, 3.3): (0.65, 0.6, 0.7),
        ("rival", 8, 2.2): (0.5, 0.4, 0.6), ("base", 32, 32.0): (0.9, 0.8, 1.0), ("base", 2, 2.0): (0.1, 0.0, 0.2),
    })  # fmt: skip
    found = standings.standings(table, ["ours", "ours, own pace"], ["accuracy"]).set_index("passes")
    assert found.rival_model.to_dict() == {2: "base", 4: "rival"}
    assert found.our_model[4] == "ours, own pace" and found.ahead[4] == pytest.approx(-0.15)
    alone = standings.standings(table[~table.model.isin(["ours"])], ["ours, own pace"], ["accuracy"])
    assert alone.passes.tolist() == [32], "without whole passes between, the next that was measured"
    with pytest.raises(ValueError, match="'own' is not in the table"):
        standings.standings(table, ["own"])
    with pytest.raises(ValueError, match="no judge 'psnr'"):
        standings.standings(table, ["ours"], ["psnr"])


def test_what_keeps_diversity_and_is_worth_its_cost_is_found():
    table = table_of({
        ("ours", 2, 2.0): (0.7, 0.6, 0.8), ("ours, own pace", 8, 3.4): (0.8, 0.7, 0.9), ("same", 4, 4.0): (0.8, 0.7, 1),
        ("alike", 2, 2.0): (0.9, 0.8, 1.0), ("alike", 4, 4.0): (0.95, 0.9, 1.0), ("alike", 8, 8.0): (0.99, 0.9, 1.0),
    })  # fmt: skip
    table["diversity"] = [18.0, 19.0, 18.5, 14.0, 14.0, 14.0]
    found = standings.best_keeping(table, 17.9, "accuracy")
    assert found.model.tolist() == ["ours", "ours, own pace"], "4 passes buy nothing that 3.4 had not"
    assert found.forwards.tolist() == [2.0, 3.4] and found.accuracy_low.tolist() == [0.6, 0.7]
    assert standings.best_keeping(table, 0.0, "accuracy").forwards.tolist() == [2.0, 4.0, 8.0]
    assert standings.best_keeping(table, 20.0, "accuracy").empty


def test_equal_quality_interpolates_and_speaks():
    found = standings.equal_quality(SAMPLES, frontier(SAMPLES, draws=50), "accuracy")
    cost = found.set_index(["target", "model"]).cost
    assert cost[8, "ours"] == pytest.approx(2.0) and cost[8, "rival"] == pytest.approx(4.0)
    assert np.isinf(cost[16, "ours"]) and set(found.target) == {8, 16}
    text = standings.readable(found).set_index("model")
    assert list(text) == ["base at 8 passes (0.6)", "base at 16 passes (0.8)"]
    assert text.iloc[0, 0].startswith("2 [") and text.iloc[0, 0].endswith("passes, 4x fewer")
    assert text.iloc[1, 1] == "never"


def test_equal_quality_in_seconds_by_sets_and_of_some_models():
    table = frontier(SAMPLES, draws=50)
    seconds = standings.equal_quality(SAMPLES, table, "accuracy", "seconds_loop", ["ours"])
    assert set(seconds.model) == {"ours"} and seconds.cost[0] == pytest.approx(0.02)
    assert "s, 4x faster" in standings.readable(seconds, "seconds_loop").iloc[0, 1]
    sets = standings.equal_quality(SAMPLES, table, "kid")
    assert sets.set_index(["target", "model"]).cost[8, "ours"] == 2 and "cost_low" not in sets
    assert standings.readable(sets).iloc[0, 1] == "2 passes, 4x fewer"
    small = standings.equal_quality(SAMPLES, table, "accuracy", targets=[64])
    assert set(small.target) == {16}, "the largest budget there is"
    with pytest.raises(ValueError, match="baseline 'bass' is not in the frame"):
        standings.equal_quality(SAMPLES, table, baseline="bass")


def test_differences_are_ours_minus_theirs_where_both_were_measured():
    found = standings.differences(SAMPLES, "ours", ["rival", "base"], ["accuracy"])
    values = found.set_index(["rival", "passes"]).difference
    assert set(values.index) == {("rival", 1), ("rival", 2), ("rival", 4), ("base", 1), ("base", 4)}
    paced = SAMPLES[(SAMPLES.model == "rival") & (SAMPLES.budget <= 2)].assign(model="paced")
    paced = paced.assign(budget=4 * paced.budget, forwards=2 + paced.forwards / 2)  # 2.5 and 3 passes, caps 4 and 8
    covered = standings.differences(pd.concat([SAMPLES, paced]), "ours", ["paced"], ["accuracy"])
    assert covered.passes.tolist() == [4] and covered.difference[0] == pytest.approx(0.7 - 0.5)
    assert values["rival", 1] == pytest.approx(-0.2) and values["base", 4] == pytest.approx(0.3)
    text = standings.differences_table(found)
    assert list(text) == ["judge", "passes", "rival", "base"] and text.base[1] == ""
    assert text.rival[0].startswith("-0.2 [")
    assert standings.differences_table(standings.differences(SAMPLES, "ours", [])).empty
