"""The pace head's inputs and its joint choices against slow loops, and its start."""

import itertools
import math

import pytest
import torch
from conftest import randomize

from speedrl_lab.pace import (
    EXPLORATION,
    FEATURES,
    SCALES,
    SHARES,
    TEMPERATURES,
    PaceHead,
    head_for,
    pace_counts,
    pace_features,
)


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


@pytest.mark.parametrize("temperatures, scales", [(TEMPERATURES, SCALES), ((0.5, 1.0), (1.0,)), ((1.0,), (1.0, 2.0))])
def test_joint_choices_are_products_of_their_parts(temperatures, scales):
    head = randomize(PaceHead(8, temperatures, scales), 0)
    features = torch.randn(3, 2, FEATURES, generator=torch.Generator().manual_seed(4))
    chances = head(features).exp().detach()
    every = list(itertools.product(pace_counts(64).tolist(), temperatures, scales))
    assert chances.shape == (3, 2, len(every)) and torch.allclose(chances.sum(-1), torch.ones(3, 2))
    counts, degrees, guidance = head.decode(torch.arange(len(every)), 64)
    decoded = zip(counts.tolist(), degrees.tolist(), guidance.tolist(), strict=True)
    assert [pytest.approx(choice) for choice in every] == list(decoded)
    sizes = [size for size in (len(SHARES), len(temperatures), len(scales)) if size > 1]
    parts = [part.softmax(-1).detach() for part in head.layers(features).split(sizes, -1)]
    mixed = [(1 - EXPLORATION) * part + EXPLORATION / part.shape[-1] for part in parts]
    indices = itertools.product(*map(range, sizes))
    product = [math.prod(part[..., i] for part, i in zip(mixed, at, strict=True)) for at in indices]
    assert torch.allclose(chances, torch.stack(product, -1), atol=1e-6) and float(chances.std()) > 1e-3


def test_decode_keeps_the_shape():
    head = head_for("adaptive", 0)
    counts, temperatures, scales = head.decode(torch.tensor([[0, 83], [11, 12]]), 4)
    assert counts.tolist() == [[1, 4], [1, 1]]
    assert temperatures == pytest.approx(torch.tensor([[0.5, 1.0], [1.0, 0.5]]))
    assert scales.tolist() == [[1.0, 3.0], [3.0, 1.0]]


def test_a_plain_head_is_what_it_was():
    plain, adaptive = head_for("paced", 1), head_for("adaptive", 1)
    assert plain.config == {"width": 64} and not plain.adaptive and adaptive.adaptive
    assert plain.layers[2].weight.shape == (len(SHARES), 64)
    assert adaptive.layers[2].weight.shape == (len(SHARES) + len(TEMPERATURES) + len(SCALES), 64)
    counts, temperatures, scales = plain.decode(torch.arange(len(SHARES)), 64)
    assert torch.equal(counts, pace_counts(64)) and set(temperatures.tolist()) == set(scales.tolist()) == {1.0}
    assert torch.allclose(adaptive(torch.zeros(1, FEATURES)).exp(), torch.full((1, 84), 1 / 84))
