"""The self-test passes on a healthy generator, and each check catches its own break."""

import importlib
from dataclasses import replace

import pytest
import torch
from conftest import share_of_twos, weights_of

from speedrl_lab import rl
from speedrl_lab.config import SamplerConfig, TrainConfig
from speedrl_lab.objective import clipped_surrogate
from speedrl_lab.rewards.speed import speed_reward

selftest = importlib.import_module("speedrl_lab.selftest")  # the package's name `selftest` is the function

PROMPTS = ["a dog", "two cats", "a frog left of a pig", "a star on a red background", "a key", "a cake"]
REWARDS = {"twos": share_of_twos, "speed": speed_reward}
CONFIG = TrainConfig(
    sampler=SamplerConfig(steps=2), num_groups=3, group_size=4, learning_rate=0.02,
    quality_weights={"twos": 1.0},
)  # fmt: skip
FROZEN = replace(CONFIG, sampler=SamplerConfig(steps=3, schedule="adaptive"), trained="schedule", speed_weight=0.2)
PACED = replace(CONFIG, sampler=SamplerConfig(steps=4, schedule="paced"), speed_weight=0.2)


K1, EPOCHS = replace(CONFIG, kl_estimator="k1"), replace(CONFIG, inner_epochs=3)


@pytest.mark.parametrize("config", [CONFIG, PACED, K1, EPOCHS, FROZEN, replace(FROZEN, trained="policy")])
def test_a_healthy_generator_passes_untouched(toy, config):
    generator = toy()
    before = weights_of(generator)
    table = selftest.selftest(generator, config, PROMPTS, REWARDS)
    assert list(table.columns) == ["name", "value", "passed"] and table.passed.all()
    assert len(table) == (9 if config.speed_weight else 8)
    assert torch.equal(weights_of(generator), before) and generator.pace is None


def test_the_embedded_generator_passes(emoji):
    rewards = {"low": lambda images, prompts, t: (t.tokens < 500).float().mean(1), "speed": speed_reward}
    config = replace(PACED, quality_weights={"low": 1.0}, learning_rate=1e-3)
    assert selftest.selftest(emoji, config, PROMPTS, rewards).passed.all()


def failure(generator, config=CONFIG, rewards=REWARDS) -> str:
    with pytest.raises(RuntimeError, match="^self-test failed: ") as error:
        selftest.selftest(generator, config, PROMPTS, rewards)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_wrong_replay_is_caught(toy, monkeypatch):
    true = selftest.trajectory_log_prob
    monkeypatch.setattr(selftest, "trajectory_log_prob", lambda *args, **more: true(*args, **more) * 1.01)
    assert "replay returns the stored log-probability" in failure(toy())


def test_a_policy_that_changed_since_its_rollout_is_caught(toy, monkeypatch):
    def rollout_then_drift(generator, *args, **more):
        drawn = rl.rollout(generator, *args, **more)
        with torch.no_grad():
            for parameter in generator.policy.parameters():
                parameter.mul_(1.5)
        return drawn

    monkeypatch.setattr(selftest, "rollout", rollout_then_drift)
    assert "ratio is 1 before the first update" in failure(toy())


def test_a_wrong_reference_is_caught(toy, monkeypatch):
    class Elsewhere(rl.Learner):
        def __init__(self, generator, config):
            super().__init__(generator, config)
            with torch.no_grad():
                for parameter in self.reference.policy.parameters():
                    parameter.mul_(0.5)

    monkeypatch.setattr(selftest, "Learner", Elsewhere)
    assert "KL is 0 at the start" in failure(toy())


def test_a_frozen_network_that_moves_is_caught(toy, monkeypatch):
    class Leaking(rl.Learner):
        def update(self, drawn, advantages):
            with torch.no_grad():
                next(self.generator.policy.parameters()).add_(1e-3)
            return super().update(drawn, advantages)

    monkeypatch.setattr(selftest, "Learner", Leaking)
    assert "the network stays as it is" in failure(toy(), FROZEN)


def test_a_schedule_that_does_not_move_is_caught(toy, monkeypatch):
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)
    assert "ratio is not 1 after an update" in failure(toy(), FROZEN)


def test_a_policy_that_does_not_move_is_caught(toy, monkeypatch):
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)
    assert "KL is not 0 after an update" in failure(toy())


def test_an_inert_clip_is_caught(toy, monkeypatch):
    def unclipped(log_prob, old_log_prob, advantage, clip_range):
        return clipped_surrogate(log_prob, old_log_prob, advantage, 1e9)

    monkeypatch.setattr(selftest, "clipped_surrogate", unclipped)
    assert "the clip fires on forced ratios" in failure(toy())


def test_equal_noise_in_every_iteration_is_caught(toy, monkeypatch):
    true = rl.sample
    monkeypatch.setattr(rl, "sample", lambda *args, seed: true(*args, seed=0))
    assert "noise differs between iterations" in failure(toy())


def test_a_constant_reward_is_caught(toy):
    flat = {"twos": lambda images, prompts, trajectory: torch.ones(len(prompts))}
    assert "some group has a signal" in failure(toy(), rewards=flat)


def test_a_pace_that_never_varies_is_caught(toy, monkeypatch):
    monkeypatch.setattr("speedrl_lab.pace.EXPLORATION", 0.0)
    generator = toy(pace=True)
    with torch.no_grad():
        generator.pace.layers[2].weight.zero_()
        generator.pace.layers[2].bias.copy_(torch.tensor([0.0, 0, 0, 0, 0, 0, 60]))
    assert "passes vary, so that speed can act" in failure(generator, PACED)


def test_a_forgotten_optimizer_step_is_caught(toy, monkeypatch):
    class Idle(rl.Learner):
        def update(self, drawn, advantages):
            measured = super().update(drawn, advantages)
            self.optimizer_steps -= self.optimizer_steps % 2  # as if one rollout in two were accumulated
            return measured

    monkeypatch.setattr(selftest, "Learner", Idle)
    assert "optimizer steps beyond those planned" in failure(toy(), replace(CONFIG, inner_epochs=1))


def test_wrong_input_is_said_before_any_check(toy):
    with pytest.raises(ValueError, match="reward 'twos' has a weight"):
        selftest.selftest(toy(), CONFIG, PROMPTS, {})
