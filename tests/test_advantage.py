"""Rewards into advantages, against numbers worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from speedrl_lab.advantage import (
    MIN_STD,
    SPEED_FORMS,
    combine,
    correlation,
    group_centered,
    next_multiplier,
    z_score,
)

ROOT2 = math.sqrt(2)


def near(values: Tensor, expected: list[float]) -> bool:
    return torch.allclose(values, torch.tensor(expected, dtype=torch.float32), atol=1e-5)


def test_z_score_centres_in_the_group_and_pools_the_spread():
    values = torch.tensor([1.0, 3.0, 10.0, 10.0])  # centred: -1 1 0 0, pooled std sqrt(1/2)
    assert near(group_centered(values, 2), [-1, 1, 0, 0])
    assert near(z_score(values, 2), [-ROOT2, ROOT2, 0, 0])


def test_nearly_equal_samples_are_not_blown_up():
    values = torch.tensor([0.0, 1.0, 5.0, 5.001])
    scores = z_score(values, 2)
    assert float(scores[2:].abs().max()) < 0.01 < float(scores[:2].abs().min())


def test_a_small_spread_is_divided_by_the_natural_unit():
    values = torch.tensor([1.0, 3.0, 10.0, 10.0])  # pooled std 0.707
    assert near(z_score(values, 2, least_std=2.0), [-0.5, 0.5, 0, 0])
    assert torch.equal(z_score(values, 2, least_std=0.5), z_score(values, 2))
    rewards = {"clip": torch.zeros(8), "speed": -torch.tensor([2.0, 2, 2, 2, 2, 2, 2, 3]) / 64}
    result = combine(rewards, {"clip": 1.0}, 0.5, 8, "none", step_reward=1 / 64)
    # One step more than the others costs speed_weight, however rare it is.
    assert float(result.advantage[:7].mean() - result.advantage[7]) == pytest.approx(0.5, abs=1e-5)
    assert float(combine(rewards, {"clip": 1.0}, 0.5, 8, "none").advantage[7]) < -1


def test_constant_rewards_score_zero():
    assert z_score(torch.full((6,), 0.7), 3).tolist() == [0.0] * 6


@pytest.mark.parametrize(
    "std, expected",
    [
        ("none", [-ROOT2, ROOT2, 0, 0]),
        ("global", [-ROOT2, ROOT2, 0, 0]),
        ("group", [-1, 1, 0, 0]),
    ],
)
def test_one_reward_by_hand(std, expected):
    result = combine({"clip": torch.tensor([1.0, 3.0, 10.0, 10.0])}, {"clip": 1.0}, 0.0, 2, std)
    assert near(result.advantage, expected)
    assert near(result.quality, [-ROOT2, ROOT2, 0, 0])
    assert result.silent_groups == 1 and result.silent_rewards == () and result.kept.all()


def test_quality_and_speed_are_weighed_after_their_z_score():
    rewards = {"clip": torch.tensor([1.0, 3.0, 0.0, 2.0]), "speed": torch.tensor([-0.1, -0.3, -0.3, -0.1])}
    none = combine(rewards, {"clip": 2.0}, 0.5, 2, "none")
    # z: clip -1 1 -1 1, speed 1 -1 -1 1; 2 * clip + 0.5 * speed
    assert near(none.advantage, [-1.5, 1.5, -2.5, 2.5])
    assert near(none.quality, [-2, 2, -2, 2])
    spread = math.sqrt((2 * 1.5**2 + 2 * 2.5**2) / 4)
    scaled = combine(rewards, {"clip": 2.0}, 0.5, 2, "global")
    assert near(scaled.advantage, [-1.5 / spread, 1.5 / spread, -2.5 / spread, 2.5 / spread])
    assert near(combine(rewards, {"clip": 2.0}, 0.5, 2, "group").advantage, [-1, 1, -1, 1])


def test_units_of_a_reward_do_not_matter():
    rng = torch.Generator().manual_seed(0)
    rewards = {"clip": torch.randn(12, generator=rng), "other": torch.randn(12, generator=rng)}
    large = {"clip": rewards["clip"] * 1000 + 5, "other": rewards["other"]}
    weights = {"clip": 1.0, "other": 0.3}
    assert torch.allclose(
        combine(rewards, weights, 0.0, 4).advantage, combine(large, weights, 0.0, 4).advantage, atol=1e-3
    )


def test_the_global_spread_is_one_and_groups_sum_to_zero():
    rewards = {"clip": torch.randn(24, generator=torch.Generator().manual_seed(1)) * 7}
    result = combine(rewards, {"clip": 0.2}, 0.0, 6, "global")
    assert float(result.advantage.square().mean()) == pytest.approx(1.0, abs=1e-4)
    assert near(result.advantage.unflatten(0, (-1, 6)).sum(1), [0, 0, 0, 0])


FILTERED = {"clip": torch.tensor([0.0, 1.0, 2.0, 3.0]), "speed": torch.tensor([9.0, 0.0, 0.0, -9.0])}


def test_clipped_samples_cannot_be_rewarded_for_speed():
    free = combine(FILTERED, {"clip": 0.1}, 1.0, 4, "none")
    assert float(free.advantage[0]) > 0.5  # the worst picture, and the fastest
    clipped = combine(FILTERED, {"clip": 0.1}, 1.0, 4, "none", 0.3, "clip")
    assert float(clipped.advantage[0]) == 0.0
    assert torch.equal(clipped.advantage[1:], free.advantage[1:]) and clipped.kept.all()


def test_clipping_keeps_punishment():
    result = combine({"clip": FILTERED["clip"]}, {"clip": 1.0}, 0.0, 4, "none", 0.3, "clip")
    assert float(result.advantage[0]) < -1


def test_dropped_samples_leave_the_update():
    dropped = combine(FILTERED, {"clip": 0.1}, 1.0, 4, "none", 0.5, "drop")
    assert dropped.kept.tolist() == [False, False, True, True]
    assert dropped.advantage[:2].tolist() == [0.0, 0.0]


def test_the_filter_works_inside_each_group():
    values = torch.tensor([0.0, 1.0, 100.0, 101.0])
    result = combine({"clip": values}, {"clip": 1.0}, 0.0, 2, "none", 0.5, "drop")
    assert result.kept.tolist() == [False, True, False, True]


@pytest.mark.parametrize("low_quality, quantile", [("off", 0.5), ("drop", 0.0), ("clip", 0.0)])
def test_no_quantile_or_no_filter_changes_nothing(low_quality, quantile):
    plain = combine(FILTERED, {"clip": 0.1}, 1.0, 4)
    result = combine(FILTERED, {"clip": 0.1}, 1.0, 4, "global", quantile, low_quality)
    assert torch.equal(result.advantage, plain.advantage) and result.kept.all()


def test_equal_steps_make_speed_silent():
    rewards = {"clip": torch.tensor([0.0, 1.0, 2.0, 3.0]), "speed": torch.full((4,), -0.125)}
    result = combine(rewards, {"clip": 1.0}, 1.0, 2)
    assert result.silent_rewards == ("speed",)
    assert torch.equal(result.advantage, combine(rewards, {"clip": 1.0}, 0.0, 2).advantage)
    assert result.effective_weights["speed"] == 0.0


def test_speed_that_differs_only_between_groups_is_silent():
    rewards = {"clip": torch.randn(4, generator=torch.Generator().manual_seed(2))}
    rewards["speed"] = torch.tensor([-0.1, -0.1, -0.5, -0.5])
    assert combine(rewards, {"clip": 1.0}, 1.0, 2).silent_rewards == ("speed",)


def test_no_signal_at_all_gives_zero_advantages():
    result = combine({"clip": torch.ones(6)}, {"clip": 1.0}, 0.0, 3, "group")
    assert result.advantage.tolist() == [0.0] * 6
    assert result.silent_groups == 2 and result.silent_rewards == ("clip",)


def test_effective_weights_are_correlations_with_the_advantage():
    rng = torch.Generator().manual_seed(3)
    rewards = {"clip": torch.randn(400, generator=rng), "other": torch.randn(400, generator=rng)}
    result = combine(rewards, {"clip": 3.0, "other": 4.0}, 0.0, 8)
    assert set(result.effective_weights) == {"clip", "other"}
    for name, expected in (("clip", 0.6), ("other", 0.8)):  # 3-4-5 for uncorrelated rewards
        assert result.effective_weights[name] == pytest.approx(expected, abs=0.07)
        score = z_score(rewards[name], 8)
        matrix = torch.corrcoef(torch.stack([score, result.advantage]))
        assert result.effective_weights[name] == pytest.approx(float(matrix[0, 1]), abs=1e-4)


def test_correlation_with_a_constant_is_zero():
    assert correlation(torch.ones(5), torch.arange(5.0)) == 0.0
    assert correlation(torch.arange(5.0), -torch.arange(5.0)) == pytest.approx(-1.0)


def test_unknown_spreads_are_refused():
    with pytest.raises(ValueError, match="std='batch': expected 'global', 'group' or 'none'"):
        combine({"clip": torch.rand(4)}, {"clip": 1.0}, 0.0, 2, "batch")


# The forms of speed and the masking, against one slow loop over samples.

NAN = math.nan
SIZE, TOKENS = 4, 64


def slow_z(values: list[float], least_std: float = 0.0) -> list[float]:
    """z_score by loops: NaN, and the only value of a group, score 0 and count for nothing."""
    centered, squares = [0.0] * len(values), []
    for start in range(0, len(values), SIZE):
        known = [i for i in range(start, start + SIZE) if not math.isnan(values[i])]
        if len(known) < 2:
            continue
        mean = sum(values[i] for i in known) / len(known)
        for i in known:
            centered[i] = values[i] - mean
            squares.append(centered[i] ** 2)
    std = math.sqrt(sum(squares) / len(squares)) if squares else 0.0
    return [value / max(std, least_std) if std > MIN_STD else 0.0 for value in centered]


def slow_combine(rewards, weights, speed_weight, form, floor, slowest) -> list[float]:
    """Advantages without a spread taken off (std='none'); NaN where nothing scored the sample."""
    raw = {name: value.tolist() for name, value in rewards.items()}
    count = len(raw["speed"])
    scores = {name: slow_z(raw[name]) for name in weights}
    silent = [all(math.isnan(raw[name][i]) for name in weights) for i in range(count)]
    quality = [sum(weights[name] * scores[name][i] for name in weights) for i in range(count)]
    reached = [form != "hinge" or all(raw[name][i] >= floor[name] for name in floor) for i in range(count)]
    speed = slow_z([raw["speed"][i] if reached[i] and not silent[i] else NAN for i in range(count)], 1 / TOKENS)
    total = []
    for i in range(count):
        if form == "multiplicative":
            steps, most = round(-raw["speed"][i] * TOKENS), round(slowest * TOKENS)
            value = 4 / (1 + math.exp(-quality[i])) * ((most - steps + 1) / most) ** speed_weight
        elif reached[i]:
            value = quality[i] + speed_weight * speed[i]
        else:
            group = range(i - i % SIZE, i - i % SIZE + SIZE)
            value = quality[i] + speed_weight * min([speed[j] for j in group if reached[j]], default=0.0)
        total.append(NAN if silent[i] else value)
    for start in range(0, count, SIZE):
        known = [i for i in range(start, start + SIZE) if not silent[i]]
        mean = sum(total[i] for i in known) / max(1, len(known))
        for i in known:
            total[i] -= mean
    return total


def drawn_rewards(seed: int, masked: bool) -> dict[str, Tensor]:
    """Five groups of four; the third has equal quality, the fourth equal steps, the last hardly a value."""
    rng = torch.Generator().manual_seed(seed)
    clip, other = torch.randn(20, generator=rng), torch.randn(20, generator=rng) * 5
    steps = torch.randint(1, 17, (20,), generator=rng)
    clip[8:12], other[8:12], steps[12:16] = 0.25, 1.0, 7
    if masked:
        clip[[0, 5, 6, 16, 17, 18]] = NAN
        other[[1, 5, 16, 17, 18, 19]] = NAN
    return {"clip": clip, "other": other, "speed": -steps.float() / TOKENS}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", SPEED_FORMS)
@pytest.mark.parametrize("speed_weight", [0.0, 0.4, 2.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_form_equals_a_slow_loop(form, masked, speed_weight, seed):
    rewards, weights, floor = drawn_rewards(seed, masked), {"clip": 1.0, "other": -0.7}, {"clip": -0.2, "other": -4.0}
    options = {"step_reward": 1 / TOKENS, "speed_form": form, "quality_floor": floor, "slowest": 16 / TOKENS}
    plain = combine(rewards, weights, speed_weight, SIZE, "none", **options)
    expected = slow_combine(rewards, weights, speed_weight, form, floor, 16 / TOKENS)
    scored = [not math.isnan(value) for value in expected]
    assert plain.kept.tolist() == scored
    assert near(plain.advantage, [value if seen else 0.0 for value, seen in zip(expected, scored, strict=True)])
    assert plain.masked == {"clip": 6 * masked, "other": 6 * masked, "speed": 0}
    known = [value for i, value in enumerate(expected) if not (math.isnan(value) or (masked and i >= 16))]
    spread = math.sqrt(sum(value**2 for value in known) / len(known))
    scaled = combine(rewards, weights, speed_weight, SIZE, "global", **options)
    assert torch.allclose(scaled.advantage, plain.advantage / spread, atol=1e-5)
    for std in ("global", "group", "none"):
        result = combine(rewards, weights, speed_weight, SIZE, std, 0.3, "clip", **options)
        assert result.advantage.isfinite().all() and result.quality.isfinite().all()
        assert all(math.isfinite(value) for value in result.effective_weights.values())


def test_a_group_spread_counts_only_scored_samples():
    rewards = {"clip": torch.tensor([1.0, 3.0, NAN, NAN])}
    assert near(combine(rewards, {"clip": 1.0}, 0.0, 4, "group").advantage, [-1, 1, 0, 0])
    assert near(combine(rewards, {"clip": 1.0}, 0.0, 4, "global").advantage, [-1, 1, 0, 0])


def test_nan_scores_zero_and_takes_no_part():
    values = torch.tensor([1.0, 3.0, NAN, 7.0, NAN, NAN, NAN, NAN, NAN])  # groups of 3: one pair, one single, none
    assert near(group_centered(values, 3), [-1, 1, 0, 0, 0, 0, 0, 0, 0])
    assert near(z_score(values, 3), [-1, 1, 0, 0, 0, 0, 0, 0, 0])
    assert not z_score(torch.full((4,), NAN), 2).any()


def test_a_sample_is_kept_while_any_quality_reward_scores_it():
    rewards = {"clip": torch.tensor([NAN, NAN, 1.0, 2.0]), "other": torch.tensor([NAN, 5.0, 1.0, 3.0])}
    result = combine(rewards, {"clip": 1.0, "other": 1.0}, 0.0, 4)
    assert result.kept.tolist() == [False, True, True, True]
    assert float(result.advantage[0]) == 0.0 and float(result.advantage[1]) > 0
    assert result.masked == {"clip": 2, "other": 1}
    assert float(result.advantage.sum()) == pytest.approx(0.0, abs=1e-6)


def test_a_sample_that_nothing_scores_changes_nothing_for_the_others():
    rewards = drawn_rewards(4, masked=False)
    rewards["clip"][3] = NAN
    for form in SPEED_FORMS:
        options = {"speed_form": form, "quality_floor": {"other": -4.0}, "slowest": 1.0}
        before = combine(rewards, {"clip": 1.0}, 0.5, SIZE, **options).advantage
        other_speed = {**rewards, "speed": rewards["speed"].clone()}
        other_speed["speed"][3] = -1.0
        assert torch.equal(combine(other_speed, {"clip": 1.0}, 0.5, SIZE, **options).advantage, before)


def test_dropping_leaves_masked_samples_out_of_the_quantile():
    rewards = {"clip": torch.tensor([NAN, NAN, 0.0, 1.0, 2.0, 3.0])}
    result = combine(rewards, {"clip": 1.0}, 0.0, 6, "none", 0.5, "drop")
    assert result.kept.tolist() == [False, False, False, False, True, True]
    assert not result.advantage[:4].any() and (result.advantage[4:] > 0).all()
    assert combine(rewards, {"clip": 1.0}, 0.0, 6, "none", 0.5, "clip").kept.tolist() == [False] * 2 + [True] * 4


def test_effective_weights_leave_masked_samples_out():
    rng = torch.Generator().manual_seed(5)
    rewards = {"clip": torch.randn(40, generator=rng), "other": torch.randn(40, generator=rng)}
    rewards["clip"][::3] = NAN
    result = combine(rewards, {"clip": 1.0, "other": 1.0}, 0.0, 8)
    seen = ~rewards["clip"].isnan()
    pair = torch.stack([z_score(rewards["clip"], 8)[seen], result.advantage[seen]])
    assert result.effective_weights["clip"] == pytest.approx(float(torch.corrcoef(pair)[0, 1]), abs=1e-5)
    unmasked = torch.stack([z_score(rewards["clip"], 8), result.advantage])
    assert result.effective_weights["clip"] != pytest.approx(float(torch.corrcoef(unmasked)[0, 1]), abs=1e-2)


def test_fast_but_wrong_earns_nothing_in_the_multiplicative_form_alone():
    rewards = {"clip": torch.tensor([0.0, 1.0, 1.0, 1.0]), "speed": -torch.tensor([1.0, 8.0, 8.0, 8.0]) / TOKENS}
    options = {"step_reward": 1 / TOKENS, "slowest": 16 / TOKENS}
    additive = combine(rewards, {"clip": 5.0}, 8.0, 4, **options)
    multiplicative = combine(rewards, {"clip": 5.0}, 8.0, 4, speed_form="multiplicative", **options)
    assert float(additive.advantage[0]) > 0 > float(additive.advantage[1])
    assert float(multiplicative.advantage[0]) < 0 < float(multiplicative.advantage[1])


def test_the_multiplicative_form_is_about_the_quality_where_speed_does_not_matter():
    rewards = {"clip": torch.tensor([0.0, 1.0, 0.0, 1.0])}  # no speed reward is needed without a weight
    plain = combine(rewards, {"clip": 0.01}, 0.0, 2, "none")
    product = combine(rewards, {"clip": 0.01}, 0.0, 2, "none", speed_form="multiplicative")
    assert torch.allclose(product.advantage, plain.advantage, rtol=1e-4)


def test_below_the_floor_no_sample_gains_by_speed_nor_by_falling_there():
    # Good, good, bad; equal weighted quality, so that speed alone decides.
    steps = torch.tensor([2.0, 10.0, 1.0, 4.0])
    rewards = {"even": torch.tensor([0.0, 0.0, 0.0, 0.0]), "judge": torch.tensor([1.0, 1.0, 0.0, 1.0])}
    rewards["speed"] = -steps / TOKENS
    result = combine(rewards, {"even": 1.0}, 1.0, 4, "none", speed_form="hinge", quality_floor={"judge": 1.0})
    fast, slow, bad, middle = result.advantage.tolist()
    assert bad == pytest.approx(slow) and slow < middle < fast
    rewards["speed"][2] = -16.0 / TOKENS
    slower = combine(rewards, {"even": 1.0}, 1.0, 4, "none", speed_form="hinge", quality_floor={"judge": 1.0})
    assert torch.equal(slower.advantage, result.advantage)


def test_a_hinge_that_nobody_reaches_makes_speed_silent():
    rewards = drawn_rewards(6, masked=False)
    result = combine(rewards, {"clip": 1.0}, 1.0, SIZE, speed_form="hinge", quality_floor={"clip": 99.0})
    assert result.silent_rewards == ("speed",)
    assert torch.equal(result.advantage, combine(rewards, {"clip": 1.0}, 0.0, SIZE).advantage)


def test_the_lagrangian_is_additive_in_its_multiplier():
    rewards = drawn_rewards(7, masked=True)
    results = [combine(rewards, {"clip": 1.0}, 0.7, SIZE, speed_form=form) for form in ("additive", "lagrangian")]
    assert torch.equal(results[0].advantage, results[1].advantage)


def test_the_multiplier_follows_the_excess_of_steps_from_both_sides():
    assert next_multiplier(0.5, 1.0, 0.1) == pytest.approx(0.6)
    assert next_multiplier(0.5, 0.0, 0.1) == 0.5
    assert next_multiplier(0.01, -0.5, 0.1) == pytest.approx(-0.04)
    multiplier, steps = 0.0, 8.0  # a sampler whose steps fall with the weight settles at the target
    for _ in range(400):
        multiplier = next_multiplier(multiplier, steps / 3.0 - 1, 0.1)
        steps = 8.0 / (1 + multiplier)
    assert steps == pytest.approx(3.0, abs=0.01)


def test_impossible_forms_of_speed_are_refused():
    rewards = drawn_rewards(8, masked=False)
    with pytest.raises(ValueError, match="speed_form='sum': expected one of additive, multiplicative, hinge, lag"):
        combine(rewards, {"clip": 1.0}, 0.0, SIZE, speed_form="sum")
    with pytest.raises(ValueError, match="quality_floor={}: speed_form='hinge' needs"):
        combine(rewards, {"clip": 1.0}, 1.0, SIZE, speed_form="hinge")
    with pytest.raises(ValueError, match="quality_floor names 'detector': expected one of clip, other, speed"):
        combine(rewards, {"clip": 1.0}, 1.0, SIZE, speed_form="hinge", quality_floor={"detector": 1.0})
    with pytest.raises(ValueError, match="slowest=0.0625: a sample took 0.2.* of N steps"):
        combine(rewards, {"clip": 1.0}, 1.0, SIZE, speed_form="multiplicative", slowest=4 / TOKENS)
