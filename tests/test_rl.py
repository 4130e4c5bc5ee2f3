"""The Speed-RL loop: it learns, it learns by the exact gradient, and it says what is wrong."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from conftest import randomize, share_of_twos, weights_of
from test_likelihood import GRIDS, outcomes, probability

from speedrl_lab import rl
from speedrl_lab.advantage import Advantages
from speedrl_lab.config import SamplerConfig, TrainConfig
from speedrl_lab.generator import StepInfo
from speedrl_lab.objective import forward_kl, reverse_kl
from speedrl_lab.pace import PaceHead, head_for
from speedrl_lab.rewards.speed import speed_reward
from speedrl_lab.rl import Learner, Rollout, rollout, sampler_at, train
from speedrl_lab.sampler import sample

PROMPTS = ["a dog", "two cats", "a frog left of a pig", "a star on a red background"]
SAMPLER = SamplerConfig(steps=2, schedule="linear")
PACED = SamplerConfig(steps=4, schedule="paced")
ADAPTIVE = SamplerConfig(steps=4, schedule="adaptive")
TOY = TrainConfig(
    sampler=SAMPLER, iterations=5, num_groups=3, group_size=8, learning_rate=0.02, warmup_iterations=0,
    quality_weights={"twos": 1.0},
)  # fmt: skip
TWOS = {"twos": share_of_twos}
FROZEN = replace(
    TOY, sampler=ADAPTIVE, trained="schedule", iterations=60, num_groups=4, group_size=16, pace_learning_rate=0.03,
)  # fmt: skip


def low_codes(images, prompts, trajectory):
    """A reward for the embedded generator: the share of codes below 500."""
    return (trajectory.tokens < 500).float().mean(1)


def test_the_reward_rises_and_the_reference_stays(toy):
    generator = toy()
    before = weights_of(generator)
    records = list(train(generator, PROMPTS, TWOS, replace(TOY, iterations=40, learning_rate=0.05)))
    start = sum(record["reward"] for record in records[:5]) / 5
    end = sum(record["reward"] for record in records[-5:]) / 5
    assert start < 0.6 and end > start + 0.25
    assert not torch.allclose(weights_of(generator), before)
    assert records[0]["kl"] == pytest.approx(0, abs=1e-6) and records[-1]["kl"] > 0.05


def test_the_embedded_network_learns_too(emoji):
    config = replace(
        TOY, iterations=16, num_groups=4, learning_rate=1e-2, quality_weights={"low": 1.0},
        sampler=SamplerConfig(steps=3), kl_weight=0.0,
    )  # fmt: skip
    records = list(train(emoji, PROMPTS, {"low": low_codes}, config))
    assert records[-1]["reward"] > records[0]["reward"] + 0.15
    assert records[-1]["rewards"]["low"] == pytest.approx(records[-1]["quality"])


def test_a_negative_weight_turns_the_climb_around(toy):
    config = replace(TOY, iterations=25, learning_rate=0.05, quality_weights={"twos": -1.0})
    records = list(train(toy(), PROMPTS, TWOS, config))
    assert records[-1]["rewards"]["twos"] < records[0]["rewards"]["twos"] - 0.15


def test_a_large_kl_weight_holds_the_policy(toy):
    def moved(weight: float, estimator: str) -> float:
        config = replace(TOY, iterations=25, kl_weight=weight, kl_estimator=estimator)
        return list(train(toy(), PROMPTS, TWOS, config))[-1]["kl"]

    for estimator in ("cross_entropy", "exact"):
        assert moved(3.0, estimator) < 0.2 * moved(0.0, estimator)


def all_outcomes(generator) -> Rollout:
    """The toy's 81 outcomes as if they had been drawn, with their log-probabilities."""
    trajectory = outcomes(2, "linear")
    cond = generator.encode(["a dog"] * 81)
    log_prob = torch.zeros(81, 4)
    with torch.no_grad():
        for step in range(2):
            log_probs = generator.logits(trajectory.state(step), cond, StepInfo(step, 2)).log_softmax(-1)
            chosen = log_probs.gather(-1, GRIDS[..., None]).squeeze(-1)
            log_prob = torch.where(trajectory.revealed(step), chosen, log_prob)
    return Rollout(["a dog"] * 81, replace(trajectory, log_prob=log_prob), torch.zeros(81, 3, 2, 2), {})


def gradients(generator) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in generator.policy.parameters()])


def given(advantage: torch.Tensor) -> Advantages:
    return Advantages(advantage, torch.ones_like(advantage, dtype=torch.bool), advantage, {}, 0, ())


@pytest.mark.parametrize("micro_batch_size", [7, 1000])
def test_the_update_follows_the_exact_policy_gradient(toy, micro_batch_size):
    """Every outcome, weighted by its probability, must give the derivative of the expected reward."""
    generator = toy()
    reward = torch.randn(81, generator=torch.Generator().manual_seed(5)) * 0.1
    drawn = all_outcomes(generator)
    expected_reward = sum(
        reward[row] * probability(generator, GRIDS[row], drawn.trajectory.reveal_step[row], SAMPLER)
        for row in range(81)
    )
    exact = torch.autograd.grad(expected_reward, list(generator.policy.parameters()))
    exact = torch.cat([part.flatten() for part in exact])
    weight = drawn.trajectory.log_prob.sum(1).exp() * 81 * 4  # undo the mean over samples and tokens
    learner = Learner(generator, replace(TOY, kl_weight=0.0, micro_batch_size=micro_batch_size))
    measured = learner.update(drawn, given(weight * reward))
    assert 0.01 < measured["gradient_norm"] < 1  # so that nothing was clipped
    assert torch.allclose(gradients(generator), -exact, atol=1e-5)
    assert measured["ratio_deviation"] < 1e-4 and measured["clip_fraction"] == 0


@pytest.mark.parametrize("estimator, divergence", [("cross_entropy", forward_kl), ("exact", reverse_kl)])
def test_the_update_follows_the_kl_at_the_visited_states(toy, estimator, divergence):
    generator, config = toy(), replace(TOY, kl_weight=0.5, kl_estimator=estimator, micro_batch_size=16)
    learner = Learner(generator, config)
    reference = toy()
    drawn = all_outcomes(generator)
    randomize(generator.policy, 9, std=0.7)  # away from the reference
    cond, total = generator.encode(["a dog"] * 81), torch.zeros(())
    for step in range(2):
        state = drawn.trajectory.state(step)
        info = StepInfo(step, 2)
        policy, anchor = (g.logits(state, cond, info).log_softmax(-1) for g in (generator, reference))
        total = total + divergence(policy, anchor.detach())[drawn.trajectory.revealed(step)].sum() / (81 * 4)
    exact = torch.autograd.grad(0.5 * total, list(generator.policy.parameters()))
    exact = torch.cat([part.flatten() for part in exact])
    measured = learner.update(drawn, given(torch.zeros(81)))
    assert measured["kl"] == pytest.approx(float(total.detach()), abs=1e-4) and measured["kl"] > 0.05
    scale = min(1.0, 1.0 / measured["gradient_norm"])
    assert torch.allclose(gradients(generator), exact * scale, atol=1e-5)


def test_micro_batches_change_the_gradient_by_rounding_alone(emoji):
    found = []
    for size in (3, 1000):
        generator = emoji.copy()
        config = replace(TOY, iterations=1, micro_batch_size=size, quality_weights={"low": 1.0}, learning_rate=1e-3)
        record = next(train(generator, PROMPTS, {"low": low_codes}, config))
        found.append((gradients(generator), record["gradient_norm"]))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-3)
    assert torch.allclose(found[0][0], found[1][0], atol=1e-4 * float(found[1][0].abs().max()))


def test_records_hold_every_number(toy):
    names = {
        "iteration", "reward", "quality", "rewards", "rewards_std", "effective_weights", "steps", "forwards",
        "kl", "clip_fraction", "gradient_norm", "diversity", "dropped", "silent_groups", "silent_rewards",
        "learning_rate", "entropy", "approx_kl", "ratio", "ratio_min", "ratio_max", "ratio_deviation",
        "optimizer_steps", "weights", "changed", "masked", "warnings", "seconds", "passes", "practised",
    }  # fmt: skip
    rewards = {**TWOS, "speed": speed_reward}
    config = replace(TOY, iterations=3, warmup_iterations=4)
    records = list(train(toy(), PROMPTS, rewards, config))
    assert [record["iteration"] for record in records] == [1, 2, 3]
    for record in records:
        assert set(record) == names
        assert json.loads(json.dumps(record, allow_nan=False)) == record
        assert set(record["rewards"]) == {"twos", "speed"}
        assert record["steps"] == 2.0 and record["forwards"] == 3 * 8 * 2
        assert record["ratio_deviation"] < 1e-4 and record["seconds"] > 0 and record["diversity"] > 0
    expected = [0.02 * min((index + 1) / 4, 1 - index / 3) for index in range(3)]
    assert [record["learning_rate"] for record in records] == pytest.approx(expected)
    paced = replace(TOY, iterations=1, sampler=PACED, speed_weight=0.5)
    record = next(train(toy(), PROMPTS, rewards, paced))
    assert set(record) == names | {"pace_entropy"}
    assert record["reward"] == pytest.approx(record["quality"] + 0.5 * record["rewards"]["speed"])
    frozen = replace(FROZEN, iterations=1, speed_weight=0.5)
    record = next(train(toy(), PROMPTS, rewards, frozen))
    assert set(record) == names | {"pace_entropy"} and record["kl"] == 0 and record["gradient_norm"] > 0
    assert record["rewards"]["speed"] * 4 * 64 == pytest.approx(-record["forwards"])
    assert record["passes"] == record["forwards"] > record["steps"] * 64 and record["learning_rate"] == 0.03
    record = next(train(toy(), PROMPTS, rewards, replace(frozen, trained="policy")))
    assert record["passes"] == 5 * record["forwards"]  # each state again: policy forward and backward, reference
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_rollouts_depend_on_seed_and_iteration_alone(toy):
    generator = toy()
    first, again, later, other = (
        rl.rollout(generator, PROMPTS, TWOS, replace(TOY, seed=seed), iteration)
        for seed, iteration in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert first.prompts == again.prompts and torch.equal(first.trajectory.tokens, again.trajectory.tokens)
    assert first.prompts[:8] == [first.prompts[0]] * 8 and len(set(first.prompts)) == 3
    for drawn in (later, other):
        assert not torch.equal(first.trajectory.tokens, drawn.trajectory.tokens)
    # The same prompt in two iterations: it is the noise that differs.
    once, twice = (rl.rollout(generator, PROMPTS[:1], TWOS, TOY, iteration) for iteration in (0, 1))
    assert not torch.equal(once.trajectory.tokens, twice.trajectory.tokens)


def test_inner_epochs_make_the_clip_act(toy):
    config = replace(TOY, iterations=6, inner_epochs=4, learning_rate=0.1, kl_weight=0.0)
    records = list(train(toy(), PROMPTS, TWOS, config))
    assert max(record["clip_fraction"] for record in records) > 0.01
    assert max(record["ratio_max"] for record in records) > 1.2 > 1.001 > max(r["ratio_deviation"] for r in records)
    assert min(record["ratio_min"] for record in records) < 0.8
    assert [record["optimizer_steps"] for record in records] == [4, 8, 12, 16, 20, 24]


def test_dropped_samples_are_counted(toy):
    config = replace(TOY, iterations=2, filter_quantile=0.5, low_quality="drop")
    assert all(0 < record["dropped"] < 24 for record in train(toy(), PROMPTS, TWOS, config))


def test_the_speed_reward_lowers_the_steps(toy):
    config = replace(TOY, iterations=25, sampler=PACED, speed_weight=1.0, pace_learning_rate=0.05, learning_rate=1e-3)
    generator = toy()
    records = list(train(generator, PROMPTS, {**TWOS, "speed": speed_reward}, config))
    assert isinstance(generator.pace, PaceHead)
    assert records[0]["steps"] > 2.5 and records[-1]["steps"] < records[0]["steps"] - 0.8
    still = list(train(toy(), PROMPTS, TWOS, replace(config, speed_weight=0.0)))
    assert still[-1]["steps"] > records[-1]["steps"] + 0.4


def test_the_speed_reward_lowers_the_steps_of_the_embedded_network(emoji):
    config = replace(
        TOY, iterations=10, num_groups=2, sampler=SamplerConfig(steps=8, schedule="paced"), speed_weight=1.0,
        pace_learning_rate=0.05, learning_rate=1e-4, quality_weights={"low": 0.1},
    )  # fmt: skip
    records = list(train(emoji, PROMPTS, {"low": low_codes, "speed": speed_reward}, config))
    assert records[-1]["steps"] < records[0]["steps"] - 1


def taken(trajectory, part: int) -> torch.Tensor:
    """What an adaptive head chose, (B, T): part 0 counts, 1 temperatures, 2 scales; 0 where it did not act."""
    chosen = head_for("adaptive", 0).decode(trajectory.pace.clamp(min=0), 4)[part]
    return chosen * (trajectory.pace >= 0)


def mean_taken(trajectory, part: int) -> torch.Tensor:
    return taken(trajectory, part).sum(1) / trajectory.steps


@pytest.mark.parametrize("part, wanted", [(1, 0.5), (1, 1.0), (2, 2.0)], ids=["cold", "warm", "guided"])
def test_a_schedule_learns_what_is_rewarded_and_the_network_stays(toy, part, wanted):
    generator = toy()
    before = weights_of(generator)

    def near(images, prompts, trajectory):
        return -((taken(trajectory, part) - wanted).abs() * (trajectory.pace >= 0)).sum(1) / trajectory.steps

    records = list(train(generator, PROMPTS, {"near": near}, replace(FROZEN, quality_weights={"near": 1.0})))
    assert torch.equal(weights_of(generator)[: len(before)], before) and generator.pace.adaptive
    assert records[0]["reward"] < -0.15 and records[-1]["reward"] > 0.4 * records[0]["reward"]
    assert records[-1]["pace_entropy"] < records[0]["pace_entropy"]
    greedy = sample(generator, PROMPTS * 8, replace(ADAPTIVE, greedy_pace=True), seed=1)
    assert float((mean_taken(greedy, part) - wanted).abs().max()) < 1e-6


def test_a_schedule_learns_from_the_pictures_alone(toy):
    """Colder tokens are likelier ones: the head finds that out through the log-probability of what is drawn."""
    generator = toy()
    likely = {"likely": lambda images, prompts, trajectory: trajectory.log_prob.mean(1)}
    records = list(train(generator, PROMPTS, likely, replace(FROZEN, quality_weights={"likely": 1.0})))
    start, end = (sum(r["reward"] for r in part) / 5 for part in (records[:5], records[-5:]))
    assert end > start + 0.1
    greedy = sample(generator, PROMPTS * 8, replace(ADAPTIVE, greedy_pace=True))
    assert float(mean_taken(greedy, 1).mean()) < 0.6


def test_a_frozen_update_costs_no_passes_and_makes_no_gradient(toy, monkeypatch):
    generator = toy()
    generator.pace = head_for("adaptive", 0)
    learner = Learner(generator, replace(FROZEN, inner_epochs=3))
    drawn = rl.rollout(generator, PROMPTS, TWOS, FROZEN, 0)
    monkeypatch.setattr(type(generator), "logits", None)  # a pass would raise
    learner.update(drawn, given(torch.randn(64, generator=torch.Generator().manual_seed(0))))
    assert all(parameter.grad is None for parameter in generator.policy.parameters())
    held = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in generator.pace.parameters()} and learner.optimizer_steps == 3


def test_a_paced_schedule_learns_on_a_frozen_network_too(toy):
    generator = toy()
    before = weights_of(generator)
    config = replace(FROZEN, sampler=PACED, speed_weight=1.0, iterations=25, num_groups=3, pace_learning_rate=0.05)
    records = list(train(generator, PROMPTS, {**TWOS, "speed": speed_reward}, config))
    assert records[-1]["steps"] < records[0]["steps"] - 0.8
    assert torch.equal(weights_of(generator)[: len(before)], before)


def test_an_adaptive_policy_is_trained_with_its_network(toy):
    config = replace(TOY, sampler=ADAPTIVE, iterations=40, learning_rate=0.05, pace_learning_rate=0.03)
    records = list(train(toy(), PROMPTS, TWOS, config))
    start, end = (sum(r["reward"] for r in part) / 5 for part in (records[:5], records[-5:]))
    assert end > start + 0.15
    assert records[0]["ratio_deviation"] < 1e-3 and records[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert records[-1]["kl"] > 0.01


@pytest.mark.parametrize("form", ["additive", "multiplicative"])
@pytest.mark.parametrize("sampler", [ADAPTIVE, replace(PACED, guidance_scale=2.0)], ids=["adaptive", "guided"])
def test_speed_counts_passes(toy, form, sampler):
    generator = toy(pace=sampler is not ADAPTIVE)
    config = replace(FROZEN, sampler=sampler, speed_weight=1.0, speed_form=form, iterations=30)
    records = list(train(generator, PROMPTS, {**TWOS, "speed": speed_reward}, config))
    assert records[-1]["forwards"] < 0.7 * records[0]["forwards"]


def test_the_lagrangian_holds_passes(toy):
    config = replace(
        FROZEN, iterations=120, speed_form="lagrangian", target_steps=3.0, multiplier_rate=0.03,
        pace_learning_rate=0.005,
    )  # fmt: skip
    records = list(train(toy(), PROMPTS, {**TWOS, "speed": speed_reward}, config))
    excess = records[0]["forwards"] / 64 / 3 - 1
    assert excess > 0.4 and records[1]["weights"]["speed"] == pytest.approx(1.03 * excess)
    assert sum(record["forwards"] for record in records[-30:]) / 30 / 64 == pytest.approx(3.0, abs=0.4)


@pytest.mark.parametrize("schedule, made_for", [("paced", "adaptive"), ("adaptive", "paced")])
def test_a_head_made_for_another_schedule_is_refused(toy, schedule, made_for):
    generator = toy()
    generator.pace = head_for(made_for, 0)
    config = replace(TOY, sampler=SamplerConfig(steps=3, schedule=schedule))
    with pytest.raises(ValueError, match=f"schedule='{schedule}' does not fit the pace head.*'{made_for}'"):
        next(train(generator, PROMPTS, TWOS, config))


def falling(values: list[float]):
    """A reward that says what is told, whatever the pictures; the last value stays."""
    calls = iter(range(10_000))
    return lambda images, prompts, trajectory: (
        torch.full((len(prompts),), values[min(next(calls), len(values) - 1)]) + torch.linspace(0, 3, len(prompts))
    )


def test_a_collapse_ends_the_run_with_the_best_weights(toy):
    generator, seen = toy(), [weights_of(toy())]
    config = replace(TOY, iterations=50, quality_weights={"told": 1.0})
    records = []
    for record in train(generator, PROMPTS, {"told": falling([1.0, 2.0, 3.0, 0.0])}, config):
        records.append(record)
        seen.append(weights_of(generator))
    assert 4 <= len(records) < 12
    said = ["collapse: smoothed progress" in " ".join(record["warnings"]) for record in records]
    assert said == [False] * (len(records) - 1) + [True]
    # The third rollout was the best, and the weights after two updates drew it.
    assert torch.equal(weights_of(generator), seen[2])


def test_noise_in_the_quality_is_no_collapse(toy):
    told = falling([1.0, 0.9, 1.05, 0.92, 1.0, 0.9])
    config = replace(TOY, iterations=8, quality_weights={"told": 1.0})
    assert len(list(train(toy(), PROMPTS, {"told": told}, config))) == 8


def test_low_diversity_and_silent_rewards_are_said(toy):
    config = replace(TOY, iterations=1, diversity_floor=5.0, quality_weights={"twos": 1.0, "flat": 1.0})
    rewards = {**TWOS, "flat": lambda images, prompts, trajectory: torch.ones(len(prompts))}
    record = next(train(toy(), PROMPTS, rewards, config))
    assert any("diversity" in words and "below 500% of its start" in words for words in record["warnings"])
    assert any("reward 'flat' does not vary inside any group" in words for words in record["warnings"])
    assert record["silent_rewards"] == ["flat"]


def bad_reward(images, prompts, trajectory):
    return torch.full((len(prompts),), torch.nan)


@pytest.mark.parametrize(
    "changes, rewards, prompts, words",
    [
        ({"quality_weights": {"clip": 1.0}}, TWOS, PROMPTS, "reward 'clip' has a weight but is not among"),
        ({"speed_weight": 0.1, "sampler": PACED}, TWOS, PROMPTS, "reward 'speed' has a weight but is not"),
        ({"speed_weight": 0.1}, {**TWOS, "speed": speed_reward}, PROMPTS, "speed_weight=0.1 cannot act with"),
        ({"sampler": SamplerConfig(steps=5)}, TWOS, PROMPTS, "steps=5: expected 1 to 4; nearest: 4"),
        (
            {"speed_weight": 0.1, "sampler": SamplerConfig(steps=3, schedule="random_budget")},
            {**TWOS, "speed": speed_reward},
            PROMPTS,
            "speed_form='additive' teaches nothing with schedule='random_budget'",
        ),
        ({}, TWOS, PROMPTS[:2], "num_groups=3: expected at most one group a prompt; nearest: 2"),
        ({}, TWOS, [], "no training prompts given"),
        ({}, {"twos": bad_reward}, PROMPTS, "reward 'twos' gave shape .* nothing but NaN"),
        ({}, {"twos": lambda *_: torch.ones(3)}, PROMPTS, r"reward 'twos' gave shape \(3,\); expected 24"),
    ],
)
def test_wrong_input_is_refused_before_anything_changes(toy, tmp_path, changes, rewards, prompts, words):
    generator = toy()
    before = weights_of(generator)
    with pytest.raises(ValueError, match=words) as error:
        next(train(generator, prompts, rewards, replace(TOY, **changes)))
    assert "\n" not in str(error.value)
    assert torch.equal(weights_of(generator), before) and generator.pace is None


def test_unreadable_prompts_are_refused_before_anything_changes(emoji):
    with pytest.raises(ValueError, match="unknown word 'dgo'"):
        next(train(emoji, [*PROMPTS, "a dgo"], TWOS, TOY))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"group_size": 1}, "group_size=1: expected at least 2"),
        ({"sampler": SamplerConfig(order="confidence", choice_temperature=0.0)}, "choice_temperature=0.0 makes the"),
        ({"speed_form": "hinge"}, "speed_form='hinge' needs quality_floor"),
        ({"weight_schedules": {"towes": [[0, 1.0]]}}, "weight_schedules names 'towes'; nearest: 'twos'"),
        ({"weight_schedules": {"twos": [[5, 1.0], [5, 2.0]]}}, r"expected \[\[iteration, weight\], ...\], iterations"),
        ({"ema_decay": 1.0}, r"ema_decay=1.0: expected a number in \[0, 1\)"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(TOY, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"sampler": SamplerConfig(steps=2, order="confidence")},
        {"sampler": SamplerConfig(steps=3, order="confidence", guidance_scale=1.5, temperature=0.9)},
        {"sampler": SamplerConfig(steps=2, order="confidence"), "order_factor": "token_only"},
        {"sampler": SamplerConfig(steps=3, schedule="random_budget")},
        {"sampler": SamplerConfig(steps=3, schedule="threshold", stop_confidence=0.97)},
        {"estimator": "random_mask", "inner_epochs": 2},
        {"estimator": "coupled"},
        {"estimator": "one_step"},
        {"estimator": "critical"},
        {"kl_estimator": "k1"},
        {"kl_estimator": "k2"},
        {"kl_estimator": "k3"},
        {"ema_decay": 0.9},
    ],
    ids=str,
)
def test_every_reading_of_the_method_learns(toy, changes):
    generator = toy()
    config = replace(TOY, iterations=30, learning_rate=0.05, **changes)
    records = list(train(generator, PROMPTS, TWOS, config))
    start, end = (sum(r["reward"] for r in part) / 5 for part in (records[:5], records[-5:]))
    assert end > start + 0.15
    assert records[0]["ratio_deviation"] < 1e-3 and records[-1]["kl"] > 0.01


def test_the_average_is_the_result(toy):
    averaged, last = toy(), toy()
    config = replace(TOY, iterations=8, learning_rate=0.05)
    list(train(averaged, PROMPTS, TWOS, replace(config, ema_decay=0.9)))
    list(train(last, PROMPTS, TWOS, config))
    start, moved, slow = weights_of(toy()), weights_of(last), weights_of(averaged)
    assert 0 < float((slow - start).norm()) < float((moved - start).norm())


def test_weights_follow_their_schedule(toy):
    rewards = {**TWOS, "speed": speed_reward}
    schedules = {"speed": [[0, 0.0], [4, 1.0]], "twos": [[0, 2.0], [2, 0.5]], "kl": [[1, 0.5], [3, 0.1]]}
    config = replace(TOY, iterations=6, sampler=PACED, weight_schedules=schedules)
    found = [record["weights"] for record in train(toy(), PROMPTS, rewards, config)]
    assert [weights["speed"] for weights in found] == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1])
    assert [weights["twos"] for weights in found] == pytest.approx([2, 1.25, 0.5, 0.5, 0.5, 0.5])
    assert [weights["kl"] for weights in found] == pytest.approx([0.5, 0.5, 0.3, 0.1, 0.1, 0.1])


def test_the_lagrangian_holds_its_target(toy):
    config = replace(
        TOY, iterations=120, sampler=PACED, speed_form="lagrangian", target_steps=2.0, multiplier_rate=0.1,
        pace_learning_rate=0.03, learning_rate=1e-3, speed_weight=0.0, num_groups=4,
    )  # fmt: skip
    records = list(train(toy(), PROMPTS, {**TWOS, "speed": speed_reward}, config))
    assert records[0]["steps"] > 2.4
    assert sum(record["steps"] for record in records[-30:]) / 30 == pytest.approx(2.0, abs=0.35)


def test_samples_that_cannot_be_scored_are_masked(toy):
    def partly(images, prompts, trajectory):
        return share_of_twos(images, prompts, trajectory).index_fill(0, torch.tensor([0, 5]), torch.nan)

    records = list(train(toy(), PROMPTS, {"twos": partly}, replace(TOY, iterations=15, learning_rate=0.05)))
    assert all(record["masked"] == {"twos": 2} for record in records)
    assert all(json.loads(json.dumps(record, allow_nan=False)) for record in records)
    assert records[-1]["rewards"]["twos"] > records[0]["rewards"]["twos"]


def test_a_batch_that_a_reward_cannot_score_is_no_end(toy):
    calls = iter(range(100))

    def seldom(images, prompts, trajectory):
        scores = share_of_twos(images, prompts, trajectory)
        return torch.full_like(scores, torch.nan) if next(calls) == 2 else scores

    config = replace(TOY, iterations=5, quality_weights={"twos": 1.0, "seldom": 1.0})
    records = list(train(toy(), PROMPTS, {**TWOS, "seldom": seldom}, config))
    assert [set(record["rewards"]) for record in records] == [{"twos", "seldom"}] * 2 + [{"twos"}] + [
        {"twos", "seldom"}
    ] * 2
    assert records[2]["masked"]["seldom"] == 24 and not any(record["warnings"] for record in records[:2])
    assert all(json.loads(json.dumps(record, allow_nan=False)) for record in records)


def test_dropped_samples_take_no_part(toy):
    drawn, learner = all_outcomes(toy()), Learner(toy(), replace(TOY, kl_weight=1.0))
    randomize(learner.generator.policy, 9, std=0.7)
    nobody = replace(given(torch.ones(81)), kept=torch.zeros(81, dtype=torch.bool))
    learner.update(drawn, nobody)
    assert float(gradients(learner.generator).abs().max()) == 0


def test_reward_hacking_is_said(toy):
    """A watched reward that falls while the trained one rises: here, its negative."""
    rewards = {**TWOS, "watched": lambda *given: -share_of_twos(*given)}
    config = replace(TOY, iterations=25, learning_rate=0.05)
    records = list(train(toy(), PROMPTS, rewards, config))
    alarms = [any("reward hacking? 'watched'" in words for words in record["warnings"]) for record in records]
    assert alarms[-1] and not alarms[0]
    kind = {**TWOS, "watched": share_of_twos}
    assert not any("hacking" in " ".join(r["warnings"]) for r in train(toy(), PROMPTS, kind, config))


def test_the_global_generator_is_left_alone(toy):
    generator = toy()
    generator.pace = PaceHead().reset(0)
    before = torch.get_rng_state()
    list(train(generator, PROMPTS, TWOS, replace(TOY, iterations=2, sampler=PACED)))
    assert torch.equal(before, torch.get_rng_state())


def test_every_second_rollout_practises_the_next_fixed_number_of_steps(toy):
    config = replace(
        TOY, sampler=PACED, iterations=6, practice_steps=(1, 3), speed_form="lagrangian", speed_weight=0.5,
        target_steps=2.0,
    )  # fmt: skip
    records = list(train(toy(), PROMPTS, {**TWOS, "speed": speed_reward}, config))
    assert [record["practised"] for record in records] == [False, True] * 3
    assert [record["steps"] for record in records[1::2]] == [1, 3, 1]
    assert all(record["weights"]["speed"] == 0 for record in records[1::2])
    assert all(record["weights"]["speed"] > 0 for record in records[::2])


def test_a_practised_rollout_trains_the_policy_and_not_the_pace(toy):
    generator = toy()
    config = replace(TOY, sampler=PACED, iterations=3, practice_steps=(2,), speed_weight=0.5)
    records = train(generator, PROMPTS, {**TWOS, "speed": speed_reward}, config)
    next(records)
    pace, policy = deepcopy(generator.pace.state_dict()), deepcopy(generator.policy.state_dict())
    next(records)
    moved = [float((policy[name] - value).abs().max()) for name, value in generator.policy.state_dict().items()]
    assert max(moved) > 0
    frozen = [float((pace[name] - value).abs().max()) for name, value in generator.pace.state_dict().items()]
    assert max(frozen) == 0


def test_practice_starts_from_noise_too_and_a_single_step_is_not_heated(toy):
    hot = replace(PACED, first_temperature=2.0, start_noise=0.5)
    config = replace(TOY, sampler=hot, iterations=4, practice_steps=(1, 2))
    drawn_with = [sampler_at(config, iteration) for iteration in range(4)]
    assert all(sampler.start_noise == 0.5 for sampler in drawn_with)
    assert [sampler.first_temperature for sampler in drawn_with] == [2, 1, 2, 2]
    assert rollout(toy(), PROMPTS, TWOS, config, iteration=1).trajectory.start is not None
    records = list(train(toy(), PROMPTS, TWOS, config))
    assert all(record["ratio_deviation"] < 1e-5 for record in records), "the replay starts from the same noise"


def test_practice_needs_a_schedule_beside_it():
    with pytest.raises(ValueError, match="practice_steps act beside"):
        TrainConfig(practice_steps=(1,))


@pytest.mark.parametrize(
    "changes",
    [{}, {"inner_epochs": 3}, {"inner_epochs": 2, "estimator": "coupled"}, {"micro_batch_size": 5}],
    ids=str,
)
def test_passes_are_those_that_were_made(toy, monkeypatch, changes):
    made = [0]
    network = type(toy().policy)
    plain = network.forward

    def counted(self, tokens, text):
        made[0] += len(tokens) * (3 if torch.is_grad_enabled() else 1)  # a backward pass is two
        return plain(self, tokens, text)

    monkeypatch.setattr(network, "forward", counted)
    apart = replace(TOY, sampler=replace(SAMPLER, start_noise=0.5), **changes)
    assert sum(record["passes"] for record in train(toy(), PROMPTS, TWOS, apart)) == made[0]
    made[0] = 0  # from masks alone, the samples of a prompt share states, which count for each of them
    assert sum(record["passes"] for record in train(toy(), PROMPTS, TWOS, replace(TOY, **changes))) > made[0]
