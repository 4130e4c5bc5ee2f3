"""Rewards into advantages, against numbers worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from speedrl_lab.advantage import combine, correlation, group_centered, z_score

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
