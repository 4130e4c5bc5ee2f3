"""What makes an update cheap changes no gradient: rows, shared first states, a kept reference, micro-batches."""

from dataclasses import replace

import pytest
import torch
from conftest import randomize, share_of_twos, weights_of
from torch.utils._python_dispatch import TorchDispatchMode

from speedrl_lab import loss
from speedrl_lab.config import SamplerConfig, TrainConfig
from speedrl_lab.learner import Learner
from speedrl_lab.likelihood import scored_states, trajectory_log_prob, visits
from speedrl_lab.loss import RolloutLoss, merged_start
from speedrl_lab.pace import head_for
from speedrl_lab.planner import largest_micro_batch, passes, plan
from speedrl_lab.rl import rollout, train
from speedrl_lab.sampler import sample

PROMPTS = ["a dog", "two cats", "a frog left of a pig"]
TWOS = {"twos": share_of_twos}
BASE = TrainConfig(
    sampler=SamplerConfig(steps=3, schedule="power"), iterations=2, num_groups=3, group_size=4, micro_batch_size=5,
    warmup_iterations=0, quality_weights={"twos": 1.0}, kl_estimator="exact",
)  # fmt: skip
DRAWN = {
    "power": {},
    "paced": {"sampler": SamplerConfig(steps=4, schedule="paced")},
    "random order": {"sampler": SamplerConfig(steps=3, order="random", schedule="random_budget")},
    "guided": {"sampler": SamplerConfig(steps=2, schedule="linear", guidance_scale=1.7, temperature=0.9)},
    "threshold": {"sampler": SamplerConfig(steps=3, schedule="threshold", stop_confidence=0.05)},
    "noisy start": {"sampler": SamplerConfig(steps=2, schedule="linear", start_noise=0.3)},
}
ESTIMATED = {
    "confidence": {"sampler": SamplerConfig(steps=3, order="confidence")},
    "tokens of confidence": {"sampler": SamplerConfig(steps=3, order="confidence"), "order_factor": "token_only"},
    "adaptive": {"sampler": SamplerConfig(steps=3, schedule="adaptive")},
    "revised": {"sampler": SamplerConfig(steps=3, schedule="linear", revise=True)},
    **{name: {"estimator": name} for name in ("replay", "critical", "random_mask", "coupled", "one_step")},
}


def work_of(benchmark, generator, config: TrainConfig):
    """A rollout of the generator, to be scored after its weights have moved, and what it started from."""
    if config.sampler.schedule in ("paced", "adaptive"):
        generator.pace = head_for(config.sampler.schedule, 0)
    prompts = [prompt for prompt in PROMPTS for _ in range(config.group_size)]
    trajectory = replace(sample(generator, prompts, config.sampler), pace=None)
    reference = generator.copy()
    learner = Learner(generator, config)
    randomize(generator.policy, 7, std=0.31)
    advantage = torch.randn(len(prompts), generator=torch.Generator().manual_seed(3))
    return benchmark.Work(learner, config, prompts, trajectory, advantage), reference


def distance(benchmark, work, reference) -> float:
    found = []
    for turn in (lambda: benchmark.ours(work), lambda: benchmark.plain(work, reference)):
        turn()
        found.append(benchmark.gradient(work))
    assert float(found[1].norm()) > 1e-3
    return float((found[0] - found[1]).norm() / found[1].norm())


@pytest.mark.parametrize("kl_estimator", ["cross_entropy", "exact", "k1", "k2", "k3"])
@pytest.mark.parametrize("name", DRAWN)
def test_the_gradient_is_that_of_the_plain_replay(benchmark, emoji, name, kl_estimator):
    config = replace(BASE, kl_estimator=kl_estimator, **DRAWN[name])
    assert distance(benchmark, *work_of(benchmark, emoji, config)) < 1e-5


def test_so_it_is_in_later_epochs_and_with_adapters(benchmark, emoji):
    assert distance(benchmark, *work_of(benchmark, emoji, replace(BASE, inner_epochs=3))) < 1e-5
    lora = replace(BASE, lora_rank=4)
    prompts = [prompt for prompt in PROMPTS for _ in range(4)]
    trajectory, reference = sample(emoji, prompts, BASE.sampler), emoji.copy()
    learner = Learner(emoji, lora)
    with torch.no_grad():
        for key, value in emoji.policy.named_parameters():
            if "lora_B" in key:
                value.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    advantage = torch.randn(12, generator=torch.Generator().manual_seed(3))
    assert distance(benchmark, benchmark.Work(learner, lora, prompts, trajectory, advantage), reference) < 1e-5


@pytest.mark.parametrize("name", ESTIMATED)
def test_the_gradient_is_that_of_the_log_probability(toy, name):
    """Where the ratio is 1, that of the surrogate is the advantage times that of log pi."""
    config, generator = replace(BASE, **ESTIMATED[name]), toy()
    generator.pace = head_for("adaptive", 0) if name == "adaptive" else None
    prompts = [prompt for prompt in PROMPTS for _ in range(config.group_size)]
    drawn = sample(generator, prompts, config.sampler)
    advantage = torch.randn(len(prompts), generator=torch.Generator().manual_seed(3))
    learner = Learner(generator, replace(config, lora_rank=0))
    ours = RolloutLoss(generator, learner.anchored, config, prompts, drawn, 11, config.micro_batch_size)
    ours.backward(advantage, torch.ones(len(prompts), dtype=torch.bool), kl_weight=0.0)
    found = torch.cat([value.grad.flatten() for value in generator.policy.parameters()])
    log_prob = trajectory_log_prob(
        generator, prompts, drawn, estimator=config.estimator, order_factor=config.order_factor, seed=11
    )
    total = -(advantage * log_prob).sum() / drawn.tokens.numel()
    exact = torch.autograd.grad(total, list(generator.policy.parameters()))
    exact = torch.cat([part.flatten() for part in exact])
    if name != "adaptive":
        assert torch.allclose(found, exact, rtol=0, atol=1e-5 * float(exact.abs().max()))
    elif not torch.allclose(found, exact, atol=1e-5):  # exact follows the pace actions through the network as well
        assert float(torch.cosine_similarity(found, exact, 0)) > 0.5


def test_samples_of_a_prompt_share_their_first_state(toy):
    drawn = sample(toy(), [prompt for prompt in PROMPTS for _ in range(4)], BASE.sampler)
    prompt_of = torch.arange(3).repeat_interleave(4)
    visit = next(visits(drawn, 10))
    merged = merged_start(visit, prompt_of)
    assert merged.samples.tolist() == [0, 4, 8] and (merged.tokens == drawn.mask_id).all()
    state, position = merged.rows // 4, merged.rows % 4
    assert torch.equal(prompt_of[merged.samples[state]], prompt_of[visit.owners])
    assert torch.equal(position, visit.positions) and torch.equal(merged.codes, visit.codes)


def first_states(trajectory, config: TrainConfig, generator, prompts) -> list[int]:
    learner = Learner(generator, config)
    made = RolloutLoss(generator, learner.anchored, config, prompts, trajectory, 0, 100)
    plain = scored_states(trajectory, config.estimator, config.order_factor, 0, 100)
    return [len(visit.samples) - len(other.samples) for visit, other in zip(plain, made.visits, strict=True)]


def test_only_states_that_are_alike_are_shared(toy):
    prompts = [prompt for prompt in PROMPTS for _ in range(4)]
    for changes, saved in (
        ({}, [9, 0, 0]),
        ({"sampler": SamplerConfig(steps=3, order="confidence")}, [0, 0, 0]),
        ({"sampler": SamplerConfig(steps=2, schedule="linear", start_noise=0.5)}, [0, 0]),
        ({"estimator": "coupled"}, [0, 0]),
    ):
        config, generator = replace(BASE, **changes), toy()
        assert first_states(sample(generator, prompts, config.sampler), config, generator, prompts) == saved


@pytest.mark.parametrize("kl_estimator", ["cross_entropy", "k3"])
def test_a_reference_that_fits_is_asked_once(toy, monkeypatch, kl_estimator):
    config = replace(BASE, inner_epochs=3, kl_estimator=kl_estimator, learning_rate=0.05)
    found = []
    for most in (loss.REFERENCE_BYTES, 0):
        monkeypatch.setattr(loss, "REFERENCE_BYTES", most)
        generator = toy()
        records = list(train(generator, PROMPTS, TWOS, config))
        assert sum(passes(config, 4, 3).values()) == records[0]["passes"]
        found.append((weights_of(generator), records[0]["passes"] - records[0]["forwards"]))
    (kept, few), (anew, many) = found
    assert torch.equal(kept, anew) and few / many == pytest.approx(10 / 12)


class _Waits(TorchDispatchMode):
    """Counts how often a number is asked from the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_micro_batches_do_not_wait_for_the_device(emoji):
    drawn = rollout(emoji, PROMPTS, TWOS, BASE, 0)
    learner = Learner(emoji, BASE)
    made = RolloutLoss(emoji, learner.anchored, BASE, drawn.prompts, drawn.trajectory, 0, 2)
    with _Waits() as waits:
        measured = made.backward(torch.ones(12), torch.ones(12, dtype=torch.bool), 0.1)
        assert waits.count == 0  # `tolist` at the end is no operation
        assert float(torch.tensor([measured["entropy"]]).sum()) > 0 and waits.count == 1


def test_memory_is_that_of_a_micro_batch(benchmark, emoji):
    config = replace(BASE, group_size=32, micro_batch_size=16, sampler=SamplerConfig(steps=4, schedule="power"))
    work, reference = work_of(benchmark, emoji, config)
    device = torch.device("cpu")
    highest = [benchmark.peak(turn, device) for turn in (lambda: benchmark.ours(work),
                                                         lambda: benchmark.plain(work, reference))]  # fmt: skip
    assert highest[0] < 0.6 * highest[1]


def test_micro_batches_are_as_large_as_fits(emoji):
    config = replace(BASE, group_size=32, micro_batch_size=0)

    def missing(size: int, free: int) -> int:
        planned = plan(emoji, replace(config, micro_batch_size=size), free=0)
        return planned.needed - planned.held - free

    assert largest_micro_batch(emoji, config, free=0) == 1
    for wanted in (32, 64):
        free = missing(wanted, 0)
        assert largest_micro_batch(emoji, config, free=free) == wanted and missing(2 * wanted, free) > 0
    few = replace(config, num_groups=1, group_size=3)
    assert largest_micro_batch(emoji, few, free=2**40) == 4  # all at once


def test_a_run_with_fitting_micro_batches_trains(emoji):
    rewards = {"low": lambda images, prompts, trajectory: (trajectory.tokens < 500).float().mean(1)}
    config = replace(BASE, micro_batch_size=0, quality_weights={"low": 1.0})
    learner = Learner(emoji.copy(), config)
    assert learner.micro_batch_size == 16 and learner.state()["micro_batch_size"] == 16
    assert len(list(train(emoji, PROMPTS, rewards, config))) == 2
