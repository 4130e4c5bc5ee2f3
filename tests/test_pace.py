"""The pace head's inputs against a slow loop, and its start."""

import math

import pytest
import torch

from speedrl_lab.pace import EXPLORATION, FEATURES, SHARES, PaceHead, pace_counts, pace_features


def test_choices_are_shares_of_the_tokens_and_at_least_one():
    assert pace_counts(64).tolist() == [1, 2, 4, 8, 16, 32, 64]
    assert pace_counts(4).tolist() == [1, 1, 1, 1, 1, 2, 4]
    assert pace_counts(1).tolist() == [1] * len(SHARES)


def test_features_equal_a_slow_loop():
    rng = torch.Generator().manual_seed(0)
    entropies = torch.rand(5, 64, generator=rng) * 6
    remaining = torch.tensor([64, 33, 7, 1, 2])
    features = pace_features(entropies, remaining)
    assert features.shape == (5, FEATURES)
    for row, left in enumerate(remaining.tolist()):
        known = entropies[row, :left].tolist()
        nexts = [known[: min(count, left)] for count in pace_counts(64).tolist()]
        means = [sum(part) / len(part) for part in nexts]
        expected = [value / (4 * math.log(2)) for value in means + [max(part) for part in nexts]]
        expected += [1 - left / 64, math.log(left / 64)]
        assert features[row].tolist() == pytest.approx(expected, abs=1e-5)


def test_features_ignore_what_lies_beyond_the_remaining_positions():
    entropies = torch.rand(2, 64, generator=torch.Generator().manual_seed(1))
    changed = entropies.clone()
    changed[:, 20:] = 99.0
    remaining = torch.tensor([20, 3])
    assert torch.equal(pace_features(entropies, remaining), pace_features(changed, remaining))


def test_a_fresh_head_is_indifferent_and_follows_its_seed():
    features = torch.randn(7, FEATURES, generator=torch.Generator().manual_seed(2))
    head = PaceHead().reset(3)
    assert torch.allclose(head(features).exp(), torch.full((7, len(SHARES)), 1 / len(SHARES)))
    first, again, other = (PaceHead().reset(seed).layers[0].weight for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_no_choice_is_ever_forgotten():
    head = PaceHead().reset(0)
    with torch.no_grad():
        head.layers[2].bias.copy_(torch.tensor([0.0, 0, 0, 0, 0, 0, 500]))
        chances = head(torch.randn(5, FEATURES, generator=torch.Generator().manual_seed(3))).exp()
    assert torch.allclose(chances.sum(1), torch.ones(5))
    assert torch.allclose(chances[:, :6], torch.full((5, 6), EXPLORATION / len(SHARES)))


def test_reset_leaves_the_global_generator_alone():
    head = PaceHead()
    before = torch.get_rng_state()
    head.reset(0)
    assert torch.equal(before, torch.get_rng_state())
