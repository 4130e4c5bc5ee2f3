"""Token matching: its gradient against autograd, and inside the Speed-RL loop."""

from dataclasses import asdict, replace

import pytest
import torch
from conftest import make_toy, share_of_twos, weights_of

from speedrl_lab.config import SamplerConfig, TrainConfig
from speedrl_lab.generator import StepInfo, guided_logits
from speedrl_lab.learner import Learner
from speedrl_lab.matching import Matcher, masked_share
from speedrl_lab.rl import rollout, train, weigh
from speedrl_lab.runs import Run
from speedrl_lab.student import iteration_keys, mixed_kl

PROMPTS = ["a dog", "two cats", "a frog left of a pig"]
CONFIG = TrainConfig(
    sampler=SamplerConfig(steps=2), iterations=6, num_groups=2, group_size=4, learning_rate=0.02, save_every=2,
    warmup_iterations=0, quality_weights={"twos": 1.0}, kl_weight=0.0, match_weight=0.7,
)  # fmt: skip
REWARDS = {"twos": share_of_twos}


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


def test_in_an_update_every_token_is_pulled_at_the_step_that_drew_it():
    """With no advantage and no KL the update's gradient is that of the pull on the replayed logits."""
    generator, teacher = make_toy(), make_toy(seed=4)
    drawn = rollout(generator, PROMPTS, REWARDS, CONFIG, iteration=0)
    learner = Learner(generator.copy(), CONFIG, teacher)
    silent = weigh(drawn, CONFIG, learner.weights)
    silent = replace(silent, advantage=torch.zeros_like(silent.advantage))
    keys = iteration_keys(0, 0, len(drawn.prompts), torch.device("cpu"))
    cond = generator.encode(drawn.prompts)
    pull, divergence = Matcher(teacher, CONFIG.match_guidance, 0.0, 0.01).pull(drawn.trajectory.tokens, cond, keys)
    loss = torch.zeros(())
    for row in range(len(drawn.prompts)):
        for position in range(4):
            step = int(drawn.trajectory.reveal_step[row, position])
            state = drawn.trajectory.state(step)[row : row + 1]
            logits = generator.logits(state, generator.encode([drawn.prompts[row]]), StepInfo(step, 2))
            loss = loss + (logits[0, position].log_softmax(-1) * pull[row, position]).sum()
    (CONFIG.match_weight * loss / drawn.trajectory.tokens.numel()).backward()
    wanted = torch.cat([p.grad.flatten() for p in generator.policy.parameters()])
    measured = learner.update(drawn, silent)
    assert measured["divergence"] == pytest.approx(divergence, rel=1e-5)
    assert measured["gradient_norm"] == pytest.approx(float(wanted.norm()), rel=1e-4)


def trained(folder, stop_after: int | None = None) -> torch.Tensor:
    generator = make_toy()
    run = Run.open(folder, asdict(CONFIG), resume=True)
    for record in train(generator, PROMPTS, REWARDS, CONFIG, run, teacher=make_toy(seed=4)):
        assert record["passes"] > record["forwards"] and record["auxiliary_loss"] > 0
        if record["iteration"] == stop_after:
            break
    return weights_of(generator)


@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, stop_after):
    whole = trained(tmp_path / "whole")
    trained(tmp_path / "parts", stop_after)
    assert torch.equal(trained(tmp_path / "parts"), whole)


@pytest.mark.parametrize(
    "changes",
    [{"estimator": "one_step"}, {"sampler": SamplerConfig(steps=2, order="confidence")}],
    ids=["estimator", "order"],
)
def test_matching_needs_the_tokens_own_states(changes):
    with pytest.raises(ValueError, match="match_weight needs"):
        replace(CONFIG, **changes)


def test_passes_are_those_that_were_made(monkeypatch):
    made = [0]
    network = type(make_toy().policy)
    plain = network.forward

    def counted(self, tokens, text):
        made[0] += len(tokens) * (3 if torch.is_grad_enabled() else 1)  # a backward pass is two
        return plain(self, tokens, text)

    monkeypatch.setattr(network, "forward", counted)
    records = list(train(make_toy(), PROMPTS, REWARDS, CONFIG))
    assert sum(record["passes"] for record in records) == made[0]
