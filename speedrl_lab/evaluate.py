"""Models x budgets x seeds, judged by what no training saw: one row an image, then a table with intervals.

The judges are those of EmojiScenes:

| column | sees | does not see |
|---|---|---|
| `accuracy` | first detector: the counts of all 24 objects are exactly right | places, styles, smears |
| `relation` | first detector: left and above in order, both objects once; else as `accuracy` | strays beside the two |
| `color` | first detector: the background that the caption names; 1 where it names none | objects |
| `accuracy2`, `relation2`, `color2` | the same by a second detector: other data order, width, augmentation | the same |
| `clip` | cosine of picture and caption in the small CLIP, which is a reward too | fine detail |
| `psnr` | dB to the nearest valid scene of the caption: everything that is not crisp and legal | variety |
| `diversity` | distance of a prompt's two samples in features of the first detector | whether they are right |
| `style_entropy`, `size_entropy`, `position_entropy`, `background_entropy` | whether a prompt's two samples \
differ in what the caption leaves open (nats, nearest valid scenes; real scenes: `judge_real`); NaN where it does not \
| whether they are right |
| `kid`, `fd` | set: distance to real scenes of the captions in the first detector's last features | drawing styles |
| `kid2`, `fd2` | set: the same by the second detector, with which no model or sampler is chosen | the same |
| `kid_surface`, `fd_surface` | set: in the second detector's first features: texture | captions, objects |

How often each errs: `judge_check`. Samplers are searched with the first detector and PSNR, so that the columns of
the second are the ones to believe where the two disagree.

Costs are reported as steps, forward passes and seconds, of the sampling loop alone and with the decoder;
models take turns within a seed and budget, after a warm-up.
"""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from speedrl_lab import cache as kept
from speedrl_lab import compositor, judges, noise, scenes
from speedrl_lab.config import SamplerConfig
from speedrl_lab.distances import DetectorFeatures, SurfaceFeatures, frechet_distance, kid, read
from speedrl_lab.generator import MaskedGenerator, can_revise
from speedrl_lab.intervals import COSTS, METRICS, SET_METRICS
from speedrl_lab.intervals import frontier as frontier
from speedrl_lab.intervals import paired_difference as paired_difference
from speedrl_lab.intervals import passes_at_quality as passes_at_quality
from speedrl_lab.networks import Detector, SmallClip
from speedrl_lab.rewards.embedded import load_clip, load_detector
from speedrl_lab.sampler import sample

SAMPLES_PER_PROMPT = 2
"""Two samples of each prompt and seed: the fewest that show diversity."""
REAL_PER_PROMPT = 8
"""Real scenes of each prompt that judges of sets compare with."""
FOLDER = "evaluation"
BATCH_SIZE = 128
Samplers = Mapping[str, SamplerConfig | Mapping[int, SamplerConfig]]
Models = Mapping[str, MaskedGenerator | Sequence[MaskedGenerator]]
SCORES = ("prompt", "kind", "sample", *COSTS, *METRICS, *SET_METRICS)
"""What one set of samples is measured by: the columns that are cached."""
DECIDING = (
    "compilation", "compositor", "distances", "draws", "evaluate", "judges", "networks", "noise", "pace", "sampler",
    "scenes", "schedules",
)  # fmt: skip
CODE = kept.sources(*DECIDING)
"""What samples and judges, read when it is imported: an edited judge or sampler finds none of the old results."""


@dataclass(frozen=True)
class Jury:
    """The networks that judge; all were trained on real scenes alone."""

    detector: Detector
    second: Detector
    clip: SmallClip


@dataclass(frozen=True)
class References:
    """Real scenes to compare sets with: the prompt of each, and features (B, F) by the end of a judge's name."""

    prompts: list[str]
    features: dict[str, torch.Tensor]


def load_jury(device: torch.device | str = "cpu") -> Jury:
    """The committed judges."""
    return Jury(load_detector(device), judges.load_second_detector(device), load_clip(device))


def score_samples(
    generators: Models,
    prompts: Sequence[str],
    budgets: Sequence[int] = (1, 2, 4, 8),
    seeds: int = 3,
    samplers: Samplers | None = None,
    cache: bool = True,
) -> pd.DataFrame:
    """Sample every model at every budget and judge each picture: a frame with one row an image.

    A model is one generator, or a list of the same model trained with several seeds; `training_seed`
    numbers them. `samplers` gives a model's settings, one for all budgets (its `steps` becomes the budget)
    or one a budget, taken as it is, so that a budget may also count passes; models without an entry take
    Halton order, cosine schedule, no guidance, and revise where they have learned to. `sample` numbers the
    samples of a prompt. Judges of sets compare the set of a seed with real scenes of the same prompts.

    With `cache`, the scores of each model, budget and seed are kept in outputs/cache/evaluation under the
    hash of all that they depend on (see `set_key`), and are read instead of measured where they are known:
    rows with `cached`. Their seconds were measured in another run, perhaps beside another load; compare
    seconds with `cache=False`, which reads and writes nothing and lets models take turns in one process.
    """
    if not generators or not len(budgets) or seeds < 1:
        raise ValueError("nothing to evaluate: expected at least one generator, one budget and one seed")
    scenes.encode_captions(prompts)  # an unreadable prompt fails before the first sample
    trained = {
        (name, index): generator
        for name, given in generators.items()
        for index, generator in enumerate(given if isinstance(given, Sequence) else [given])
    }
    if missing := generators.keys() - {name for name, _ in trained}:
        raise ValueError(f"no generator given for {sorted(missing)[0]!r}; expected one, or one a training seed")
    settings = {
        (name, budget): _sampler(samplers or {}, name, trained[name, 0], budget)
        for name in generators
        for budget in budgets
    }
    jury = load_jury(next(iter(trained.values())).device)
    repeated = [prompt for prompt in prompts for _ in range(SAMPLES_PER_PROMPT)]
    hashes = {model: _fingerprint(generator) if cache else None for model, generator in trained.items()}
    shared = _fingerprint(jury) if cache else None
    frames, warm = [], set()
    with tqdm(total=len(trained) * len(budgets) * seeds, desc="evaluate", unit="set") as progress:
        for seed in range(seeds):
            for budget in budgets:
                for (name, index), generator in trained.items():
                    sampler, own = settings[name, budget], hashes[name, index]
                    key = None if own is None else set_key(own, shared, sampler, repeated, seed, generator.device)
                    scores = None if key is None else kept.load(FOLDER, key, SCORES, len(repeated))
                    known = scores is not None
                    if not known:
                        if (name, index) not in warm:
                            sample(generator, list(prompts[:2]), sampler)  # warm-up
                            warm.add((name, index))
                        scores = score_set(generator, repeated, sampler, seed, jury)
                        if key is not None:
                            kept.store(FOLDER, key, scores)
                    labels = {"model": name, "budget": budget, "seed": seed, "training_seed": index, "cached": known}
                    frames.append(scores.assign(**labels)[[*labels, *SCORES]])
                    progress.update()
    return pd.concat(frames, ignore_index=True)


def set_key(
    generator: str, jury: str, sampler: SamplerConfig, prompts: Sequence[str], seed: int, device: torch.device
) -> str:
    """The name of a cached set: the hash of everything that its scores depend on.

    Fingerprints of the generator (all weights of policy, pace head and tokenizer, and the code of its class)
    and of the judges' weights; sampler settings, every prompt, the seed; the sprites, the code that samples
    and judges (CODE), torch's version, its float32 precision, and the kind of device.
    """
    surroundings = [torch.__version__, torch.get_float32_matmul_precision(), device.type]
    pictures = compositor.sprites(compositor.LARGE)
    return kept.fingerprint(generator, jury, sampler, list(prompts), seed, CODE, pictures, surroundings)


def _fingerprint(value: MaskedGenerator | Jury) -> str | None:
    """The fingerprint of networks; None, with a warning, for a generator that cannot have one."""
    try:
        return kept.fingerprint(value)
    except TypeError as error:
        warnings.warn(f"{type(value).__name__}: {error}; its scores are not cached", stacklevel=3)
        return None


def score_set(
    generator: MaskedGenerator, prompts: Sequence[str], sampler: SamplerConfig, seed: int, jury: Jury
) -> pd.DataFrame:
    """Costs and judges of one set of samples, one row an image: the columns SCORES."""
    images, costs = draw_pictures(generator, prompts, sampler, seed)
    scores = judge(images, prompts, references(tuple(prompts), seed, jury), jury)
    table = pd.DataFrame({**costs, **scores})
    return pd.DataFrame({name: table[name].tolist() for name in SCORES})  # plain values, as a cached one holds


def _sampler(samplers: Samplers, name: str, generator: MaskedGenerator, budget: int) -> SamplerConfig:
    chosen = samplers.get(name, SamplerConfig(revise=can_revise(generator)))
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
    images: torch.Tensor, prompts: Sequence[str], real: References, jury: Jury
) -> dict[str, np.ndarray | float | list]:
    """All judges on images (B, 3, 32, 32) in [0, 1], SAMPLES_PER_PROMPT of each prompt in a row."""
    device = next(jury.detector.parameters()).device
    moved, group = images.to(device), SAMPLES_PER_PROMPT
    words = scenes.encode_captions(prompts).to(device)
    nearest = judges.nearest_scene(images, prompts)
    by_prompt = {"diversity": judges.diversity(jury.detector.features(moved), group)}
    by_prompt |= {f"{name}_entropy": v for name, v in judges.layout_entropies(nearest, prompts, group).items()}
    scores: dict[str, np.ndarray | float | list] = {
        "prompt": list(prompts),
        "kind": [scenes.parse_caption(prompt).kind for prompt in prompts],
        "sample": noise.occurrences(prompts),
        "clip": (jury.clip.encode_image(moved) * jury.clip.encode_text(words)).sum(1).cpu().numpy(),
        "psnr": nearest.psnr.numpy(),
        **{name: values.repeat_interleave(group).cpu().numpy() for name, values in by_prompt.items()},
    }
    for detector, end in ((jury.detector, ""), (jury.second, "2")):
        verdict = judges.verdict(detector, moved, prompts)
        for name, answer in (("accuracy", "counts"), ("color", "color"), ("relation", "relation")):
            scores[name + end] = verdict[answer].float().numpy()
    for end, features in _features(jury).items():
        seen = read(features, moved)
        scores["kid" + end] = kid(real.features[end], seen, real.prompts, prompts)
        scores["fd" + end] = frechet_distance(real.features[end], seen)
    return scores


def _features(jury: Jury) -> dict[str, DetectorFeatures | SurfaceFeatures]:
    """What judges of sets look at, by the end of their names."""
    first, second = jury.detector, jury.second
    return {"": DetectorFeatures(first), "2": DetectorFeatures(second), "_surface": SurfaceFeatures(second)}


@lru_cache(maxsize=8)
def references(prompts: tuple[str, ...], seed: int, jury: Jury) -> References:
    """REAL_PER_PROMPT real scenes of each different prompt, as the judges of sets see them."""
    repeated = [prompt for prompt in dict.fromkeys(prompts) for _ in range(REAL_PER_PROMPT)]
    images = scenes.real_pictures(repeated, torch.Generator().manual_seed(seed))
    images = images.to(next(jury.detector.parameters()).device)
    return References(repeated, {end: read(features, images) for end, features in _features(jury).items()})


def judge_real(prompts: Sequence[str], seed: int = 0, reconstruct: MaskedGenerator | None = None) -> pd.Series:
    """What the judges say of real scenes, or of their reconstructions: the best anyone can reach."""
    repeated = [prompt for prompt in prompts for _ in range(SAMPLES_PER_PROMPT)]
    images = scenes.real_pictures(repeated, torch.Generator().manual_seed(1000 + seed))
    if reconstruct is not None:
        images = reconstruct.decode(reconstruct.tokenize(images)).cpu()
    jury = load_jury()
    scores = judge(images, repeated, references(tuple(repeated), seed, jury), jury)
    return pd.DataFrame(scores)[[*METRICS, *SET_METRICS]].mean()


def summarize(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a model, budget and seed (and training seed, where there are several): means of costs and judges."""
    columns = [*COSTS, *METRICS, *SET_METRICS]
    return frame.groupby(["model", "budget", "training_seed", "seed"], sort=False)[columns].mean().reset_index()


def evaluate(
    generators: Models,
    prompts: Sequence[str],
    budgets: Sequence[int] = (1, 2, 4, 8),
    seeds: int = 3,
    samplers: Samplers | None = None,
    cache: bool = True,
) -> pd.DataFrame:
    """`score_samples`, summarized: one row a model, budget and seed."""
    return summarize(score_samples(generators, prompts, budgets, seeds, samplers, cache))
