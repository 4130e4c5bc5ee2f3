"""The surrogate against a slow loop, the KL penalties against autograd and definitions."""

import math

import pytest
import torch
from torch import Tensor

from speedrl_lab.objective import clipped_surrogate, entropy, forward_kl, kl_penalty, reverse_kl


def logits(seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(40, 12, generator=torch.Generator().manual_seed(seed)) * scale


def test_the_surrogate_equals_a_slow_loop():
    rng = torch.Generator().manual_seed(0)
    new, old = (torch.randn(200, generator=rng) * 0.3 - 2 for _ in range(2))
    advantage = torch.randn(200, generator=rng)
    value, ratio, acts = clipped_surrogate(new, old, advantage, 0.2)
    for row in range(200):
        r, a = math.exp(float(new[row]) - float(old[row])), float(advantage[row])
        assert float(ratio[row]) == pytest.approx(r, rel=1e-4)
        assert float(value[row]) == pytest.approx(min(r * a, min(max(r, 0.8), 1.2) * a), rel=1e-4, abs=1e-6)
        assert bool(acts[row]) == ((a > 0 and r > 1.2) or (a < 0 and r < 0.8))
    assert 0 < int(acts.sum()) < 200


@pytest.mark.parametrize("shift, advantage, gradient", [(0.5, 1.0, False), (0.5, -1.0, True),
                                                        (-0.5, 1.0, True), (-0.5, -1.0, False)])  # fmt: skip
def test_the_clip_stops_the_gradient_where_it_acts(shift, advantage, gradient):
    new = torch.tensor([shift], requires_grad=True)
    value, _, acts = clipped_surrogate(new, torch.zeros(1), torch.tensor([advantage]), 0.2)
    value.sum().backward()
    assert bool(new.grad.abs().sum() > 0) == gradient and bool(acts) != gradient


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    new = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantage = torch.tensor([0.7, -1.3])
    value, ratio, acts = clipped_surrogate(new, new.detach(), advantage, 0.2)
    value.sum().backward()
    assert torch.allclose(new.grad, advantage) and ratio.tolist() == [1, 1] and not acts.any()


def test_forward_kl_has_the_gradient_of_the_cross_entropy():
    policy = logits(1).double().requires_grad_(True)
    reference = logits(2).double().log_softmax(-1)
    kl = torch.autograd.grad(forward_kl(policy.log_softmax(-1), reference).sum(), policy)[0]
    target = reference.exp()
    entropy_loss = torch.nn.functional.cross_entropy(policy, target, reduction="sum")
    assert torch.allclose(kl, torch.autograd.grad(entropy_loss, policy)[0], atol=1e-12)
    assert torch.allclose(kl, policy.detach().softmax(-1) - target, atol=1e-12)


@pytest.mark.parametrize("name, direction", [("cross_entropy", "forward"), ("exact", "reverse")])
def test_kl_equals_its_definition(name, direction):
    policy, reference = logits(3).log_softmax(-1), logits(4).log_softmax(-1)
    left, right = (reference, policy) if direction == "forward" else (policy, reference)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=left), torch.distributions.Categorical(logits=right)
    )
    result = kl_penalty(policy, reference, name)
    assert torch.allclose(result, expected, atol=1e-5)
    assert (result > 0).all()
    assert float(kl_penalty(policy, policy, name).abs().max()) == 0.0


@pytest.mark.parametrize("kl", [forward_kl, reverse_kl])
def test_kl_stays_finite_with_extreme_logits(kl):
    policy = logits(5, 200.0).requires_grad_(True)
    value = kl(policy.log_softmax(-1), logits(6, 200.0).log_softmax(-1))
    value.sum().backward()
    assert value.isfinite().all() and (value >= -1e-4).all()
    assert policy.grad.isfinite().all()


def test_reverse_kl_gradient_equals_finite_differences():
    reference = logits(8)[:2].double().log_softmax(-1)
    assert torch.autograd.gradcheck(
        lambda z: reverse_kl(z.log_softmax(-1), reference), logits(7)[:2].double().requires_grad_(True)
    )


def test_entropy_by_hand():
    assert float(entropy(torch.full((1, 8), -math.log(8)))[0]) == pytest.approx(math.log(8))
    certain = torch.tensor([[0.0, -200.0]])
    assert float(entropy(certain)[0]) == pytest.approx(0.0, abs=1e-6)


def test_unknown_estimators_are_refused():
    with pytest.raises(ValueError, match="kl_estimator='k3': expected 'cross_entropy' or 'exact'"):
        kl_penalty(logits(0), logits(1), "k3")
