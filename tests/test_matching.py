"""Token matching: its gradient against autograd."""

import pytest
import torch
from conftest import make_toy

from speedrl_lab.generator import StepInfo, guided_logits
from speedrl_lab.matching import Matcher, masked_share
from speedrl_lab.student import iteration_keys, mixed_kl

PROMPTS = ["a dog", "two cats", "a frog left of a pig"]


def test_masked_share_covers_everything_and_falls():
    share = masked_share(torch.linspace(0.001, 0.999, 50))
    assert share[0] > 0.99 and share[-1] < 0.05 and bool((share.diff() < 0).all())


@pytest.mark.parametrize("share", [0.0, 1.0, -0.2])
def test_the_pull_is_the_gradient_of_the_divergence(share):
    """What is handed to the student is d divergence / d auxiliary logits, by autograd."""
    student = make_toy()
    matcher = Matcher(make_toy(seed=1), 2.0, share, 0.01)
    matcher.auxiliary = make_toy(seed=9)
    rng = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, (6, 4), generator=rng)
    cond, keys = student.encode(PROMPTS * 2), iteration_keys(0, 3, 6, tokens.device)
    gradient, divergence = matcher.pull(tokens, cond, keys)
    state, masked = matcher.remask(tokens, keys, 0)
    assert bool((state[masked] == 4).all()) and torch.equal(state[~masked], tokens[~masked])
    logits = matcher.auxiliary.logits(state, cond, StepInfo(0, 1)).detach().requires_grad_()
    teacher = guided_logits(matcher.teacher, state, cond, 2.0, StepInfo(0, 1)).log_softmax(-1).detach()
    flat = logits.log_softmax(-1).flatten(0, 1), teacher.flatten(0, 1)
    mixed_kl(*flat, share).unflatten(0, (6, 4))[masked].mean().backward()
    assert torch.allclose(gradient / tokens.numel(), logits.grad, atol=1e-6)
    assert float(gradient.abs().sum()) > 0
    reverse = mixed_kl(*flat, 1.0).detach().unflatten(0, (6, 4))
    assert divergence == pytest.approx(float(reverse[masked].mean()), rel=1e-4)


def test_nothing_pulls_where_samples_are_the_teachers():
    """The auxiliary model starts as the teacher: without guidance they agree."""
    matcher = Matcher(make_toy(), 1.0, 0.3, 0.01)
    tokens = torch.randint(3, (6, 4), generator=torch.Generator().manual_seed(0))
    gradient, divergence = matcher.pull(tokens, make_toy().encode(PROMPTS * 2), iteration_keys(0, 0, 6, tokens.device))
    assert float(gradient.abs().max()) < 1e-6 and divergence == pytest.approx(0.0, abs=1e-6)
