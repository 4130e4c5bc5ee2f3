"""Random numbers belong to a sample: uniform, independent, and the same whatever the batch."""

import pytest
import torch

from speedrl_lab import noise

PROMPTS = ["a dog", "a cat", "a dog", "two cats", "a dog", "a cat"]


def test_a_row_depends_on_seed_prompt_and_occurrence_alone():
    together = noise.uniforms(noise.row_keys(5, PROMPTS), noise.TOKEN, 3, 64)
    dogs = noise.uniforms(noise.row_keys(5, ["a dog"] * 3), noise.TOKEN, 3, 64)
    alone = noise.uniforms(noise.row_keys(5, ["two cats"]), noise.TOKEN, 3, 64)
    assert torch.equal(together[[0, 2, 4]], dogs)
    assert torch.equal(together[3:4], alone)


def test_a_permuted_batch_holds_the_same_rows():
    permuted = [PROMPTS[index] for index in (3, 5, 0, 1, 2, 4)]
    first, second = noise.row_keys(7, PROMPTS), noise.row_keys(7, permuted)
    assert sorted(first.tolist()) == sorted(second.tolist())
    assert len(set(first.tolist())) == len(PROMPTS)


def test_numbers_of_a_position_do_not_depend_on_how_many_are_asked_for():
    keys = noise.row_keys(0, PROMPTS)
    assert torch.equal(noise.uniforms(keys, noise.TOKEN, 0, 64)[:, :10], noise.uniforms(keys, noise.TOKEN, 0, 10))


def test_occurrences_count_earlier_equal_prompts():
    assert noise.occurrences(PROMPTS) == [0, 0, 1, 0, 2, 1]


def test_uniforms_are_uniform_and_open_at_both_ends():
    values = noise.uniforms(noise.row_keys(0, ["a dog"] * 2000), noise.TOKEN, 0, 64).flatten()
    assert values.dtype == torch.float32
    assert float(values.min()) > 0 and float(values.max()) < 1
    counts = torch.bincount((values * 100).long(), minlength=100).double()
    expected = len(values) / 100
    assert float(((counts - expected).square() / expected).sum()) < 149  # 99 degrees: p < 0.001
    grid = (torch.arange(len(values)) + 1) / len(values)
    distance = float((values.double().sort().values - grid).abs().max())
    assert distance < 1.95 / len(values) ** 0.5  # Kolmogorov-Smirnov, p < 0.001


@pytest.mark.parametrize("change", ["seed", "prompt", "occurrence", "purpose", "step", "position", "fold"])
def test_different_streams_are_uncorrelated(change):
    prompts = ["a dog"] * 400
    keys = noise.row_keys(0, prompts)
    one = noise.uniforms(keys, noise.TOKEN, 0, 64)
    other = {
        "seed": lambda: noise.uniforms(noise.row_keys(1, prompts), noise.TOKEN, 0, 64),
        "prompt": lambda: noise.uniforms(noise.row_keys(0, ["a cat"] * 400), noise.TOKEN, 0, 64),
        "occurrence": lambda: one.roll(1, 0),
        "purpose": lambda: noise.uniforms(keys, noise.CHOICE, 0, 64),
        "step": lambda: noise.uniforms(keys, noise.TOKEN, 1, 64),
        "position": lambda: one.roll(1, 1),
        "fold": lambda: noise.uniforms(noise.fold(keys, 1), noise.TOKEN, 0, 64),
    }[change]()
    assert float((one == other).float().mean()) < 1e-3
    correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
    assert abs(float(correlation)) < 3.3 / one.numel() ** 0.5  # p < 0.001


def test_seeds_may_be_any_int64():
    seeds = [0, -1, 2**63 - 1, -(2**63)]
    keys = [int(noise.row_keys(seed, ["a dog"])) for seed in seeds]
    assert len(set(keys)) == len(seeds)


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    noise.uniforms(noise.row_keys(0, PROMPTS), noise.PACE, 0, 8)
    assert torch.equal(before, torch.get_rng_state())
