"""The sampling loop: what it reveals, what it counts, and that a sample is its own."""

from dataclasses import replace

import pytest
import torch
from conftest import randomize

from speedrl_lab import noise
from speedrl_lab.config import VARYING, SamplerConfig
from speedrl_lab.generator import StepInfo
from speedrl_lab.pace import SCALES, TEMPERATURES, head_for
from speedrl_lab.sampler import inverse_cdf, sample
from speedrl_lab.schedules import halton_order, reveal_counts, shifted_orders

PROMPTS = ["a dog", "two cats on a red background", "a dog", "a star left of a pig", "a dog", "two cats"]
PACED = SamplerConfig(steps=12, schedule="paced")
ADAPTIVE = SamplerConfig(steps=5, schedule="adaptive")
ALL = [
    SamplerConfig(steps=5, order=order, schedule=schedule)
    for order in ("halton", "random", "confidence")
    for schedule in ("cosine", "linear", "power")
] + [
    PACED,
    replace(PACED, order="random"),
    SamplerConfig(steps=3, guidance_scale=2.5),
    SamplerConfig(steps=6, schedule="random_budget"),
    SamplerConfig(steps=6, schedule="threshold", stop_confidence=0.37),
    SamplerConfig(steps=5, schedule="power", power=2.0, revise=True),
    replace(PACED, revise=True),
    SamplerConfig(steps=6, schedule="random_budget", revise=True),
]
REVISING = [sampler for sampler in ALL if sampler.revise]


def label(sampler: SamplerConfig) -> str:
    return f"{sampler.order}-{sampler.schedule}-{sampler.guidance_scale}{'-revise' * sampler.revise}"


@pytest.mark.parametrize("sampler", ALL, ids=label)
def test_every_position_is_revealed_once(emoji, sampler):
    trajectory = sample(emoji, PROMPTS, sampler)
    assert trajectory.tokens.shape == (6, 64) and trajectory.tokens.dtype == torch.int64
    assert trajectory.reveal_step.dtype == torch.int16
    assert int(trajectory.tokens.min()) >= 0 and int(trajectory.tokens.max()) < 1000
    assert int(trajectory.reveal_step.min()) == 0
    assert torch.equal(trajectory.reveal_step.amax(1).long(), trajectory.steps - 1)
    assert trajectory.log_prob.max() <= 0 and (trajectory.log_prob < 0).any(1).all()


@pytest.mark.parametrize("sampler", [s for s in ALL if s.schedule not in VARYING], ids=label)
def test_steps_follow_the_schedule(emoji, sampler):
    trajectory = sample(emoji, PROMPTS, sampler)
    counts = torch.stack([trajectory.revealed(step).sum(1) for step in range(sampler.steps)], 1)
    expected = reveal_counts(64, sampler.steps, sampler.schedule, sampler.power)
    assert torch.equal(counts, expected.expand(6, -1))
    assert trajectory.steps.tolist() == [sampler.steps] * 6


@pytest.mark.parametrize("sampler", ALL, ids=label)
def test_a_sample_is_the_same_in_any_batch(emoji, sampler):
    whole = sample(emoji, PROMPTS, sampler, seed=4)
    order = [3, 0, 2, 5, 4, 1]  # keeps the occurrences of "a dog" in order
    permuted = sample(emoji, [PROMPTS[row] for row in order], sampler, seed=4)
    alone = sample(emoji, ["a star left of a pig"], sampler, seed=4)
    for name in ("tokens", "reveal_step", "steps", "forwards"):
        assert torch.equal(getattr(permuted, name), getattr(whole, name)[order]), name
        assert torch.equal(getattr(alone, name), getattr(whole, name)[3:4]), name


@pytest.mark.parametrize("sampler", [ALL[0], ALL[6], PACED], ids=label)
def test_seeds_and_occurrences_make_the_sample(emoji, sampler):
    first, again, other = (sample(emoji, PROMPTS, sampler, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.tokens, again.tokens)
    assert not (first.tokens == other.tokens).all(1).any()
    dogs = first.tokens[[0, 2, 4]]
    assert len(dogs.unique(dim=0)) == 3


def test_the_global_generator_is_left_alone(emoji):
    before = torch.get_rng_state()
    for sampler in ALL:
        sample(emoji, PROMPTS[:2], sampler)
    assert torch.equal(before, torch.get_rng_state())


class Counting:
    """A generator that counts the rows of every forward pass."""

    def __init__(self, generator):
        self.generator, self.rows = generator, []

    def __getattr__(self, name):
        return getattr(self.generator, name)

    def logits(self, tokens, cond, step, rows=None):
        self.rows.append(len(tokens))
        return self.generator.logits(tokens, cond, step, rows)


@pytest.mark.parametrize("sampler", [*ALL, replace(PACED, guidance_scale=2.0)], ids=label)
def test_forward_passes_are_counted_as_they_happen(emoji, sampler):
    counting = Counting(emoji)
    trajectory = sample(counting, PROMPTS, sampler)
    passes = 1 if sampler.guidance_scale == 1.0 else 2
    assert torch.equal(trajectory.forwards, trajectory.steps * passes)
    first = len(set(PROMPTS)) + (passes == 2)  # masks alone: once a prompt, and once without one
    assert counting.rows[0] == first
    assert sum(counting.rows) == first + int(trajectory.forwards.sum()) - passes * len(PROMPTS)


def test_a_noisy_start_is_not_shared(emoji):
    counting = Counting(emoji)
    sample(counting, PROMPTS, SamplerConfig(steps=2, start_noise=0.5, guidance_scale=2.0))
    assert counting.rows == [12, 12]


def test_guidance_moves_the_samples(emoji):
    plain, guided = (sample(emoji, PROMPTS, SamplerConfig(steps=2, guidance_scale=s)) for s in (1.0, 3.0))
    assert not torch.equal(plain.tokens, guided.tokens)


def test_paced_samples_choose_their_steps(emoji):
    trajectory = sample(emoji, ["a dog"] * 24, PACED)
    assert trajectory.steps.max() <= 12 and len(trajectory.steps.unique()) > 2
    for row in range(24):
        steps = int(trajectory.steps[row])
        taken = trajectory.pace[row]
        counts = [int(trajectory.revealed(step)[row].sum()) for step in range(12)]
        known = 0
        for step in range(min(steps, 11)):
            assert counts[step] == min([1, 2, 4, 8, 16, 32, 64][int(taken[step])], 64 - known)
            known += counts[step]
        assert sum(counts) == 64 and counts[steps:] == [0] * (12 - steps)
        acted = min(steps, 11)  # the last allowed step reveals all and is no action
        assert (taken[:acted] >= 0).all() and (taken[acted:] == -1).all()
        assert (trajectory.pace_log_prob[row, acted:] == 0).all()


def test_the_last_paced_step_reveals_all(emoji):
    with torch.no_grad():
        emoji.pace.layers[2].bias.copy_(torch.tensor([50.0, 0, 0, 0, 0, 0, 0]))  # always the fewest
    trajectory = sample(emoji, PROMPTS, SamplerConfig(steps=4, schedule="paced", greedy_pace=True))
    assert trajectory.steps.tolist() == [4] * 6
    assert [int(trajectory.revealed(step)[0].sum()) for step in range(4)] == [1, 1, 1, 61]


def test_greedy_pace_takes_the_most_probable_choice(emoji):
    with torch.no_grad():
        emoji.pace.layers[2].bias.copy_(torch.tensor([0, 0, 0, 0, 0.1, 0, 0]))
    greedy = sample(emoji, ["a dog"] * 12, replace(PACED, greedy_pace=True))
    assert greedy.steps.tolist() == [4] * 12
    drawn = sample(emoji, ["a dog"] * 12, PACED)
    assert len(drawn.steps.unique()) > 1


@pytest.mark.parametrize("sampler", ALL, ids=label)
def test_positions_are_revealed_along_the_order(emoji, sampler):
    trajectory = sample(emoji, PROMPTS, sampler)
    assert torch.equal(trajectory.order.sort(1).values, torch.arange(64).expand(6, -1))
    steps = trajectory.reveal_step.long().gather(1, trajectory.order)
    assert (steps.diff(dim=1) >= 0).all()
    assert len(trajectory.order.unique(dim=0)) == 6


@pytest.mark.parametrize("sampler", REVISING, ids=label)
def test_revising_steps_draw_anew_all_that_the_next_one_shows(emoji, sampler):
    trajectory = sample(emoji, PROMPTS, sampler)
    assert trajectory.drafts.shape == trajectory.draft_log_prob.shape == (6, sampler.steps, 64)
    assert torch.equal(trajectory.drafts[:, -1], trajectory.tokens)
    changed = 0
    for step in range(sampler.steps):
        after, alive = trajectory.drafts[:, step], trajectory.steps > step
        assert torch.equal(after != 1000, trajectory.reveal_step <= step)  # what was shown stays shown
        drawn, codes, log_prob = trajectory.drawn(step)
        assert torch.equal(drawn, (after != 1000) & alive[:, None]) and torch.equal(codes, after)
        assert torch.equal(log_prob < 0, drawn)
        known = trajectory.state(step) != 1000
        changed += int((known & (trajectory.state(step) != after)).sum())
        assert torch.equal(trajectory.state(step)[~alive], after[~alive])  # a finished sample stays as it is
    assert changed > 0
    last = trajectory.steps - 1
    assert torch.equal(trajectory.log_prob, trajectory.draft_log_prob[torch.arange(6), last])


def test_revised_tokens_follow_the_model_exactly(toy):
    """Frequencies of pictures against the sum over all first drafts."""
    generator, count = toy(), 4000
    sampler = SamplerConfig(steps=2, schedule="linear", revise=True)
    trajectory = sample(generator, ["a dog"] * count, sampler, seed=1)
    with torch.no_grad():
        cond = generator.encode(["a dog"] * count)
        first = generator.logits(torch.full((count, 4), 4), cond, StepInfo(0, 2)).softmax(-1)
        second = generator.logits(trajectory.drafts[:, 0], cond, StepInfo(1, 2)).softmax(-1)
    for step, chances in enumerate([first, second]):
        drawn, codes, _ = trajectory.drawn(step)
        seen = torch.nn.functional.one_hot(codes.clamp(max=2), 3) * drawn[..., None]  # (B, 4, 3)
        wanted = chances * drawn[..., None]
        spread = (wanted * (1 - chances)).sum(0).sqrt().clamp(min=1)
        assert float(((seen.sum(0) - wanted.sum(0)) / spread).abs().max()) < 4


def test_random_budgets_are_uniform_and_follow_the_power_schedule(emoji):
    sampler = SamplerConfig(steps=3, schedule="random_budget")
    trajectory = sample(emoji, ["a dog"] * 150, sampler, seed=2)
    found = trajectory.steps.bincount(minlength=4).tolist()
    assert found[0] == 0 and all(35 <= count <= 65 for count in found[1:])
    for budget in (1, 2, 3):
        row = int((trajectory.steps == budget).nonzero()[0])
        counts = [int(trajectory.revealed(step)[row].sum()) for step in range(budget)]
        assert counts == reveal_counts(64, budget, "power").tolist()


def test_the_threshold_stops_once_the_rest_is_sure(emoji):
    fixed = SamplerConfig(steps=6, schedule="power")
    sampler = replace(fixed, schedule="threshold", stop_confidence=0.37)
    trajectory, cond = sample(emoji, PROMPTS * 8, sampler, seed=1), emoji.encode(PROMPTS * 8)
    counts = reveal_counts(64, 6, "power")
    assert len(trajectory.steps.unique()) > 1
    for step in range(6):
        alive = trajectory.steps > step
        masked = trajectory.reveal_step >= step
        chances = emoji.logits(trajectory.state(step), cond, StepInfo(step, 6)).detach().softmax(-1).amax(-1)
        sure = (chances * masked).sum(1) / masked.sum(1).clamp(min=1) >= 0.37
        expected = masked.sum(1).where(sure | (step == 5), counts[step])
        assert torch.equal(trajectory.revealed(step).sum(1)[alive], expected[alive])
    never = sample(emoji, PROMPTS, replace(sampler, stop_confidence=1.0), seed=1)
    assert torch.equal(never.tokens, sample(emoji, PROMPTS, fixed, seed=1).tokens)


def test_halton_orders_are_shifted_halton_orders(emoji):
    trajectory = sample(emoji, PROMPTS, SamplerConfig(steps=2), seed=3)
    uniforms = noise.uniforms(noise.row_keys(3, PROMPTS), noise.ORDER, 0, 4)
    assert torch.equal(trajectory.order, shifted_orders(halton_order(8, 8), (8, 8), uniforms))


@pytest.mark.parametrize("sampler", [ALL[0], ALL[6], PACED], ids=label)
def test_on_step_shows_the_states_of_the_trajectory(emoji, sampler):
    seen = []
    trajectory = sample(emoji, PROMPTS, sampler, on_step=seen.append)
    assert [entry["step"] for entry in seen] == list(range(int(trajectory.steps.max())))
    for entry in seen:
        assert set(entry) == {"step", "tokens", "revealed"}
        assert torch.equal(entry["tokens"], trajectory.state(entry["step"] + 1))
        assert torch.equal(entry["revealed"], trajectory.revealed(entry["step"]))


def test_confidence_keeps_the_most_probable_proposals(emoji):
    sampler = SamplerConfig(steps=5, order="confidence", choice_temperature=0.0)
    trajectory = sample(emoji, PROMPTS, sampler, seed=2)
    assert torch.equal(trajectory.order.sort(1).values, torch.arange(64).expand(len(PROMPTS), -1))
    keys, cond = noise.row_keys(2, PROMPTS), emoji.encode(PROMPTS)
    for step, count in enumerate(reveal_counts(64, 5).tolist()):
        state = trajectory.state(step)
        log_probs = emoji.logits(state, cond, StepInfo(step, 5)).detach().log_softmax(-1)  # (B, N, V)
        uniforms = noise.uniforms(keys, noise.TOKEN, step, 64)
        for row in range(len(PROMPTS)):
            proposed = inverse_cdf(log_probs[row], uniforms[row])
            confidence = log_probs[row].gather(1, proposed[:, None]).squeeze(1)
            masked = [position for position in range(64) if state[row, position] == emoji.spec.mask_id]
            best = sorted(masked, key=lambda position: -float(confidence[position]))[:count]  # noqa: B023
            assert set(best) == set(trajectory.revealed(step)[row].nonzero().flatten().tolist())
            assert torch.equal(trajectory.tokens[row, best], proposed[best])


def test_choice_temperature_loosens_the_choice(emoji):
    strict, loose = (
        sample(emoji, PROMPTS, SamplerConfig(steps=5, order="confidence", choice_temperature=level))
        for level in (0.0, 20.0)
    )
    first_step = [float(t.log_prob[t.revealed(0)].mean()) for t in (strict, loose)]
    assert first_step[0] > first_step[1]


@pytest.mark.parametrize("order", ["halton", "confidence"])
def test_stored_log_probs_are_those_of_the_drawn_tokens(emoji, order):
    sampler = SamplerConfig(steps=3, order=order, temperature=0.8)
    trajectory = sample(emoji, PROMPTS, sampler)
    cond = emoji.encode(PROMPTS)
    for step in range(3):
        logits = emoji.logits(trajectory.state(step), cond, StepInfo(step, 3)).detach() / 0.8
        expected = logits.log_softmax(-1).gather(-1, trajectory.tokens[..., None]).squeeze(-1)
        shown = trajectory.revealed(step)
        assert torch.allclose(trajectory.log_prob[shown], expected[shown], atol=1e-4)


def test_low_temperature_takes_the_most_probable_token(emoji):
    cold = sample(emoji, PROMPTS, SamplerConfig(steps=1, temperature=1e-4))
    masks = torch.full((6, 64), emoji.spec.mask_id)
    logits = emoji.logits(masks, emoji.encode(PROMPTS), StepInfo(0, 1))
    assert torch.equal(cold.tokens, logits.argmax(-1))
    warm = sample(emoji, PROMPTS, SamplerConfig(steps=1))
    assert not torch.equal(warm.tokens, cold.tokens)


def test_inverse_cdf_draws_the_given_distribution():
    probabilities = torch.tensor([0.0, 0.05, 0.3, 0.0, 0.15, 0.01, 0.29, 0.2, 0.0])
    rng = torch.Generator().manual_seed(0)
    uniforms = torch.rand(50_000, generator=rng).clamp(min=1e-7)
    codes = inverse_cdf(probabilities.log().expand(50_000, -1), uniforms)
    counts = torch.bincount(codes, minlength=9).double()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible].double() * 50_000
    statistic = float(((counts[possible] - expected).square() / expected).sum())
    assert statistic < 20.5  # 5 degrees: p < 0.001


def test_inverse_cdf_stays_inside_at_both_ends():
    log_probs = torch.log(torch.tensor([[0.25, 0.25, 0.5]])).expand(4, -1)
    uniforms = torch.tensor([2.0**-24, 0.2499, 0.2501, 1 - 2.0**-24])
    assert inverse_cdf(log_probs, uniforms).tolist() == [0, 0, 1, 2]


def test_samples_follow_the_model_exactly(toy):
    """Frequencies of whole token grids against their enumerated probabilities."""
    generator, count = toy(), 6000
    trajectory = sample(generator, ["a dog"] * count, SamplerConfig(steps=2, order="random"))
    grids = torch.cartesian_prod(*[torch.arange(3)] * 4)  # (81, 4)
    text = generator.encode(["a dog"]).index(torch.zeros(81, dtype=torch.int64))
    first = int(reveal_counts(4, 2)[0])
    expected = torch.zeros(81, dtype=torch.float64)
    start = torch.full((81, 4), generator.spec.mask_id)
    early = generator.logits(start, text, StepInfo(0, 2)).detach().double().log_softmax(-1)
    orders, frequency = trajectory.order.unique(dim=0, return_counts=True)
    for order, number in zip(orders, frequency.tolist(), strict=True):
        shown = torch.isin(torch.arange(4), order[:first])
        state = torch.where(shown, grids, start)
        late = generator.logits(state, text, StepInfo(1, 2)).detach().double().log_softmax(-1)
        chosen = torch.where(shown[:, None], early, late).gather(-1, grids[..., None]).squeeze(-1)
        expected += chosen.sum(1).exp() * number
    observed = torch.bincount((trajectory.tokens * torch.tensor([27, 9, 3, 1])).sum(1), minlength=81)
    common = expected >= 5
    statistic = float(((observed - expected).square() / expected)[common].sum())
    assert float(expected.sum()) == pytest.approx(count)
    assert common.sum() > 20 and statistic < int(common.sum()) + 3.5 * (2 * int(common.sum())) ** 0.5


@pytest.mark.parametrize("schedule", ["cosine", "power", "paced"])
def test_more_steps_than_tokens_are_refused(emoji, schedule):
    with pytest.raises(ValueError, match="steps=65: expected 1 to 64 .*nearest: 64"):
        sample(emoji, ["a dog"], SamplerConfig(steps=65, schedule=schedule))


def test_a_paced_schedule_needs_a_pace_head(emoji):
    emoji.pace = None
    with pytest.raises(ValueError, match="schedule='paced' needs a pace head and generator 'emoji' has none"):
        sample(emoji, ["a dog"], PACED)


def adaptive(generator, likeliest: tuple[int, int, int] | None = None):
    """The generator with an adaptive head: a random one, or one whose likeliest (count, temperature, scale) is this."""
    generator.pace = randomize(head_for("adaptive", 0), 5, std=0.1)
    if likeliest is not None:
        with torch.no_grad():
            generator.pace.layers[2].weight.zero_()
            for bias, choice in zip(generator.pace.layers[2].bias.split([7, 4, 3]), likeliest, strict=True):
                bias[choice] = 5.0
    return generator


def test_adaptive_heads_act_at_every_step_and_guided_rows_cost_two_passes(emoji):
    counting = Counting(adaptive(emoji))
    trajectory = sample(counting, PROMPTS * 4, ADAPTIVE)
    acted = torch.arange(5) < trajectory.steps[:, None]
    assert torch.equal(trajectory.pace >= 0, acted) and len(trajectory.steps.unique()) > 2
    counts, temperatures, scales = emoji.pace.decode(trajectory.pace[acted], 64)
    assert set(temperatures.tolist()) == set(torch.tensor(TEMPERATURES).tolist())
    assert set(scales.tolist()) == set(SCALES)
    guided = torch.zeros(acted.shape, dtype=torch.int64)
    guided[acted] = (scales != 1).long()
    assert torch.equal(trajectory.forwards, trajectory.steps + guided.sum(1))
    first = len(set(PROMPTS)) + 1  # masks alone: once a prompt, and once without one
    assert guided[:, 0].any() and counting.rows[0] + counting.rows[1] == first
    assert sum(counting.rows) == first + int(trajectory.forwards.sum()) - len(guided) - int(guided[:, 0].sum())
    revealed = torch.stack([trajectory.revealed(step).sum(1) for step in range(5)], 1)
    remaining = 64 - (revealed.cumsum(1) - revealed)
    expected = torch.zeros_like(revealed)
    expected[acted] = counts
    expected[:, -1] = 64  # the last step reveals all, whatever was chosen
    assert torch.equal(revealed[acted], expected.minimum(remaining)[acted])
    picked = emoji.pace(trajectory.pace_features[acted]).gather(1, trajectory.pace[acted][:, None]).squeeze(1)
    assert torch.allclose(trajectory.pace_log_prob[acted], picked, atol=1e-5)
    assert (trajectory.pace_log_prob[~acted] == 0).all()


def test_adaptive_tokens_come_from_the_temperature_and_guidance_that_were_taken(emoji):
    trajectory = sample(adaptive(emoji), PROMPTS * 2, ADAPTIVE, seed=1)
    cond, free = emoji.encode(PROMPTS * 2), emoji.null(12)
    for step in range(5):
        info, state = StepInfo(step, 5), trajectory.state(step)
        with torch.no_grad():
            prompted, unprompted = emoji.logits(state, cond, info), emoji.logits(state, free, info)
        for row in (trajectory.steps > step).nonzero().flatten().tolist():
            _, temperature, scale = (float(part) for part in emoji.pace.decode(trajectory.pace[row, step], 64))
            mixed = (unprompted[row] + scale * (prompted[row] - unprompted[row])) / temperature
            chosen = mixed.log_softmax(-1).gather(1, trajectory.tokens[row][:, None]).squeeze(1)
            shown = trajectory.revealed(step)[row]
            assert torch.allclose(trajectory.log_prob[row][shown], chosen[shown], atol=2e-4)


def test_an_adaptive_sample_is_the_same_in_any_batch(emoji):
    whole = sample(adaptive(emoji), PROMPTS, ADAPTIVE, seed=4)
    alone = sample(emoji, ["a star left of a pig"], ADAPTIVE, seed=4)
    for name in ("tokens", "reveal_step", "steps", "forwards", "pace"):
        assert torch.equal(getattr(alone, name), getattr(whole, name)[3:4]), name


def test_an_adaptive_head_that_changes_nothing_but_the_count_is_a_paced_one(emoji):
    with torch.no_grad():
        emoji.pace.layers[2].bias[3] = 5.0
    greedy = SamplerConfig(steps=6, schedule="paced", greedy_pace=True)
    paced = sample(emoji, PROMPTS, greedy)
    same = sample(adaptive(emoji, (3, 3, 0)), PROMPTS, replace(greedy, schedule="adaptive"))
    assert torch.equal(same.tokens, paced.tokens) and torch.equal(same.forwards, paced.forwards)
    guided = sample(adaptive(emoji, (3, 0, 2)), PROMPTS, replace(greedy, schedule="adaptive"))
    assert guided.forwards.tolist() == [12] * 6 and not torch.equal(guided.tokens, paced.tokens)
    fixed = SamplerConfig(steps=6, schedule="paced", greedy_pace=True, guidance_scale=3.0, temperature=0.5)
    emoji.pace = head_for("paced", 0)
    with torch.no_grad():
        emoji.pace.layers[2].bias[3] = 5.0
    assert torch.equal(sample(emoji, PROMPTS, fixed).tokens, guided.tokens)


def test_start_noise_is_what_an_adaptive_first_step_sees(emoji):
    trajectory = sample(adaptive(emoji), PROMPTS, replace(ADAPTIVE, start_noise=0.5))
    assert trajectory.start is not None and (trajectory.tokens >= 0).all()
    plain = sample(emoji, PROMPTS, ADAPTIVE)
    assert not torch.equal(trajectory.pace_features[:, 0], plain.pace_features[:, 0])


@pytest.mark.parametrize("schedule, made_for", [("paced", "adaptive"), ("adaptive", "paced")])
def test_a_head_made_for_another_schedule_is_refused(emoji, schedule, made_for):
    emoji.pace = head_for(made_for, 0)
    words = f"schedule='{schedule}' does not fit .* made for '{made_for}'; .* set generator.pace = None"
    with pytest.raises(ValueError, match=words) as error:
        sample(emoji, ["a dog"], SamplerConfig(schedule=schedule))
    assert "\n" not in str(error.value)


def test_unreadable_and_missing_prompts_are_refused(emoji):
    with pytest.raises(ValueError, match="unknown word 'dgo'.*nearest words: dog"):
        sample(emoji, ["a dog", "a dgo"], SamplerConfig())
    with pytest.raises(ValueError, match="no prompts given"):
        sample(emoji, [], SamplerConfig())
