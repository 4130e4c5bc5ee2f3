"""Models x budgets x seeds, judged by what no training saw: one row an image, then a table with intervals.

The judges are those of EmojiScenes. Costs are reported as steps, forward passes and seconds, of the
sampling loop alone and with the decoder; models take turns within a seed and budget, after a warm-up.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from speedrl_lab import compositor, judges, noise, scenes
from speedrl_lab.config import SamplerConfig
from speedrl_lab.generator import MaskedGenerator
from speedrl_lab.rewards.embedded import load_clip, load_detector
from speedrl_lab.sampler import sample

SAMPLES_PER_PROMPT = 2
"""Two samples of each prompt and seed: the fewest that show diversity."""
BATCH_SIZE = 128
METRICS = ("accuracy", "color", "relation", "clip", "psnr", "diversity")
SET_METRICS = ("kid", "fd")
COSTS = ("steps", "forwards", "seconds_loop", "seconds_total")
Samplers = Mapping[str, SamplerConfig | Mapping[int, SamplerConfig]]


def score_samples(
    generators: Mapping[str, MaskedGenerator],
    prompts: Sequence[str],
    budgets: Sequence[int] = (1, 2, 4, 8),
    seeds: int = 3,
    samplers: Samplers | None = None,
) -> pd.DataFrame:
    """Sample every model at every budget and judge each picture: a frame with one row an image.

    `samplers` gives a model's settings, one for all budgets (its `steps` becomes the budget) or one a
    budget, taken as it is, so that a budget may also count passes; models without an entry take Halton
    order, cosine schedule, no guidance. `sample` numbers the samples of a prompt. `kid` and `fd` compare
    the set of a seed with as many real scenes of the same kinds.
    """
    if not generators or not len(budgets) or seeds < 1:
        raise ValueError("nothing to evaluate: expected at least one generator, one budget and one seed")
    scenes.encode_captions(prompts)  # an unreadable prompt fails before the first sample
    settings = {(name, budget): _sampler(samplers or {}, name, budget) for name in generators for budget in budgets}
    first = next(iter(generators.values()))
    detector, clip = load_detector(first.device), load_clip(first.device)
    repeated = [prompt for prompt in prompts for _ in range(SAMPLES_PER_PROMPT)]
    frames = []
    with tqdm(total=len(settings) * seeds, desc="evaluate", unit="set") as progress:
        for name, generator in generators.items():
            sample(generator, list(prompts[:2]), settings[name, budgets[0]])  # warm-up
        for seed in range(seeds):
            real = real_pictures(repeated, seed)
            for budget in budgets:
                for name, generator in generators.items():
                    images, costs = draw_pictures(generator, repeated, settings[name, budget], seed)
                    scores = judge(images, repeated, real, detector, clip)
                    frames.append(pd.DataFrame({"model": name, "budget": budget, "seed": seed, **costs, **scores}))
                    progress.update()
    return pd.concat(frames, ignore_index=True)


def _sampler(samplers: Samplers, name: str, budget: int) -> SamplerConfig:
    chosen = samplers.get(name, SamplerConfig())
    if isinstance(chosen, SamplerConfig):
        return replace(chosen, steps=budget)
    if budget not in chosen:
        raise ValueError(f"no sampler given for {name!r} at budget {budget}; given: {sorted(chosen)}")
    return chosen[budget]


def whole_batches(prompts: Sequence[str], size: int) -> list[list[int]]:
    """Rows in batches of at most `size` that keep all rows of a prompt together.

    The sampler numbers the samples of a prompt inside its batch: a prompt split over two batches would
    give the same samples twice. A prompt with more than `size` rows is a batch of its own.
    """
    rows_of: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows_of.setdefault(prompt, []).append(row)
    batches: list[list[int]] = [[]]
    for rows in rows_of.values():
        if batches[-1] and len(batches[-1]) + len(rows) > size:
            batches.append([])
        batches[-1] += rows
    return batches


def draw_pictures(
    generator: MaskedGenerator, prompts: Sequence[str], sampler: SamplerConfig, seed: int
) -> tuple[torch.Tensor, dict[str, np.ndarray | float]]:
    """Pictures (B, 3, H, W) on the CPU and the costs of each; seconds are means an image."""
    pictures, steps, forwards = [], [], []
    loop = total = 0.0
    batches = whole_batches(prompts, BATCH_SIZE)
    for rows in batches:
        batch = [prompts[row] for row in rows]
        began = time.perf_counter()
        trajectory = sample(generator, batch, sampler, seed=seed)
        if trajectory.tokens.is_cuda:
            torch.cuda.synchronize(trajectory.tokens.device)
        loop += time.perf_counter() - began
        images = generator.decode(trajectory.tokens).cpu()
        total += time.perf_counter() - began
        pictures.append(images)
        steps.append(trajectory.steps.cpu())
        forwards.append(trajectory.forwards.cpu())
    back = torch.tensor([row for rows in batches for row in rows]).argsort()  # to the order of the prompts
    costs = {
        "steps": torch.cat(steps)[back].numpy(),
        "forwards": torch.cat(forwards)[back].numpy(),
        "seconds_loop": loop / len(prompts),
        "seconds_total": total / len(prompts),
    }
    return torch.cat(pictures)[back], costs


@torch.no_grad()
def judge(
    images: torch.Tensor,
    prompts: Sequence[str],
    real: torch.Tensor,
    detector: torch.nn.Module,
    clip: torch.nn.Module,
) -> dict[str, np.ndarray | float | list]:
    """All judges on images (B, 3, 32, 32) in [0, 1], SAMPLES_PER_PROMPT of each prompt in a row."""
    device = next(detector.parameters()).device
    moved = images.to(device)
    verdict = judges.verdict(detector, moved, prompts)
    words = scenes.encode_captions(prompts).to(device)
    group = SAMPLES_PER_PROMPT
    distances = judges.diversity(detector.features(moved), group)
    subset = min(100, len(images) // 2)
    return {
        "prompt": list(prompts),
        "kind": [scenes.parse_caption(prompt).kind for prompt in prompts],
        "sample": noise.occurrences(prompts),
        "accuracy": verdict["counts"].float().cpu().numpy(),
        "color": verdict["color"].float().cpu().numpy(),
        "relation": verdict["relation"].float().cpu().numpy(),
        "clip": (clip.encode_image(moved) * clip.encode_text(words)).sum(1).cpu().numpy(),
        "psnr": judges.nearest_scene(images, prompts).psnr.numpy(),
        "diversity": distances.repeat_interleave(group).cpu().numpy(),
        "kid": judges.kid(detector, real.to(device), moved, subset_size=subset, subsets=20, seed=0)[0],
        "fd": judges.frechet_distance(detector, real.to(device), moved),
    }


def real_pictures(prompts: Sequence[str], seed: int) -> torch.Tensor:
    """Real scenes of the same kinds as the prompts but other content, (B, 3, 32, 32)."""
    rng = torch.Generator().manual_seed(seed)
    return compositor.paint(scenes.draw_layouts(scenes.draw_like(prompts, rng), rng))


def judge_real(prompts: Sequence[str], seed: int = 0, reconstruct: MaskedGenerator | None = None) -> pd.Series:
    """What the judges say of real scenes, or of their reconstructions: the best anyone can reach."""
    repeated = [prompt for prompt in prompts for _ in range(SAMPLES_PER_PROMPT)]
    rng = torch.Generator().manual_seed(1000 + seed)
    images = compositor.paint(scenes.draw_layouts([scenes.parse_caption(prompt) for prompt in repeated], rng))
    if reconstruct is not None:
        images = reconstruct.decode(reconstruct.tokenize(images)).cpu()
    scores = judge(images, repeated, real_pictures(repeated, seed), load_detector(), load_clip())
    return pd.DataFrame(scores)[[*METRICS, *SET_METRICS]].mean()


def summarize(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a model, budget and seed: means of costs and judges."""
    columns = [*COSTS, *METRICS, *SET_METRICS]
    return frame.groupby(["model", "budget", "seed"], sort=False)[columns].mean().reset_index()


def evaluate(
    generators: Mapping[str, MaskedGenerator],
    prompts: Sequence[str],
    budgets: Sequence[int] = (1, 2, 4, 8),
    seeds: int = 3,
    samplers: Samplers | None = None,
) -> pd.DataFrame:
    """`score_samples`, summarized: one row a model, budget and seed."""
    return summarize(score_samples(generators, prompts, budgets, seeds, samplers))


def frontier(frame: pd.DataFrame, draws: int = 1000) -> pd.DataFrame:
    """One row a model and budget with 95% intervals, from the frame of `score_samples`.

    Intervals are percentiles of a bootstrap over prompts (samples and seeds of a prompt stay together);
    for `kid` and `fd`, which belong to a set, two standard errors over the seeds.
    """
    rng = np.random.default_rng(0)
    rows = []
    for (model, budget), part in frame.groupby(["model", "budget"], sort=False):
        by_prompt = part.groupby("prompt")[list(METRICS)].mean().to_numpy()  # (P, M)
        weights = rng.multinomial(len(by_prompt), np.full(len(by_prompt), 1 / len(by_prompt)), draws)
        means = weights @ by_prompt / len(by_prompt)  # (draws, M)
        low, high = np.quantile(means, [0.025, 0.975], axis=0)
        row = {"model": model, "budget": budget, **part[list(COSTS)].mean().to_dict()}
        for index, metric in enumerate(METRICS):
            row |= {metric: by_prompt[:, index].mean(), f"{metric}_low": low[index], f"{metric}_high": high[index]}
        sets = part.groupby("seed")[list(SET_METRICS)].mean()
        error = 2 * sets.std() / max(1, len(sets)) ** 0.5 if len(sets) > 1 else sets.std().fillna(np.nan)
        for metric in SET_METRICS:
            center = sets[metric].mean()
            row |= {metric: center, f"{metric}_low": center - error[metric], f"{metric}_high": center + error[metric]}
        rows.append(row)
    return pd.DataFrame(rows)


def paired_difference(
    frame: pd.DataFrame, left: tuple[str, int], right: tuple[str, int], metric: str, draws: int = 1000
) -> tuple[float, float, float]:
    """Mean of (left - right) for two (model, budget) on the same prompts, with its 95% interval."""
    means = [
        frame[(frame.model == model) & (frame.budget == budget)].groupby("prompt")[metric].mean()
        for model, budget in (left, right)
    ]
    difference = (means[0] - means[1]).dropna().to_numpy()
    if len(difference) == 0:
        raise ValueError(f"{left} and {right} share no prompts in this frame")
    rng = np.random.default_rng(0)
    draw = rng.choice(difference, (draws, len(difference))).mean(1)
    low, high = np.quantile(draw, [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


def passes_at_quality(table: pd.DataFrame, metric: str = "accuracy", baseline: str = "base") -> pd.DataFrame:
    """For each budget of the baseline, the fewest passes with which another model is not worse.

    From the table of `frontier`. Not worse: the other's mean is at least the baseline's mean (at most,
    for kid and fd). `passes` and `ratio` are NaN where no budget gets there.
    """
    sign = -1 if metric in SET_METRICS else 1
    rows = []
    base = table[table.model == baseline]
    if base.empty:
        raise ValueError(f"baseline {baseline!r} is not in the table; models: {sorted(table.model.unique())}")
    for _, point in base.iterrows():
        for model, part in table[table.model != baseline].groupby("model", sort=False):
            enough = part[sign * part[metric] >= sign * point[metric]]
            passes = enough.forwards.min() if len(enough) else np.nan
            rows.append(
                {
                    "baseline_budget": point.budget,
                    "baseline_passes": point.forwards,
                    metric: point[metric],
                    "model": model,
                    "passes": passes,
                    "ratio": point.forwards / passes,
                }
            )
    return pd.DataFrame(rows)
