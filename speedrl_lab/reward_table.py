"""Models x budgets judged by rewards: for pictures that the judges of EmojiScenes know nothing about.

A reward that was trained on says how well training went, not how good the pictures are: add one that had no weight.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd
import torch

from speedrl_lab.config import SamplerConfig
from speedrl_lab.generator import MaskedGenerator
from speedrl_lab.rewards import Reward
from speedrl_lab.rl import within_group_diversity
from speedrl_lab.sampler import sample

SAMPLES_PER_PROMPT = 2
"""The fewest that show diversity."""


def reward_table(
    generators: Mapping[str, MaskedGenerator],
    prompts: Sequence[str],
    budgets: Sequence[int],
    rewards: Mapping[str, Reward],
    sampler: SamplerConfig,
    seeds: int = 1,
    batch_size: int = 16,
) -> pd.DataFrame:
    """Mean raw rewards of every model, budget and seed, two samples a prompt: one row each.

    Columns: model, budget, seed, steps, forwards, seconds_loop and seconds_total (each a sample), one a reward, and
    diversity, the distance of a prompt's two pictures. `sampler` is taken with `steps` of the budget; `batch_size`
    is prompts at once. Raises ValueError for nothing to do.
    """
    if not generators or not prompts or not len(budgets) or seeds < 1:
        raise ValueError("nothing to score: expected at least one generator, one prompt, one budget and one seed")
    rows = []
    for seed in range(seeds):
        for budget in budgets:
            for name, generator in generators.items():
                scores = _scored(generator, prompts, rewards, replace(sampler, steps=budget), seed, batch_size)
                rows.append({"model": name, "budget": budget, "seed": seed, **scores})
    return pd.DataFrame(rows)


def _scored(
    generator: MaskedGenerator,
    prompts: Sequence[str],
    rewards: Mapping[str, Reward],
    sampler: SamplerConfig,
    seed: int,
    batch_size: int,
) -> dict[str, float]:
    """Means over all samples; each batch counts as many times as it has samples."""
    batches = []
    for start in range(0, len(prompts), batch_size):
        repeated = [text for text in prompts[start : start + batch_size] for _ in range(SAMPLES_PER_PROMPT)]
        began = time.perf_counter()
        trajectory = sample(generator, repeated, sampler, seed=seed)
        _wait(generator.device)
        looped = time.perf_counter() - began
        images = generator.decode(trajectory.tokens)
        _wait(generator.device)
        means = {
            "steps": float(trajectory.steps.float().mean()),
            "forwards": float(trajectory.forwards.float().mean()),
            "seconds_loop": looped / len(repeated),
            "seconds_total": (time.perf_counter() - began) / len(repeated),
            **{name: float(reward(images, repeated, trajectory).nanmean()) for name, reward in rewards.items()},
            "diversity": within_group_diversity(images, SAMPLES_PER_PROMPT),
        }
        batches.append({name: value * len(repeated) for name, value in means.items()})
    return (pd.DataFrame(batches).sum() / (len(prompts) * SAMPLES_PER_PROMPT)).to_dict()


def _wait(device: torch.device) -> None:
    """Until the device has done what it was told, so that seconds are its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
