"""The moving average of weights, against a slow loop over numbers."""

import pytest
import torch
from conftest import randomize
from torch import nn

from speedrl_lab.average import Average, interpolate, mix
from speedrl_lab.generators import load_generator
from speedrl_lab.pace import PaceHead


def line(value: float = 1.0) -> nn.Linear:
    """A layer of one weight and no bias."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_the_mean_is_that_of_a_slow_loop(decay):
    values = torch.randn(30, generator=torch.Generator().manual_seed(0)).tolist()
    layer = line(5.0)
    average, slow = Average(layer, decay), 5.0
    for k, value in enumerate(values):
        nn.init.constant_(layer.weight, value)
        average.update(layer)
        keep = min(decay, (k + 1) / (k + 10))
        slow = keep * slow + (1 - keep) * value
        assert float(average.means["weight"]) == pytest.approx(slow, abs=1e-6)
    average.copy_to(layer)
    assert float(layer.weight.detach()) == pytest.approx(slow, abs=1e-6)


def test_a_constant_is_its_own_mean():
    layer = line(0.1)
    average = Average(layer, 0.99)
    for _ in range(50):
        average.update(layer)
    assert float(average.means["weight"]) == pytest.approx(0.1, abs=1e-7)


def test_only_trainable_parameters_are_averaged_and_the_module_is_left_alone():
    module = randomize(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), 0)
    module[0].requires_grad_(False)
    average = Average(module, 0.9)
    assert set(average.means) == {"1.weight", "1.bias"}
    before = {name: value.clone() for name, value in module.state_dict().items()}
    average.update(module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not any(mean.requires_grad for mean in average.means.values())
    other = randomize(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), 1)
    frozen = other[0].weight.clone()
    average.copy_to(other)
    assert torch.equal(other[1].weight, module[1].weight) and torch.equal(other[0].weight, frozen)


def test_half_precision_is_averaged_in_float32():
    """In bfloat16 a step of 1e-3 from 1 would round to nothing."""
    layer = line(1.0).to(torch.bfloat16)
    average = Average(layer, 0.999)
    average.updates = 100_000  # long past the warm-up
    nn.init.constant_(layer.weight, 2.0)
    average.update(layer)
    assert average.means["weight"].dtype == torch.float32
    assert float(average.means["weight"]) == pytest.approx(1.001, abs=1e-6)
    average.copy_to(layer)
    assert layer.weight.dtype == torch.bfloat16


def test_it_goes_on_from_a_file_bit_for_bit(tmp_path):
    module = nn.Linear(4, 4)
    through = Average(module, 0.99)
    for seed in range(5):
        through.update(randomize(module, seed))
    torch.save(through.state_dict(), tmp_path / "average.pt")
    resumed = Average(randomize(nn.Linear(4, 4), 9), 0.99)
    resumed.load_state_dict(torch.load(tmp_path / "average.pt", weights_only=True))
    for seed in range(5, 9):
        randomize(module, seed)
        through.update(module)
        resumed.update(module)
    assert resumed.updates == through.updates == 9
    assert all(torch.equal(resumed.means[name], through.means[name]) for name in through.means)


def test_wrong_decays_and_foreign_states_are_refused():
    for decay in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"decay={decay}: expected 0"):
            Average(line(), decay)
    with pytest.raises(ValueError, match="the saved average does not fit this module: 'bias' is in one of them"):
        Average(line(), 0.9).load_state_dict(Average(nn.Linear(1, 1), 0.9).state_dict())


def test_a_module_moves_a_share_of_the_way_to_another():
    left, right, start = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)
    randomize(left, 0), randomize(right, 1), randomize(start, 0)
    interpolate(left, right, 0.25)
    assert torch.allclose(left.weight, 0.75 * start.weight + 0.25 * right.weight)
    assert torch.allclose(left.bias, 0.75 * start.bias + 0.25 * right.bias)
    with pytest.raises(ValueError, match="the modules differ in 'weight'"):
        interpolate(left, nn.Linear(4, 2), 0.5)
    with pytest.raises(ValueError, match="the modules differ in 'bias'"):
        interpolate(left, nn.Linear(3, 2, bias=False), 0.5)


def test_policies_are_mixed_with_what_either_of_them_has_alone():
    left, right, start = (load_generator("tiny") for _ in range(3))
    randomize(right.policy, 5)
    left.pace, right.pace, right.revises = None, PaceHead(), True
    mix(left, right, 0.25)
    assert left.pace is right.pace and left.revises
    for mixed, mine, other in zip(*(g.policy.parameters() for g in (left, start, right)), strict=True):
        assert torch.allclose(mixed, 0.75 * mine + 0.25 * other)
    with pytest.raises(ValueError, match="share=1.5: expected a share of the other policy from 0 to 1"):
        mix(left, right, 1.5)
