"""The best sampler a generator has at each cost: what a fair base line is made of."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

import torch
from tqdm.auto import tqdm

from speedrl_lab import compositor, judges
from speedrl_lab.config import SamplerConfig
from speedrl_lab.evaluate import draw_pictures
from speedrl_lab.generator import MaskedGenerator
from speedrl_lab.rewards.embedded import load_detector
from speedrl_lab.runs import write_atomic

SCREEN, FINALISTS = 3, 5
"""A search screens its candidates on every third prompt and judges the best five on all."""
FEW, MANY = 2, 4
"""Samples a prompt when screening and when judging. Two show little of diversity: winners that seemed to have 18.2 had
15.8 on other prompts (2026-11-30)."""
LACKING = 3.0
"""What a search takes off quality for each 1 of the least diversity that is missing: nearly a condition. At 1.0 winners
kept 78 to 88% where 90% was asked (2026-11-29)."""
BASE_SAMPLERS = compositor.DATA / "base_samplers.json"
BASE_SAMPLERS_BY_PASSES = compositor.DATA / "base_samplers_by_passes.json"

Key = TypeVar("Key")
Scores = Callable[[Sequence[str], SamplerConfig, int], torch.Tensor]
"""`prompt_scores` of one generator: prompts, a sampler and samples a prompt in, (P, 2) out."""


def prompt_scores(
    generator: MaskedGenerator, prompts: Sequence[str], sampler: SamplerConfig, samples: int, detector: torch.nn.Module
) -> torch.Tensor:
    """What a search looks at, (P, 2): quality and diversity of so many samples of each prompt, at least two.

    Quality is 1 where the object counts are exact, plus PSNR / 100, their mean; diversity the mean distance of two
    samples in features of the detector.
    """
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    images, _ = draw_pictures(generator, repeated, sampler, seed=0)
    with torch.no_grad():
        features = detector.features(images)
    exact = judges.verdict(detector, images, repeated)["counts"]
    quality = exact + judges.nearest_scene(images, repeated).psnr / 100  # (B,)
    diversity = judges.diversity(features, samples)  # (P,)
    return torch.stack([quality.unflatten(0, (-1, samples)).mean(1), diversity.cpu()], 1)


def worth(scores: torch.Tensor, least_diversity: float = 0.0) -> float:
    """What a search maximizes: mean quality of scores (P, 2), less LACKING times the share of diversity that lacks."""
    quality, diversity = scores.mean(0).tolist()
    return quality - LACKING * max(0.0, 1 - diversity / least_diversity) if least_diversity else quality


def best_samplers(
    generator: MaskedGenerator,
    prompts: Sequence[str],
    pools: Mapping[Key, Sequence[SamplerConfig]],
    least_diversity: float = 0.0,
    scores: Scores | None = None,
) -> dict[Key, SamplerConfig]:
    """The sampler of each pool with the best `worth` of its `prompt_scores`: a fair base.

    A pool of more than FINALISTS is screened first: every SCREEN-th prompt, FEW samples of each; the rest are judged on
    all prompts, MANY samples of each. Samplers that several pools share are drawn once; repeated prompts count once.
    `scores` may know some of them already. Raises ValueError without prompts or for an empty pool.
    """
    if not prompts:
        raise ValueError("no prompts to search on; expected at least one")
    for key, pool in pools.items():
        if not pool:
            raise ValueError(f"no candidate for {key!r}: expected at least one (a guided step costs two passes)")
    prompts = list(dict.fromkeys(prompts))
    if scores is None:
        scores = partial(prompt_scores, generator, detector=load_detector(generator.device))

    @cache
    def worth_of(sampler: SamplerConfig, every: int, samples: int) -> float:
        return worth(scores(prompts[::every], sampler, samples), least_diversity)

    best = {}
    for key, pool in tqdm(pools.items(), desc="search", unit="pool"):
        finalists = list(pool)
        if len(pool) > FINALISTS:
            finalists = sorted(pool, key=lambda sampler: -worth_of(sampler, SCREEN, FEW))[:FINALISTS]
        best[key] = max(finalists, key=lambda sampler: worth_of(sampler, 1, MANY))
    return best


def with_steps(candidates: Sequence[SamplerConfig], steps: int) -> list[SamplerConfig]:
    """Each candidate with so many steps."""
    return [replace(candidate, steps=steps) for candidate in candidates]


def with_passes(candidates: Sequence[SamplerConfig], passes: int) -> list[SamplerConfig]:
    """The candidates that can cost exactly so many forward passes: guided ones take half the steps."""
    costs = [(candidate, 1 if candidate.guidance_scale == 1.0 else 2) for candidate in candidates]
    return [replace(candidate, steps=passes // cost) for candidate, cost in costs if passes % cost == 0]


def search_samplers(
    generator: MaskedGenerator, prompts: Sequence[str], budgets: Sequence[int], candidates: Sequence[SamplerConfig]
) -> dict[int, SamplerConfig]:
    """The best sampler for each number of steps, as `best_samplers`."""
    return best_samplers(generator, prompts, {steps: with_steps(candidates, steps) for steps in budgets})


def save_base_samplers(by_steps: Mapping[int, SamplerConfig], by_passes: Mapping[int, SamplerConfig]) -> None:
    """Write the searched settings of the embedded base, for each number of steps and of passes."""
    for path, samplers in ((BASE_SAMPLERS, by_steps), (BASE_SAMPLERS_BY_PASSES, by_passes)):
        write_atomic(path, json.dumps({budget: asdict(s) for budget, s in samplers.items()}, indent=1) + "\n")


def load_base_samplers() -> dict[int, SamplerConfig]:
    """The searched settings of the embedded base, by number of steps."""
    return _load_samplers(BASE_SAMPLERS)


def load_base_samplers_by_passes() -> dict[int, SamplerConfig]:
    """The searched settings of the embedded base, by number of forward passes."""
    return _load_samplers(BASE_SAMPLERS_BY_PASSES)


def _load_samplers(path: Path) -> dict[int, SamplerConfig]:
    if not path.exists():
        raise FileNotFoundError(f"{path.name} is missing; python data/build_base_samplers.py makes it")
    return {int(budget): SamplerConfig(**values) for budget, values in json.loads(path.read_text()).items()}
