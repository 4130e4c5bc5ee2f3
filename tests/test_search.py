"""The search for the best sampler at each cost."""

import numpy as np
import pytest
import torch

from speedrl_lab import search
from speedrl_lab.config import SamplerConfig
from speedrl_lab.evaluate import draw_pictures, score_samples

PROMPTS = [
    "a dog", "two cats on a red background", "a star left of a pig", "a key above a cake",
    "a boat and a ball", "two frogs",
]  # fmt: skip
GUIDANCE = [SamplerConfig(guidance_scale=scale) for scale in (1.0, 2.0, 3.0)]


def preferring(wanted, calls):
    """A `prompt_scores` that gives `wanted(sampler)`, and 1 for diversity, on every prompt and notes its calls."""

    def scores(generator, prompts, sampler, samples, detector):
        calls.append((sampler, tuple(prompts), samples))
        return torch.tensor([[float(wanted(sampler)), 1.0]] * len(prompts))

    return scores


def test_the_search_takes_the_best_sampler_of_each_number_of_steps(emoji, monkeypatch):
    winners = {1: 3.0, 4: 1.0}
    monkeypatch.setattr(search, "prompt_scores", preferring(lambda s: s.guidance_scale == winners[s.steps], []))
    best = search.search_samplers(emoji, PROMPTS, [1, 4], GUIDANCE)
    assert {budget: config.guidance_scale for budget, config in best.items()} == winners
    assert {budget: config.steps for budget, config in best.items()} == {1: 1, 4: 4}


def test_guided_samplers_take_half_the_steps_of_a_number_of_passes(emoji):
    found = {passes: search.with_passes(GUIDANCE, passes) for passes in (1, 3, 8)}
    assert [(s.guidance_scale, s.steps) for s in found[8]] == [(1.0, 8), (2.0, 4), (3.0, 4)]
    assert [(s.guidance_scale, s.steps) for s in found[1] + found[3]] == [(1.0, 1), (1.0, 3)]
    for sampler in found[8]:
        assert draw_pictures(emoji, ["a dog"], sampler, seed=0)[1]["forwards"].tolist() == [8]
    with pytest.raises(ValueError, match="no candidate for 3: expected at least one"):
        search.best_samplers(emoji, PROMPTS, {3: search.with_passes(GUIDANCE[1:], 3)})
    with pytest.raises(ValueError, match="no prompts to search on"):
        search.search_samplers(emoji, [], [1], GUIDANCE)


def test_a_large_pool_is_screened_and_shared_samplers_are_drawn_once(emoji, monkeypatch):
    calls = []
    pool = [SamplerConfig(temperature=1 + index / 10) for index in range(8)]
    monkeypatch.setattr(search, "prompt_scores", preferring(lambda s: -abs(s.temperature - 1.3), calls))
    best = search.best_samplers(emoji, [*PROMPTS, PROMPTS[0]], {"all": pool, "few": pool[2:5]})
    assert best == {"all": pool[3], "few": pool[3]}
    assert len(calls) == len(set(calls)) == 8 + search.FINALISTS
    assert {(prompts, samples) for _, prompts, samples in calls[:8]} == {(tuple(PROMPTS[::3]), search.FEW)}
    assert {(prompts, samples) for _, prompts, samples in calls[8:]} == {(tuple(PROMPTS), search.MANY)}


def test_a_search_judges_counts_crispness_and_diversity(emoji):
    detector = search.load_detector(emoji.device)
    scores = search.prompt_scores(emoji, PROMPTS[:3], SamplerConfig(steps=2), 2, detector)
    frame = score_samples({"base": emoji}, PROMPTS[:3], [2], 1)
    frame["quality"] = frame.accuracy + frame.psnr / 100
    expected = frame.groupby("prompt", sort=False)[["quality", "diversity"]].mean()
    assert np.allclose(scores, expected.loc[PROMPTS[:3]], atol=1e-3)


def test_what_lacks_diversity_is_marked_down_by_the_share_it_lacks(emoji, monkeypatch):
    scores = torch.tensor([[1.2, 10.0], [0.8, 14.0]])
    assert search.worth(scores) == pytest.approx(1.0) == search.worth(scores, least_diversity=12.0)
    assert search.worth(scores, least_diversity=15.0) == pytest.approx(0.4)

    def colder_is_better_and_more_alike(generator, prompts, sampler, samples, detector):
        return torch.tensor([[1 - sampler.temperature / 10, 20 * sampler.temperature]] * len(prompts))

    monkeypatch.setattr(search, "prompt_scores", colder_is_better_and_more_alike)
    pool = {"all": [SamplerConfig(temperature=t) for t in (0.7, 0.9, 1.0)]}
    assert search.best_samplers(emoji, PROMPTS, pool)["all"].temperature == 0.7
    assert search.best_samplers(emoji, PROMPTS, pool, least_diversity=18.0)["all"].temperature == 0.9


def test_searched_samplers_round_trip(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "BASE_SAMPLERS", tmp_path / "samplers.json")
    monkeypatch.setattr(search, "BASE_SAMPLERS_BY_PASSES", tmp_path / "by_passes.json")
    with pytest.raises(FileNotFoundError, match="by_passes.json is missing; python data/build_base_samplers.py"):
        search.load_base_samplers_by_passes()
    by_steps = {2: SamplerConfig(steps=2, order="confidence"), 16: SamplerConfig(steps=16, temperature=0.9)}
    by_passes = {2: SamplerConfig(steps=1, guidance_scale=2.0)}
    search.save_base_samplers(by_steps, by_passes)
    assert search.load_base_samplers() == by_steps
    assert search.load_base_samplers_by_passes() == by_passes


def test_the_committed_base_samplers_have_the_steps_of_their_budget():
    assert all(sampler.steps == steps for steps, sampler in search.load_base_samplers().items())
