"""Distillation: the targets and gradients against slow loops and autograd, learning against enumeration."""

import json
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from conftest import make_toy, weights_of
from torch.nn import functional

from speedrl_lab import noise
from speedrl_lab.config import DistillConfig, RunConfig, SamplerConfig
from speedrl_lab.distill import distill
from speedrl_lab.draws import fixed_orders, inverse_cdf
from speedrl_lab.enumeration import enumerate_trajectories
from speedrl_lab.generator import StepInfo, can_revise, guided_logits
from speedrl_lab.generators.tiny import make_tiny
from speedrl_lab.revising import Revising
from speedrl_lab.runs import Run
from speedrl_lab.sampler import sample
from speedrl_lab.sdtt import MultiStepMatching
from speedrl_lab.student import iteration_keys, mixed_kl

PROMPTS = ["a dog", "two cats", "a frog left of a pig"]
DRAWN = SamplerConfig(steps=2, schedule="power", power=1.5)
SDTT = DistillConfig(
    method="sdtt", distill_iterations=6, distill_batch_size=6, distill_learning_rate=0.01, rounds=2, teacher_steps=4,
    pool_size=5,
)  # fmt: skip
DIMO = DistillConfig(
    method="dimo", distill_iterations=6, distill_batch_size=6, distill_learning_rate=0.01,
    auxiliary_learning_rate=0.02, student_steps=(1, 2), reverse_share=0.3,
)  # fmt: skip
REVISE = DistillConfig(
    method="revise", distill_iterations=6, distill_batch_size=6, distill_learning_rate=0.01, teacher_steps=4,
    teacher_guidance=1.0, teacher_temperature=0.7, pool_size=5, rounds=1,
)  # fmt: skip
EVERY = pytest.mark.parametrize("config", [SDTT, DIMO, REVISE], ids=["sdtt", "dimo", "revise"])


def run_all(config: DistillConfig, folder=None, stop_after: int | None = None, sampler: SamplerConfig = DRAWN):
    generator = make_toy()
    run = None if folder is None else Run.open(folder, {"method": config.method}, resume=True)
    records = []
    for record in distill(generator, PROMPTS, config, sampler, run):
        records.append(record)
        if record["iteration"] == stop_after:
            break
    return generator, records


@EVERY
def test_records_have_what_a_comparison_needs(config, tmp_path):
    generator, records = run_all(config, tmp_path / "run")
    assert [record["iteration"] for record in records] == list(range(1, 7))
    for record in records:
        assert record["passes"] == record["forwards"] + 2 * record["backwards"] > 0
        assert record["seconds"] > 0 and record["gradient_norm"] > 0 and record["loss"] >= 0
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["loss"] for record in logged] == [record["loss"] for record in records]
    assert (tmp_path / "run" / "policy.safetensors").is_file()
    assert can_revise(generator) == (config.method == "revise")
    assert not torch.equal(weights_of(generator), weights_of(make_toy()))


@EVERY
@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_a_stopped_run_goes_on_bit_for_bit(config, stop_after, tmp_path, monkeypatch):
    monkeypatch.setattr(import_module("speedrl_lab.distill"), "SAVE_EVERY", 2)
    whole, _ = run_all(config, tmp_path / "whole")
    run_all(config, tmp_path / "parts", stop_after)
    parts, _ = run_all(config, tmp_path / "parts")
    assert torch.equal(weights_of(whole), weights_of(parts))


def test_passes_of_multi_step_matching_are_those_that_were_made(monkeypatch):
    made = count_rows(monkeypatch)
    _, records = run_all(SDTT)
    assert sum(record["forwards"] for record in records) == made[0]
    assert records[-1]["round"] == 2 and records[0]["round"] == 1
    assert records[-1]["forwards"] < records[1]["forwards"]  # the second teacher needs no guidance


def test_passes_of_learning_to_revise_are_those_that_were_made(monkeypatch):
    made = count_rows(monkeypatch)
    _, records = run_all(REVISE)
    assert sum(record["forwards"] for record in records) == made[0]


def test_drafts_hold_the_first_tokens_intact_then_guesses_then_masks():
    """The batched drafts against one sample at a time."""
    student = make_toy()
    method = Revising(student, PROMPTS, REVISE, DRAWN, seed=0)
    tokens, prompts = torch.randint(3, (60, 4), generator=torch.Generator().manual_seed(1)), PROMPTS * 20
    keys = iteration_keys(0, 7, 60, tokens.device)
    cond = student.encode(prompts)
    drafts = method._state(tokens, cond, keys)
    orders, numbers = fixed_orders(student, DRAWN, keys), noise.uniforms(keys, noise.BUDGET, 0, 4)
    wrong = 0
    for row in range(60):
        jitter, stage, share, intact = numbers[row].tolist()
        shown = round(4 * min(1.0, (row + jitter) / 60 / 0.9) ** DRAWN.power)
        right = max(1, int(shown * stage))
        order = orders[row].tolist()
        start = torch.full((1, 4), 4)
        start[0, order[:right]] = tokens[row, order[:right]]
        log_probs = student.logits(start, student.encode([prompts[row]]), StepInfo(0, 1))[0].log_softmax(-1)
        expected = torch.full((4,), 4)
        for place, position in enumerate(order[:shown]):
            coin = float(noise.uniforms(keys[row : row + 1], noise.MASK, 0, 4)[0, position])
            expected[position] = tokens[row, position]
            if place >= right and coin < share / 2 and intact > 0.25:
                uniform = noise.uniforms(keys[row : row + 1], noise.TOKEN, 0, 4)[0, position]
                expected[position] = inverse_cdf(log_probs[position][None], uniform[None])[0]
        assert torch.equal(drafts[row], expected)
        wrong += int(((drafts[row] != 4) & (drafts[row] != tokens[row])).sum())
    assert wrong > 0


def test_learning_to_revise_mends_what_contradicts_itself():
    """Two tokens that agree in every sample: drawn side by side they often do not, drawn anew they do."""
    generator = make_tiny((1, 2))
    pictures = torch.tensor([[0, 0], [1, 1], [2, 2]])
    config = replace(REVISE, distill_batch_size=64, pool_size=60)
    method = Revising(generator, PROMPTS, config, DRAWN, seed=0)
    method.pool.tokens = pictures.repeat(20, 1)
    for iteration in range(400):
        method.update(iteration, 1 - iteration / 400)
    wrong = {}
    for steps, revise in ((1, False), (4, True)):
        sampler = SamplerConfig(steps=min(steps, 2), schedule="linear", revise=revise)
        tokens = sample(generator, PROMPTS[:1] * 300, sampler).tokens
        wrong[revise] = float((tokens[:, 0] != tokens[:, 1]).float().mean())
    assert wrong[False] > 0.5 and wrong[True] < 0.1


def test_passes_of_token_matching_are_those_that_were_made(monkeypatch):
    made = count_rows(monkeypatch)
    _, records = run_all(DIMO)
    assert sum(record["forwards"] for record in records) == made[0]


def count_rows(monkeypatch) -> list[int]:
    """Counts the rows that any toy network evaluates; a first pass that samples could share is made for each."""
    made = [0]
    monkeypatch.setattr("speedrl_lab.sampler._Unmasking._alike", lambda self, step: False)
    network = type(make_toy().policy)
    plain = network.forward

    def counted(self, tokens, text):
        made[0] += len(tokens)
        return plain(self, tokens, text)

    monkeypatch.setattr(network, "forward", counted)
    return made


def test_mixed_kl_is_both_divergences():
    rng = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 5, generator=rng).log_softmax(-1) for _ in range(2))
    forward = functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    reverse = functional.kl_div(teacher, student, reduction="none", log_target=True).sum(-1)
    assert torch.allclose(mixed_kl(student, teacher, 0.0), forward, atol=1e-6)
    assert torch.allclose(mixed_kl(student, teacher, 0.25), 0.75 * forward + 0.25 * reverse, atol=1e-6)


@pytest.mark.parametrize("round_", [0, 1])
def test_multi_step_targets_are_what_the_teacher_says_when_it_unmasks(round_):
    """The batched targets against one sample at a time, two teacher steps written out."""
    student = make_toy()
    method = MultiStepMatching(student, PROMPTS, SDTT, DRAWN, seed=0)
    method.round, method.teacher = round_, make_toy(seed=5)
    rng = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, (6, 4), generator=rng)
    prompts = PROMPTS * 2
    keys = iteration_keys(0, 7, 6, tokens.device)
    state, target, rows, passes = method._targets(tokens, student.encode(prompts), keys)
    scale = SDTT.teacher_guidance if round_ == 0 else 1.0
    assert passes == 2 * 6 * (2 if round_ == 0 else 1)
    orders = fixed_orders(student, DRAWN, keys)
    small = 2**round_ / SDTT.teacher_steps
    found = iter(target)
    for row in range(6):
        jitter = float(noise.uniforms(keys, noise.BUDGET, 0, 1)[row, 0])
        began = (row + jitter) / 6 * (1 - 2 * small)
        known = int(4 * began**DRAWN.power)
        first = max(known + 1, round(4 * (began + small) ** DRAWN.power))
        masked = orders[row, known:].tolist()
        expected_state = tokens[row].clone()
        expected_state[masked] = 4
        assert torch.equal(state[row], expected_state)
        cond = student.encode([prompts[row]])

        def predict(seen, cond=cond):
            logits = guided_logits(method.teacher, seen[None], cond, scale, StepInfo(0, 1))
            return logits[0].log_softmax(-1)

        early = predict(expected_state)
        uniforms = noise.uniforms(keys, noise.TOKEN, 0, 4)[row]
        guess = expected_state.clone()
        for position in orders[row, known:first].tolist():
            guess[position] = inverse_cdf(early[position][None], uniforms[position][None])
        later = predict(guess)
        for position in sorted(masked):
            wanted = early if position in orders[row, known:first].tolist() else later
            assert torch.allclose(next(found), wanted[position], atol=1e-5)
    assert next(found, None) is None
    assert len(rows) == int((state == 4).sum())


def outcome_probabilities(generator, prompt: str, sampler: SamplerConfig) -> torch.Tensor:
    """Exact probability of every sequence of tokens, (V ** N,)."""
    outcomes = enumerate_trajectories(generator, prompt, sampler)
    size = generator.spec.codebook_size
    place = size ** torch.arange(generator.spec.num_tokens)
    index = (outcomes.trajectory.tokens * place).sum(1)
    return torch.zeros(size ** len(place), dtype=torch.float64).index_add(0, index, outcomes.log_prob.detach().exp())


def test_token_matching_brings_one_step_nearer_to_the_slow_teacher():
    """Total variation between the student's one step and the teacher's four, both enumerated.

    The teacher's tokens hang together strongly, so that one plain step is far off. Two players chase each
    other: with large steps the distance swings.
    """
    teacher, student = make_tiny(codes=2, seed=4), make_tiny(codes=2, seed=4)
    config = replace(
        DIMO, distill_iterations=120, distill_batch_size=384, student_steps=(1,), teacher_guidance=1.0,
        reverse_share=0.0, distill_learning_rate=0.001, auxiliary_learning_rate=0.01,
    )  # fmt: skip
    prompt, slow, fast = "a dog", SamplerConfig(steps=4, schedule="linear"), SamplerConfig(steps=1)
    wanted = outcome_probabilities(teacher, prompt, slow)
    before = float((outcome_probabilities(student, prompt, fast) - wanted).abs().sum()) / 2
    for _ in distill(student, [prompt], config, fast):
        pass
    after = float((outcome_probabilities(student, prompt, fast) - wanted).abs().sum()) / 2
    assert before > 0.5 and after < 0.6 * before


def test_multi_step_matching_folds_guidance_in():
    """Unguided, the student comes nearer to the guided teacher than the unguided teacher is."""
    teacher, student = make_tiny(codes=2, seed=4), make_tiny(codes=2, seed=4)
    config = replace(SDTT, distill_iterations=80, distill_batch_size=64, rounds=1, teacher_guidance=3.0, pool_size=64)
    prompt, plain = "a dog", SamplerConfig(steps=2, schedule="power", power=1.5)
    wanted = outcome_probabilities(teacher, prompt, replace(plain, steps=4, guidance_scale=3.0))
    before = float((outcome_probabilities(student, prompt, plain) - wanted).abs().sum())
    for _ in distill(student, [prompt], config, plain):
        pass
    after = float((outcome_probabilities(student, prompt, plain) - wanted).abs().sum())
    assert after < 0.7 * before


@pytest.mark.parametrize(
    ("changes", "sampler", "message"),
    [
        ({}, SamplerConfig(order="confidence"), "order='confidence'"),
        ({}, SamplerConfig(schedule="paced"), "schedule='paced'"),
        ({"teacher_steps": 8}, DRAWN, "teacher_steps=8: expected at most 4"),
        ({"method": "dimo", "student_steps": (1, 5)}, DRAWN, "student_steps"),
    ],
)
def test_what_cannot_be_distilled_is_one_line_before_any_work(changes, sampler, message):
    with pytest.raises(ValueError, match=message) as caught:
        next(distill(make_toy(), PROMPTS, replace(SDTT, **changes), sampler))
    assert "\n" not in str(caught.value)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="teacher_steps=12: expected a multiple of 2\\*\\*rounds = 8"):
        DistillConfig(teacher_steps=12)
    with pytest.raises(ValueError, match="nearest: 'sdtt'"):
        RunConfig.from_flat("smoke", method="sdt")
    assert RunConfig.from_flat("smoke", student_steps=[1, 2]).distillation.student_steps == (1, 2)
