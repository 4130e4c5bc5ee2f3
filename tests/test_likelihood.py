"""The log-probability of a trajectory: replayed, and exact against enumeration of every outcome."""

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import randomize
from torch import Tensor

from speedrl_lab.config import SamplerConfig
from speedrl_lab.generator import StepInfo
from speedrl_lab.likelihood import ESTIMATORS, scored_states, trajectory_log_prob
from speedrl_lab.pace import PaceHead, head_for, pace_counts
from speedrl_lab.sampler import plackett_luce, sample
from speedrl_lab.schedules import reveal_counts
from speedrl_lab.trajectory import Trajectory

PROMPTS = ["a dog", "two cats on a red background", "a dog", "a star left of a pig", "a dog"]
SAMPLERS = [
    SamplerConfig(steps=4, order="halton"),
    SamplerConfig(steps=5, order="random", schedule="power"),
    SamplerConfig(steps=3, guidance_scale=2.5),
    SamplerConfig(steps=3, temperature=0.7, first_temperature=2.0),
    SamplerConfig(steps=6, schedule="paced"),
    SamplerConfig(steps=6, schedule="paced", order="random", guidance_scale=1.5, temperature=1.3),
    SamplerConfig(steps=3, schedule="power", power=1.5, revise=True, guidance_scale=1.5),
    SamplerConfig(steps=6, schedule="paced", revise=True, first_temperature=1.5),
]
GRIDS = torch.cartesian_prod(*[torch.arange(3)] * 4)  # every outcome of the toy, (81, 4)
ORDER = torch.tensor([2, 0, 3, 1])


def label(sampler: SamplerConfig) -> str:
    settings = ("order", "schedule", "guidance_scale", "temperature", "first_temperature", "revise")
    return "-".join(str(getattr(sampler, name)) for name in settings)


def stored(trajectory: Trajectory) -> Tensor:
    drawn = trajectory.log_prob if trajectory.drafts is None else trajectory.draft_log_prob.flatten(1)
    total = drawn.sum(1)
    return total if trajectory.pace is None else total + trajectory.pace_log_prob.sum(1)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=label)
@pytest.mark.parametrize("batch_size", [2, 64])
def test_replay_returns_what_the_sampler_stored(emoji, sampler, batch_size):
    with torch.no_grad():
        emoji.pace.layers[2].weight.normal_(generator=torch.Generator().manual_seed(0))
        trajectory = sample(emoji, PROMPTS, sampler, seed=3)
        replayed = trajectory_log_prob(emoji, PROMPTS, trajectory, sampler, batch_size=batch_size)
    assert replayed.shape == (5,) and replayed.dtype == torch.float32
    assert torch.allclose(replayed, stored(trajectory), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("change", ["prompts", "tokens", "reveal_step"])
def test_replay_notices_what_differs(emoji, change):
    sampler = SamplerConfig(steps=4)
    trajectory, prompts = sample(emoji, PROMPTS, sampler), PROMPTS
    if change == "prompts":
        prompts = PROMPTS[::-1]
    elif change == "tokens":
        trajectory = replace(trajectory, tokens=(trajectory.tokens + 1) % 1000)
    else:
        trajectory = replace(trajectory, reveal_step=3 - trajectory.reveal_step)
    with torch.no_grad():
        replayed = trajectory_log_prob(emoji, prompts, trajectory, sampler)
    assert float((replayed - stored(trajectory)).abs().max()) > 0.1


def outcomes(steps: int, schedule: str) -> Trajectory:
    """All 81 outcomes of the toy under one order and a fixed schedule."""
    counts = reveal_counts(4, steps, schedule)
    reveal_step = torch.empty(4, dtype=torch.int16)
    reveal_step[ORDER] = torch.arange(steps).repeat_interleave(counts).to(torch.int16)
    return Trajectory(
        tokens=GRIDS, reveal_step=reveal_step.repeat(81, 1), steps=torch.full((81,), steps),
        forwards=torch.full((81,), steps), log_prob=torch.zeros(81, 4), mask_id=4, order=ORDER.repeat(81, 1),
    )  # fmt: skip


def probability(generator, grid: Tensor, reveal_step: Tensor, sampler: SamplerConfig) -> Tensor:
    """The probability of one outcome, position by position and step by step; differentiable."""
    cond, total = generator.encode(["a dog"]), torch.ones(())
    for step in range(int(reveal_step.max()) + 1):
        state = torch.where(reveal_step < step, grid, 4)[None]
        info = StepInfo(step, sampler.steps)
        logits = generator.logits(state, cond, info)[0]
        if sampler.guidance_scale != 1.0:
            free = generator.logits(state, generator.null(1), info)[0]
            logits = free + sampler.guidance_scale * (logits - free)
        temperature = sampler.temperature * (sampler.first_temperature if step == 0 else 1)
        chances = (logits / temperature).softmax(-1)
        for position in (reveal_step == step).nonzero().flatten().tolist():
            total = total * chances[position, grid[position]]
    return total


TOY_SAMPLERS = [
    SamplerConfig(steps=1),
    SamplerConfig(steps=2, schedule="linear"),
    SamplerConfig(steps=4, temperature=0.7, first_temperature=3.0),
    SamplerConfig(steps=3, schedule="power", guidance_scale=2.0, temperature=0.8),
]


@pytest.mark.parametrize("sampler", TOY_SAMPLERS, ids=label)
def test_probabilities_equal_enumeration_and_sum_to_one(toy, sampler):
    generator, trajectory = toy(), outcomes(sampler.steps, sampler.schedule)
    with torch.no_grad():
        replayed = trajectory_log_prob(generator, ["a dog"] * 81, trajectory, sampler).exp()
        exact = torch.stack(
            [
                probability(generator, grid, steps, sampler)
                for grid, steps in zip(GRIDS, trajectory.reveal_step, strict=True)
            ]
        )
    assert float(exact.std()) > 1e-3  # the outcomes are not alike
    assert torch.allclose(replayed, exact, rtol=1e-4, atol=1e-7)
    assert float(replayed.sum()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("sampler", TOY_SAMPLERS, ids=label)
def test_score_function_gradient_is_the_exact_gradient(toy, sampler):
    generator, trajectory = toy(), outcomes(sampler.steps, sampler.schedule)
    reward = torch.randn(81, generator=torch.Generator().manual_seed(5))
    parameters = list(generator.policy.parameters())
    expected_reward = sum(
        reward[row] * probability(generator, GRIDS[row], trajectory.reveal_step[row], sampler) for row in range(81)
    )
    exact = torch.autograd.grad(expected_reward, parameters)
    log_prob = trajectory_log_prob(generator, ["a dog"] * 81, trajectory, sampler)
    score = torch.autograd.grad((log_prob.detach().exp() * reward * log_prob).sum(), parameters)
    assert max(float(part.abs().max()) for part in exact) > 1e-2
    for left, right in zip(exact, score, strict=True):
        assert torch.allclose(left, right, atol=1e-5)


def paced_outcomes(steps: int) -> Trajectory:
    """Every sequence of pace actions with every token grid, for the toy under one order."""
    counts = pace_counts(4).tolist()
    plans: list[tuple[list[int], list[int]]] = []  # actions taken, tokens known after each step
    open_plans: list[tuple[list[int], list[int]]] = [([], [])]
    while open_plans:
        actions, known = open_plans.pop()
        done = known[-1] if known else 0
        if len(actions) == steps - 1:
            plans.append((actions, [*known, 4]))
            continue
        for action, count in enumerate(counts):
            after = min(4, done + count)
            (plans if after == 4 else open_plans).append(([*actions, action], [*known, after]))
    rows = list(itertools.product(plans, GRIDS))
    reveal_step = torch.empty(len(rows), 4, dtype=torch.int16)
    pace = torch.full((len(rows), steps), -1)
    taken = torch.tensor([len(known) for (_, known), _ in rows])
    for row, ((actions, known), _) in enumerate(rows):
        pace[row, : len(actions)] = torch.tensor(actions, dtype=torch.int64)
        for rank, position in enumerate(ORDER.tolist()):
            reveal_step[row, position] = next(step for step, total in enumerate(known) if total > rank)
    return Trajectory(
        tokens=torch.stack([grid for _, grid in rows]), reveal_step=reveal_step, steps=taken, forwards=taken,
        log_prob=torch.zeros(len(rows), 4), mask_id=4, order=ORDER.repeat(len(rows), 1), pace=pace,
    )  # fmt: skip


def test_paced_probabilities_sum_to_one_over_tokens_and_actions(toy):
    generator, trajectory = toy(pace=True), paced_outcomes(3)
    sampler = SamplerConfig(steps=3, schedule="paced")
    log_prob = trajectory_log_prob(generator, ["a dog"] * len(trajectory), trajectory, sampler, batch_size=4096)
    assert float(log_prob.detach().exp().sum()) == pytest.approx(1.0, abs=1e-4)
    # The gradient of a constant is zero: each part of the derivative is there, through policy and head.
    (log_prob.exp().sum()).backward()
    parts = [*generator.policy.parameters(), *generator.pace.parameters()]
    assert all(part.grad is not None for part in parts)
    assert max(float(part.grad.abs().max()) for part in parts) < 1e-4


ADAPTIVE = SamplerConfig(steps=5, schedule="adaptive")


@pytest.mark.parametrize("batch_size", [2, 64])
@pytest.mark.parametrize("sampler", [ADAPTIVE, replace(ADAPTIVE, order="random", start_noise=0.3)], ids=label)
def test_adaptive_replay_returns_what_the_sampler_stored(emoji, sampler, batch_size):
    emoji.pace = randomize(head_for("adaptive", 0), 1, std=0.1)
    with torch.no_grad():
        trajectory = sample(emoji, PROMPTS * 4, sampler, seed=3)
        replayed = trajectory_log_prob(emoji, PROMPTS * 4, trajectory, sampler, batch_size=batch_size)
    assert torch.allclose(replayed, stored(trajectory), rtol=1e-5, atol=1e-3)
    other = replace(trajectory, pace=(trajectory.pace + 1).where(trajectory.pace >= 0, -1) % 84)
    with torch.no_grad():
        assert not torch.allclose(trajectory_log_prob(emoji, PROMPTS * 4, other, sampler), replayed, atol=0.1)


def adaptive_outcomes(head: PaceHead) -> Trajectory:
    """Every pair of actions with every token grid, for the toy under one order and two steps."""
    counts = head.decode(torch.arange(14 * len(head.scales)), 4)[0].tolist()
    plans = [(first, second) for first, count in enumerate(counts) if count < 4 for second in range(len(counts))]
    plans += [(first, -1) for first, count in enumerate(counts) if count == 4]
    early = torch.tensor([counts[first] for first, _ in plans]).repeat_interleave(81)
    pace = torch.tensor(plans).repeat_interleave(81, 0)
    reveal_step = torch.empty(len(pace), 4, dtype=torch.int16)
    reveal_step[:, ORDER] = (torch.arange(4) >= early[:, None]).to(torch.int16)
    steps = (pace >= 0).sum(1)
    return Trajectory(
        tokens=GRIDS.repeat(len(plans), 1), reveal_step=reveal_step, steps=steps, forwards=steps,
        log_prob=torch.zeros(len(pace), 4), mask_id=4, order=ORDER.repeat(len(pace), 1), pace=pace,
    )  # fmt: skip


def test_adaptive_probabilities_sum_to_one_over_tokens_and_actions(toy):
    generator = toy()
    generator.pace = randomize(PaceHead(8, (0.5, 1.0), (1.0, 2.0)), 1, std=0.5)
    trajectory, sampler = adaptive_outcomes(generator.pace), SamplerConfig(steps=2, schedule="adaptive")
    assert len(trajectory) == (24 * 28 + 4) * 81
    log_prob = trajectory_log_prob(generator, ["a dog"] * len(trajectory), trajectory, sampler, batch_size=100_000)
    assert float(log_prob.detach().exp().sum()) == pytest.approx(1.0, abs=1e-4)
    (log_prob.exp().sum()).backward()  # of a constant: 0, with every part of the derivative there
    parts = [*generator.policy.parameters(), *generator.pace.parameters()]
    assert all(part.grad is not None for part in parts)
    assert max(float(part.grad.abs().max()) for part in parts) < 1e-4


@pytest.mark.parametrize("estimator", ["random_mask", "one_step", "coupled"])
def test_adaptive_states_without_an_action_are_refused(emoji, estimator):
    emoji.pace = head_for("adaptive", 0)
    trajectory = sample(emoji, PROMPTS, ADAPTIVE)
    with pytest.raises(ValueError, match=f"estimator='{estimator}' makes states in which schedule='adaptive' chose"):
        trajectory_log_prob(emoji, PROMPTS, trajectory, estimator=estimator)
    with torch.no_grad():
        assert trajectory_log_prob(emoji, PROMPTS, trajectory, estimator="critical").isfinite().all()


CONFIDENT = SamplerConfig(steps=4, order="confidence")


@pytest.mark.parametrize("sampler", [CONFIDENT, replace(CONFIDENT, guidance_scale=2.0, temperature=0.7)], ids=label)
def test_confidence_order_counts_proposals_and_choices(emoji, sampler):
    trajectory = sample(emoji, PROMPTS, sampler, seed=3)
    with torch.no_grad():
        exact = trajectory_log_prob(emoji, PROMPTS, trajectory, batch_size=2)
        kept = trajectory_log_prob(emoji, PROMPTS, trajectory, order_factor="token_only")
    whole = trajectory.proposal_log_prob.sum((1, 2)) + trajectory.choice_log_prob.sum(1)
    assert torch.allclose(exact, whole, rtol=1e-5, atol=1e-3)
    assert torch.allclose(kept, trajectory.log_prob.sum(1), rtol=1e-5, atol=1e-3)
    assert float((exact - kept).abs().min()) > 1.0
    made = (trajectory.proposals >= 0).sum((1, 2))
    left = 64 - torch.cumsum(reveal_counts(64, 4), 0)
    assert made.tolist() == [64 + int(left[:-1].sum())] * len(PROMPTS)


def test_a_choice_is_a_plackett_luce_draw():
    scores = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    picks = torch.tensor([[4, 0, 2], [1, 2, 3], [0, 1, 4]])
    for row in range(3):
        slow, left = 0.0, list(range(5))
        for pick in picks[row].tolist():
            slow += float(scores[row, pick] - scores[row, left].logsumexp(0))
            left.remove(pick)
        assert float(plackett_luce(scores, picks)[row]) == pytest.approx(slow, abs=1e-5)
    every = torch.tensor(list(itertools.permutations(range(5), 3)))
    assert float(plackett_luce(scores[:1].expand(len(every), -1), every).exp().sum()) == pytest.approx(1.0, abs=1e-5)
    all_kept = plackett_luce(scores, torch.arange(5).expand(3, -1))
    assert bool(all_kept.isfinite().all())


def test_confidence_order_without_noise_is_refused(emoji):
    sampler = replace(CONFIDENT, choice_temperature=0.0)
    trajectory = sample(emoji, PROMPTS, sampler)
    with pytest.raises(ValueError, match="choice_temperature=0.0: the confidence order is deterministic"):
        trajectory_log_prob(emoji, PROMPTS, trajectory, sampler)
    trajectory_log_prob(emoji, PROMPTS, trajectory, sampler, order_factor="token_only")


@pytest.mark.parametrize("name, value", [("temperature", 0.5), ("guidance_scale", 2.0), ("steps", 5)])
def test_other_settings_than_those_of_the_draw_are_refused(emoji, name, value):
    trajectory = sample(emoji, PROMPTS, SAMPLERS[0])
    with pytest.raises(ValueError, match=f"drawn with {name}=.*asked for with {value!r}") as error:
        trajectory_log_prob(emoji, PROMPTS, trajectory, replace(SAMPLERS[0], **{name: value}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("schedule", ["random_budget", "threshold"])
def test_replay_of_samples_with_steps_of_their_own(emoji, schedule):
    sampler = SamplerConfig(steps=6, schedule=schedule, stop_confidence=0.37)
    trajectory = sample(emoji, PROMPTS * 4, sampler, seed=1)
    with torch.no_grad():
        replayed = trajectory_log_prob(emoji, PROMPTS * 4, trajectory, sampler)
    assert torch.allclose(replayed, trajectory.log_prob.sum(1), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators_score_what_they_say(emoji, estimator):
    """Tokens scored times weight, a sample: all of them, but for the critical steps."""
    trajectory = sample(emoji, PROMPTS, SamplerConfig(steps=4, schedule="power"))
    for seed in range(5):
        scored = torch.zeros(len(PROMPTS))
        states = list(scored_states(trajectory, estimator, seed=seed, batch_size=2))
        for visit in states:
            assert torch.equal(visit.codes, trajectory.tokens[visit.owners, visit.positions])
            flat = visit.tokens.flatten()[visit.rows]
            assert bool((flat == emoji.spec.mask_id).all()), "no scored token is shown to the network"
            scored.index_add_(0, visit.owners, torch.full((len(visit.owners),), visit.weight))
        if estimator == "critical":
            most = reveal_counts(64, 4, "power").sort(descending=True).values[:2].sum()
            assert bool((scored <= most).all() and (scored > 0).all())
        else:
            assert torch.allclose(scored, torch.full((5,), 64.0))


@pytest.mark.parametrize("estimator", ["random_mask", "coupled"])
def test_masks_of_an_estimator_come_from_its_seed(emoji, estimator):
    trajectory = sample(emoji, PROMPTS, SamplerConfig(steps=4, schedule="power"))
    with torch.no_grad():
        first, again, other = (
            trajectory_log_prob(emoji, PROMPTS, trajectory, estimator=estimator, seed=seed) for seed in (0, 0, 1)
        )
    assert torch.equal(first, again) and not torch.allclose(first, other)


@pytest.mark.parametrize("estimator", ["random_mask", "coupled", "one_step"])
def test_a_part_of_the_samples_gets_the_masks_it_has_among_all(emoji, estimator):
    trajectory = sample(emoji, PROMPTS, SamplerConfig(steps=4, schedule="power"))
    part = trajectory.select(torch.tensor([3, 4]))
    whole = list(scored_states(trajectory, estimator, seed=5))
    for visit, other in zip(scored_states(part, estimator, seed=5, first=3), whole, strict=True):
        assert torch.equal(visit.tokens, other.tokens[3:]) and visit.weight == other.weight


def test_critical_steps_leave_no_empty_states(emoji):
    trajectory = sample(emoji, PROMPTS, SamplerConfig(steps=8, schedule="power"))
    states = list(scored_states(trajectory, "critical"))
    assert {visit.step for visit in states} < set(range(8)) and all(len(visit.rows) for visit in states)


def test_one_step_is_exact_for_one_step(emoji):
    trajectory = sample(emoji, PROMPTS, SamplerConfig(steps=1))
    with torch.no_grad():
        assert torch.allclose(
            trajectory_log_prob(emoji, PROMPTS, trajectory, estimator="one_step"), trajectory.log_prob.sum(1), atol=1e-3
        )


def test_an_unknown_estimator_is_named(emoji):
    trajectory = sample(emoji, PROMPTS, SAMPLERS[0])
    with pytest.raises(ValueError, match="estimator='replya' is not known; nearest: 'replay'"):
        trajectory_log_prob(emoji, PROMPTS, trajectory, estimator="replya")


def test_prompts_and_samples_must_match(emoji):
    trajectory = sample(emoji, PROMPTS, SAMPLERS[0])
    with pytest.raises(ValueError, match="2 prompts for 5 samples"):
        trajectory_log_prob(emoji, PROMPTS[:2], trajectory, SAMPLERS[0])


REVISED = SamplerConfig(steps=2, schedule="linear", revise=True, temperature=0.8)


def revised_outcomes() -> Trajectory:
    """Every pair of a first draft, of two tokens of four, and a picture: 9 x 81 trajectories of the toy."""
    first = torch.cartesian_prod(torch.arange(3), torch.arange(3)).repeat_interleave(81, 0)  # (729, 2)
    draft = torch.full((729, 4), 4)
    draft[:, ORDER[:2]] = first
    final = GRIDS.repeat(9, 1)
    reveal_step = torch.ones(4, dtype=torch.int16)
    reveal_step[ORDER[:2]] = 0
    return Trajectory(
        tokens=final, reveal_step=reveal_step.repeat(729, 1), steps=torch.full((729,), 2),
        forwards=torch.full((729,), 2), log_prob=torch.zeros(729, 4), mask_id=4, sampler=REVISED,
        order=ORDER.repeat(729, 1), drafts=torch.stack([draft, final], 1), draft_log_prob=torch.zeros(729, 2, 4),
    )  # fmt: skip


def revised_probability(generator, draft: Tensor, final: Tensor) -> Tensor:
    """The probability of one draft and picture, token by token."""
    cond, total = generator.encode(["a dog"]), torch.ones(())
    for step, (shown, drawn) in enumerate([(torch.full((4,), 4), draft), (draft, final)]):
        chances = (generator.logits(shown[None], cond, StepInfo(step, 2))[0] / REVISED.temperature).softmax(-1)
        for position in (drawn != 4).nonzero().flatten().tolist():
            total = total * chances[position, drawn[position]]
    return total


def test_revised_drafts_are_part_of_the_probability(toy):
    generator, trajectory = toy(), revised_outcomes()
    with torch.no_grad():
        replayed = trajectory_log_prob(generator, ["a dog"] * 729, trajectory, REVISED).exp()
        exact = torch.stack([revised_probability(generator, *pair) for pair in trajectory.drafts])
    assert torch.allclose(replayed, exact, atol=1e-6)
    assert float(replayed.sum()) == pytest.approx(1, abs=1e-4)


def test_gradient_of_revised_samples_is_that_of_the_expected_reward(toy):
    """Score function over all drafts and pictures against autograd of the exact expectation."""
    generator, trajectory = toy(), revised_outcomes()
    reward = torch.randn(81, generator=torch.Generator().manual_seed(0)).repeat(9)
    weights = list(generator.policy.parameters())
    log_prob = trajectory_log_prob(generator, ["a dog"] * 729, trajectory, REVISED)
    scored = torch.autograd.grad((log_prob.exp().detach() * reward * log_prob).sum(), weights)
    exact = torch.stack([revised_probability(generator, *pair) for pair in trajectory.drafts])
    wanted = torch.autograd.grad((exact * reward).sum(), weights)
    for left, right in zip(scored, wanted, strict=True):
        assert torch.allclose(left, right, atol=1e-5)


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name != "replay"])
def test_only_replay_knows_of_revised_drafts(toy, estimator):
    with pytest.raises(ValueError, match="take 'replay'"):
        trajectory_log_prob(toy(), ["a dog"] * 729, revised_outcomes(), REVISED, estimator)
