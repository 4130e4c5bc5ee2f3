"""The exact oracle: enumerated trajectories against the sampler, the likelihood and their gradients."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from speedrl_lab.config import SamplerConfig
from speedrl_lab.enumeration import Outcomes, count_trajectories, enumerate_trajectories, expected
from speedrl_lab.generator import StepInfo
from speedrl_lab.generators import load_generator
from speedrl_lab.generators.tiny import TinyGenerator, make_tiny
from speedrl_lab.likelihood import scored_states, trajectory_log_prob
from speedrl_lab.sampler import sample
from speedrl_lab.trajectory import Trajectory

PROMPT = "a dog"
HALTON = SamplerConfig(steps=2, schedule="linear")
RANDOM = SamplerConfig(steps=3, order="random", temperature=0.8, first_temperature=1.5)
CONFIDENCE = SamplerConfig(steps=2, order="confidence", schedule="linear")
SAMPLERS = [
    HALTON,
    SamplerConfig(steps=3, guidance_scale=1.7),
    RANDOM,
    SamplerConfig(steps=2, schedule="paced"),
    SamplerConfig(steps=3, order="random", schedule="random_budget", power=2.0),
    SamplerConfig(steps=3, schedule="threshold", power=1.0, stop_confidence=0.8),
    CONFIDENCE,
    SamplerConfig(steps=2, order="confidence", temperature=1.3, choice_temperature=3.0),
]


def label(sampler: SamplerConfig) -> str:
    return f"{sampler.order}-{sampler.schedule}-{sampler.steps}"


every_sampler = pytest.mark.parametrize("sampler", SAMPLERS, ids=label)


@pytest.fixture
def line() -> TinyGenerator:
    """Three tokens of three codes."""
    return make_tiny((1, 3))


def weights(generator: TinyGenerator) -> list[Tensor]:
    return [*generator.policy.parameters(), *generator.pace.parameters()]


def gradient(scalar: Tensor, generator: TinyGenerator) -> Tensor:
    """The gradient in all weights, one vector."""
    parts = torch.autograd.grad(scalar, weights(generator), materialize_grads=True, retain_graph=True)
    return torch.cat([part.flatten() for part in parts]).double()


def reward(trajectory: Trajectory) -> Tensor:
    """An arbitrary number for each picture, float64 (B,), minus a price a step."""
    table = torch.randn(27, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return table[(trajectory.tokens * torch.tensor([9, 3, 1])).sum(1)] - 0.3 * trajectory.steps


def decisions(trajectory: Trajectory) -> list[tuple[int, ...]]:
    """What was decided in each row; different for different trajectories."""
    tables = [trajectory.tokens, trajectory.reveal_step, trajectory.order, trajectory.pace, trajectory.proposals]
    return [tuple(row) for row in torch.cat([t.flatten(1) for t in tables if t is not None], 1).tolist()]


def find(trajectory: Trajectory, outcomes: Outcomes) -> Tensor:
    """The enumerated row of each sample, int64 (B,); KeyError where a sample is not among them."""
    rows = {key: row for row, key in enumerate(decisions(outcomes.trajectory))}
    return torch.tensor([rows[key] for key in decisions(trajectory)])


def excess(rows: Tensor, log_prob: Tensor) -> float:
    """Chi-square of the frequencies of `rows` less its mean, in its standard deviations; rare outcomes pooled."""
    chances = log_prob.detach().exp()
    observed, wanted = torch.bincount(rows, minlength=len(chances)).double(), chances * len(rows)
    often = wanted >= 5
    observed = torch.cat([observed[often], observed[~often].sum()[None]])
    wanted = torch.cat([wanted[often], wanted[~often].sum()[None]]).clamp(min=1e-9)
    free = int(often.sum())
    assert free >= 20
    return float(((observed - wanted) ** 2 / wanted).sum() - free) / (2 * free) ** 0.5


# --- the generator


def test_tiny_speaks_the_generator_contract(tmp_path):
    before = torch.get_rng_state()
    generator = load_generator("tiny", device="cpu")
    assert torch.equal(before, torch.get_rng_state())
    spec, prompts = generator.spec, [PROMPT, "two cats on a red background"]
    tokens = torch.tensor([[3, 0, 3, 2], [1, 3, 3, 3]])
    logits = generator.logits(tokens, generator.encode(prompts), StepInfo(0, 2))
    assert logits.shape == (2, spec.num_tokens, spec.codebook_size) and logits.dtype == torch.float32
    some = generator.logits(tokens, generator.encode(prompts), StepInfo(0, 2), torch.tensor([6, 1]))
    assert torch.allclose(some, logits.flatten(0, 1)[[6, 1]], atol=1e-5)
    null = generator.logits(tokens, generator.null(2), StepInfo(0, 2))
    assert float((null - logits).detach().abs().amax((1, 2)).min()) > 1e-2  # prompts matter
    copy = generator.copy()
    torch.nn.init.zeros_(copy.policy.code_head.bias)
    assert float(generator.policy.code_head.bias.detach().abs().max()) > 0
    generator.save_policy(tmp_path / "policy.safetensors", "a test")
    loaded = load_generator("tiny", device="cpu", policy=tmp_path / "policy.safetensors")
    again = loaded.logits(tokens, loaded.encode(prompts), StepInfo(0, 2))
    assert loaded.spec == spec and torch.allclose(again, logits, atol=0.01 * float(logits.detach().abs().max()))
    assert not torch.equal(make_tiny(seed=1).policy.code_head.weight, generator.policy.code_head.weight)


def test_tiny_pictures_are_gray_squares_and_come_back():
    generator = make_tiny((1, 3), codes=4)
    codes = torch.tensor([[0, 1, 3], [2, 2, 0]])
    images = generator.decode(codes)
    assert images.shape == (2, 3, *generator.spec.image_size) and images.dtype == torch.float32
    assert float(images.min()) == 0 and float(images.max()) == 1
    assert torch.equal(generator.tokenize(images), codes)
    with pytest.raises(ValueError, match="cannot decode token 4: expected codes 0 to 3"):
        generator.decode(torch.tensor([[0, 4, 1]]))
    with pytest.raises(ValueError, match="codes=1: expected at least 2"):
        make_tiny(codes=1)


# --- the enumeration


@every_sampler
def test_probabilities_sum_to_one_and_their_gradient_to_zero(line, sampler):
    outcomes = enumerate_trajectories(line, PROMPT, sampler)
    assert len(outcomes) == count_trajectories(line, sampler) == len(set(decisions(outcomes.trajectory)))
    total = outcomes.log_prob.exp().sum()
    assert float(total.detach()) == pytest.approx(1.0, abs=1e-6)
    assert float(outcomes.log_prob.detach().exp().std()) > 1e-5  # they are not alike
    assert float(gradient(outcomes.log_prob.max(), line).abs().max()) > 1e-2
    assert float(gradient(total, line).abs().max()) < 1e-5


def test_one_step_is_the_product_of_guided_softmaxes(line):
    """Written out: sampler, likelihood and enumeration share one function for what is sampled."""
    sampler = SamplerConfig(steps=1, guidance_scale=1.7, temperature=0.8)
    masks, step = torch.full((1, 3), line.spec.mask_id), StepInfo(0, 1)
    with torch.no_grad():
        outcomes = enumerate_trajectories(line, PROMPT, sampler)
        free = line.logits(masks, line.null(1), step)[0]
        chances = ((free + 1.7 * (line.logits(masks, line.encode([PROMPT]), step)[0] - free)) / 0.8).softmax(-1)
    tokens = outcomes.trajectory.tokens
    product = chances[0, tokens[:, 0]] * chances[1, tokens[:, 1]] * chances[2, tokens[:, 2]]
    assert torch.allclose((outcomes.log_prob - outcomes.constant).exp().float(), product, rtol=1e-4)
    assert bool((outcomes.trajectory.forwards == 2).all())


def test_a_square_of_tokens_sums_to_one():
    generator = make_tiny()
    with torch.no_grad():
        for sampler in (replace(HALTON, steps=3), replace(RANDOM, steps=4), replace(CONFIDENCE, choice_temperature=0)):
            outcomes = enumerate_trajectories(generator, PROMPT, sampler)
            assert len(outcomes) == count_trajectories(generator, sampler)
            assert float(outcomes.log_prob.exp().sum()) == pytest.approx(1.0, abs=1e-6)


@every_sampler
def test_samples_have_the_exact_frequencies_and_records(line, sampler):
    with torch.no_grad():
        outcomes = enumerate_trajectories(line, PROMPT, sampler)
        drawn = sample(line, [PROMPT] * 3000, sampler, seed=2)
    rows = find(drawn, outcomes)
    assert abs(excess(rows, outcomes.log_prob)) < 4
    wrong = outcomes.log_prob.roll(1)
    assert excess(rows, wrong) > 10  # the bound is not vacuous
    exact = outcomes.trajectory.select(rows)
    assert exact.sampler == drawn.sampler == sampler and exact.mask_id == drawn.mask_id
    for name, value in vars(drawn).items():
        if isinstance(value, Tensor):
            assert value.dtype == getattr(exact, name).dtype, name
            assert torch.allclose(value, getattr(exact, name), atol=1e-4), name
        elif name not in ("sampler", "mask_id"):
            assert value is None and getattr(exact, name) is None, name


def test_the_varying_schedules_vary(line):
    for sampler in SAMPLERS[3:6]:
        outcomes = enumerate_trajectories(line, PROMPT, sampler)
        shares = Counter()
        for steps, chance in zip(outcomes.trajectory.steps.tolist(), outcomes.log_prob.exp().tolist(), strict=True):
            shares[steps] += chance
        assert len(shares) > 1 and max(shares.values()) < 0.95, sampler.schedule


@pytest.mark.parametrize("sampler", [SAMPLERS[3], CONFIDENCE], ids=label)
def test_gradient_of_the_expected_reward_is_its_slope(line, sampler):
    def mean() -> Tensor:
        outcomes = enumerate_trajectories(line, PROMPT, sampler)
        return expected(outcomes, reward(outcomes.trajectory))

    rng, size = torch.Generator().manual_seed(0), 2e-3
    exact = gradient(mean(), line)
    direction = exact + exact.std() * torch.randn(len(exact), generator=rng)
    direction = direction / direction.norm()
    ends = []
    for side in (1, -2, 1):  # there, to the other side, and back
        start = 0
        with torch.no_grad():
            for part in weights(line):
                part += side * size * direction[start : start + part.numel()].reshape(part.shape)
                start += part.numel()
            ends.append(float(mean()))
    assert (ends[0] - ends[1]) / (2 * size) == pytest.approx(float(exact @ direction), rel=1e-2)


def test_features_taken_as_constants_leave_out_a_part_of_the_policy_gradient(line):
    full, partial = [], []
    for through, into in ((True, full), (False, partial)):
        outcomes = enumerate_trajectories(line, PROMPT, SAMPLERS[3], through_features=through)
        into += [outcomes, gradient(expected(outcomes, reward(outcomes.trajectory)), line)]
    assert torch.equal(full[0].log_prob, partial[0].log_prob)
    policy = sum(part.numel() for part in line.policy.parameters())
    assert torch.allclose(full[1][policy:], partial[1][policy:], atol=1e-6)  # the head's own is whole
    assert float((full[1] - partial[1])[:policy].norm()) > 1e-3 * float(full[1][:policy].norm())  # a small part


def test_what_cannot_be_enumerated_is_refused(emoji, line):
    with pytest.raises(ValueError, match=r"about 10\^194.4 trajectories, at most 200000.*order='halton'"):
        enumerate_trajectories(emoji, PROMPT, SamplerConfig(steps=4))
    with pytest.raises(ValueError, match="at most 200000 can be enumerated"):
        enumerate_trajectories(make_tiny(), PROMPT, SamplerConfig(steps=4, order="confidence"))
    with pytest.raises(ValueError, match="steps=4: expected 1 to 3"):
        enumerate_trajectories(line, PROMPT, SamplerConfig(steps=4))
    line.pace = None
    with pytest.raises(ValueError, match="generator 'tiny' has none"):
        enumerate_trajectories(line, PROMPT, SAMPLERS[3])


def test_a_greedy_pace_is_one_choice(line):
    greedy = replace(SAMPLERS[3], greedy_pace=True)
    with torch.no_grad():
        outcomes = enumerate_trajectories(line, PROMPT, greedy)
    assert float(outcomes.log_prob.exp().sum()) == pytest.approx(1.0, abs=1e-6)
    assert len(outcomes) < count_trajectories(line, greedy)
    assert find(sample(line, [PROMPT] * 50, greedy), outcomes).unique().numel() > 5
    with torch.no_grad():
        replayed = trajectory_log_prob(line, [PROMPT] * len(outcomes), outcomes.trajectory)
    assert torch.allclose(replayed + outcomes.constant, outcomes.log_prob, rtol=0, atol=1e-5)


# --- the likelihood


@every_sampler
def test_replay_is_exact(line, sampler):
    with torch.no_grad():
        outcomes = enumerate_trajectories(line, PROMPT, sampler)
        replayed = trajectory_log_prob(line, [PROMPT] * len(outcomes), outcomes.trajectory, batch_size=4096)
    assert torch.allclose(replayed + outcomes.constant, outcomes.log_prob, rtol=0, atol=1e-5)


def score_gradient(generator: TinyGenerator, outcomes: Outcomes, **options: str) -> Tensor:
    """sum over all trajectories of pi * R * grad log pi, with log pi as the likelihood gives it."""
    log_prob = trajectory_log_prob(generator, [PROMPT] * len(outcomes), outcomes.trajectory, batch_size=4096, **options)
    return gradient((outcomes.log_prob.detach().exp() * reward(outcomes.trajectory) * log_prob).sum(), generator)


@every_sampler
def test_score_function_of_replay_is_the_exact_gradient(line, sampler):
    outcomes = enumerate_trajectories(line, PROMPT, sampler)
    exact = gradient(expected(outcomes, reward(outcomes.trajectory)), line)
    assert float(exact.norm()) > 0.01
    assert float((score_gradient(line, outcomes) - exact).norm()) < 1e-4 * float(exact.norm())


@pytest.mark.parametrize(("sampler", "share"), [(CONFIDENCE, 0.15), (SAMPLERS[-1], 0.05)])
def test_kept_tokens_alone_bias_the_confidence_order(line, sampler, share):
    """The less so the more noise there is in the choice: then the order is nearly random."""
    outcomes = enumerate_trajectories(line, PROMPT, sampler)
    exact = gradient(expected(outcomes, reward(outcomes.trajectory)), line)
    token_only = score_gradient(line, outcomes, order_factor="token_only")
    assert float((token_only - exact).norm()) > share * float(exact.norm())
    assert float((score_gradient(line, outcomes, order_factor="exact") - exact).norm()) < 1e-4 * float(exact.norm())


@pytest.mark.parametrize("sampler", [HALTON, RANDOM, CONFIDENCE], ids=label)
def test_sampled_gradients_lie_in_their_band(line, sampler):
    """Means of 24 batches of samples, in standard errors from the exact gradient."""
    outcomes = enumerate_trajectories(line, PROMPT, sampler)
    mean = expected(outcomes, reward(outcomes.trajectory))
    exact, batches, size = gradient(mean, line), 24, 125
    drawn = sample(line, [PROMPT] * (batches * size), sampler, seed=5)
    parts = []
    for rows in torch.arange(len(drawn)).split(size):
        chosen = drawn.select(rows)
        log_prob = trajectory_log_prob(line, [PROMPT] * size, chosen, batch_size=size)
        parts.append(gradient(((reward(chosen) - mean.detach()) * log_prob).mean(), line))
    parts = torch.stack(parts)
    error = parts.std(0) / batches**0.5
    acts = error > 1e-6  # most words do not occur in the prompt
    scores = ((parts.mean(0) - exact) / error)[acts]
    assert int(acts.sum()) > 1000
    assert 0.5 < float(scores.square().mean().sqrt()) < 1.6
    assert float(scores.abs().max()) < 6
    assert float(error.norm()) < 0.3 * float(exact.norm())  # a band narrow enough to tell


# --- the other estimators


def estimate(generator: TinyGenerator, trajectory: Trajectory, estimator: str, seed: int = 0) -> Tensor:
    with torch.no_grad():
        prompts = [PROMPT] * len(trajectory)
        return trajectory_log_prob(generator, prompts, trajectory, estimator=estimator, seed=seed, batch_size=4096)


@pytest.mark.parametrize("estimator", ["one_step", "critical"])
def test_one_step_and_critical_are_exact_for_one_step_alone(line, estimator):
    for steps in (1, 3):
        with torch.no_grad():
            outcomes = enumerate_trajectories(line, PROMPT, replace(HALTON, steps=steps))
        error = estimate(line, outcomes.trajectory, estimator) + outcomes.constant - outcomes.log_prob
        assert float(error.abs().max()) < 1e-5 if steps == 1 else float(error.abs().max()) > 0.1


def test_critical_scores_the_least_likely_half_of_the_steps(line):
    with torch.no_grad():
        outcomes = enumerate_trajectories(line, PROMPT, replace(HALTON, steps=3))
    by_step = outcomes.trajectory.log_prob.gather(1, outcomes.trajectory.order)  # one token a step
    least = by_step.sort(1).values[:, :2].sum(1)  # two of three
    assert torch.allclose(estimate(line, outcomes.trajectory, "critical"), least, atol=1e-5)


def test_coupled_scores_each_token_once(line):
    trajectory = sample(line, [PROMPT] * 40, HALTON)
    masks = set()
    for seed in range(6):
        scored = torch.zeros_like(trajectory.tokens)
        hidden = torch.zeros_like(trajectory.tokens)
        for visit in scored_states(trajectory, "coupled", seed=seed, batch_size=16):
            scored.index_put_((visit.owners, visit.positions), torch.ones(()).long(), accumulate=True)
            masked = visit.tokens == trajectory.mask_id
            hidden[visit.samples] += masked.long()
            assert torch.equal(visit.tokens[~masked], trajectory.tokens[visit.samples][~masked])
            assert torch.equal(visit.codes, trajectory.tokens[visit.owners, visit.positions]) and visit.weight == 1
            masks |= {tuple(row) for row in masked.tolist()}
        assert torch.equal(scored, torch.ones_like(scored)) and torch.equal(hidden, scored)
    assert len(masks) == 6  # every mask but all and none


def test_random_mask_is_unbiased_for_the_mean_over_all_orders(line):
    """Of one token a step: that is what the re-masked states can know."""
    with torch.no_grad():
        outcomes = enumerate_trajectories(line, PROMPT, SamplerConfig(steps=3, order="random"))
    picture = torch.tensor([0, 2, 1])
    same = (outcomes.trajectory.tokens == picture).all(1)
    assert int(same.sum()) == 6
    mean = float((outcomes.log_prob - outcomes.constant)[same].mean())
    copies = outcomes.trajectory.select(same.nonzero()[:1, 0].repeat(400))
    drawn: dict[float, list[Tensor]] = {}  # by share of masks, equally likely
    for seed in range(9):
        weight = next(iter(scored_states(copies, "random_mask", seed=seed))).weight
        drawn.setdefault(weight, []).append(estimate(line, copies, "random_mask", seed))
    assert sorted(drawn) == [1.0, 1.5, 3.0]
    groups = [torch.cat(values) for values in drawn.values()]
    error = float(sum(group.var() / len(group) for group in groups)) ** 0.5 / 3
    assert error < 0.05
    assert float(sum(group.mean() for group in groups)) / 3 == pytest.approx(mean, abs=4 * error)


def test_revised_trajectories_are_refused(line):
    with pytest.raises(ValueError, match="revise=True is not enumerated"):
        enumerate_trajectories(line, PROMPT, SamplerConfig(steps=2, revise=True))
