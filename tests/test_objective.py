"""The surrogate against a slow loop, the KL penalties against autograd and definitions."""

import math

import pytest
import torch
from torch import Tensor

from speedrl_lab.objective import (
    KL_ESTIMATORS,
    MOST_LOG_RATIO,
    clipped_surrogate,
    entropy,
    forward_kl,
    kl_penalty,
    reverse_kl,
)

SAMPLED = ("k1", "k2", "k3")
CODES = torch.arange(40) % 12


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
    result = kl_penalty(policy, reference, CODES, name)
    assert torch.allclose(result, expected, atol=1e-5)
    assert (result > 0).all()
    assert float(kl_penalty(policy, policy, CODES, name).abs().max()) == 0.0


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


def expected_kl(penalty, seed: int) -> tuple[float, Tensor, dict[str, tuple[float, Tensor]]]:
    """Exact expectation over codes of a penalty's value and of its gradient in the logits, by enumeration;
    and value and gradient of both KL divergences, by autograd from their definitions."""
    z = logits(seed, 1.5)[0].double().requires_grad_(True)  # (V,)
    reference = logits(seed + 100, 1.5)[0].double().log_softmax(-1)
    chances = z.detach().softmax(-1)
    value, gradient = 0.0, torch.zeros_like(z)
    for code, chance in enumerate(chances.tolist()):
        drawn = penalty(z.log_softmax(-1)[None], reference[None], torch.tensor([code]))
        assert drawn.shape == (1,)
        value += chance * float(drawn.detach())
        gradient += chance * torch.autograd.grad(drawn.sum(), z)[0]
    truth = {}
    for name in ("forward", "reverse"):
        q = z.log_softmax(-1)
        kl = sum(
            reference[v].exp() * (reference[v] - q[v]) if name == "forward" else q[v].exp() * (q[v] - reference[v])
            for v in range(len(z))
        )
        truth[name] = (float(kl.detach()), torch.autograd.grad(kl, z)[0])
    return value, gradient, truth


@pytest.mark.parametrize("seed", [10, 11, 12])
@pytest.mark.parametrize(
    "estimator, value_of, gradient_of",
    [
        ("cross_entropy", "forward", "forward"),
        ("exact", "reverse", "reverse"),
        ("k1", "reverse", "reverse"),
        ("k2", None, "reverse"),
        ("k3", "reverse", "forward"),
    ],
)
def test_expected_value_and_gradient_are_the_documented_ones(estimator, value_of, gradient_of, seed):
    value, gradient, truth = expected_kl(lambda p, r, c: kl_penalty(p, r, c, estimator), seed)
    for name, (kl, direction) in truth.items():
        assert (value == pytest.approx(kl, rel=1e-9)) == (name == value_of)
        assert torch.allclose(gradient, direction, atol=1e-10) == (name == gradient_of)


def test_plain_k1_is_inert_and_ours_is_not():
    def plain(policy, reference, codes):
        return (policy - reference).gather(1, codes[:, None]).squeeze(1)

    inert_value, inert, truth = expected_kl(plain, 10)
    value, gradient, _ = expected_kl(lambda p, r, c: kl_penalty(p, r, c, "k1"), 10)
    assert inert_value == pytest.approx(value) == pytest.approx(truth["reverse"][0])
    assert float(inert.abs().max()) < 1e-12 < 0.05 < float(gradient.abs().max())


def test_sampled_estimators_equal_a_slow_loop():
    policy, reference = logits(13).log_softmax(-1), logits(14).log_softmax(-1)
    results = {name: kl_penalty(policy, reference, CODES, name) for name in SAMPLED}
    for row, code in enumerate(CODES.tolist()):
        x = float(policy[row, code]) - float(reference[row, code])
        assert float(results["k1"][row]) == pytest.approx(x, abs=1e-5)
        assert float(results["k2"][row]) == pytest.approx(x * x / 2, abs=1e-5)
        assert float(results["k3"][row]) == pytest.approx(math.exp(-x) - 1 + x, abs=1e-5)
    assert (results["k1"] < 0).any() and (results["k3"] >= 0).all()


@pytest.mark.parametrize("estimator", SAMPLED)
def test_sampled_estimators_are_zero_on_the_reference(estimator):
    policy = logits(3).log_softmax(-1).requires_grad_(True)
    value = kl_penalty(policy, policy.detach(), CODES, estimator)
    value.sum().backward()
    assert not value.any() and not policy.grad.any()


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("reference_is", ["far", "without some codes", "certain"])
def test_every_penalty_survives_logits_that_differ_by_ten_thousand(estimator, reference_is):
    policy = (logits(5).sign() * 5e3).requires_grad_(True)
    other = -(logits(5).sign() * 5e3)
    if reference_is == "without some codes":
        other[:, ::2] = -math.inf
    if reference_is == "certain":
        other = torch.full_like(other, -math.inf)
        other[:, 3] = 0.0
    value = kl_penalty(policy.log_softmax(-1), other.log_softmax(-1), CODES, estimator)
    value.sum().backward()
    assert value.isfinite().all() and policy.grad.isfinite().all()
    assert float(value.detach().abs().max()) > 1e3  # far is far


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_codes_that_the_policy_itself_cannot_draw_give_no_nan(estimator):
    policy = logits(5)
    policy[:, ::3] = -math.inf
    policy.requires_grad_(True)
    codes = torch.ones(40, dtype=torch.int64)
    value = kl_penalty(policy.log_softmax(-1), policy.detach().log_softmax(-1), codes, estimator)
    value.sum().backward()
    assert float(value.detach().abs().max()) < 1e-6 and policy.grad.isfinite().all()
    assert entropy(policy.detach().log_softmax(-1)).isfinite().all()


def test_k3_is_flat_only_where_its_exponential_would_overflow():
    for gap, pulls in ((MOST_LOG_RATIO - 1, True), (MOST_LOG_RATIO + 1, False), (-MOST_LOG_RATIO - 1, True)):
        policy = torch.tensor([[-30.0]], requires_grad=True)
        value = kl_penalty(policy, torch.tensor([[-30.0 + gap]]), torch.tensor([0]), "k3")
        value.sum().backward()
        assert bool(policy.grad.any()) == pulls
        x = -min(gap, MOST_LOG_RATIO)
        assert float(value.detach()) == pytest.approx(math.exp(-x) - 1 + x, rel=1e-5)


def test_unknown_estimators_are_refused():
    message = "kl_estimator='k4': expected one of cross_entropy, exact, k1, k2, k3"
    with pytest.raises(ValueError, match=message):
        kl_penalty(logits(0), logits(1), CODES, "k4")
