"""Models on one frontier, each sampled as well as it can be: a fair comparison of policies and rivals.

Every tuned policy gets the search that the base got: the best of several orders, schedules, temperatures and
guidance scales for each number of passes, on validation prompts. A policy with a pace head also stands there
at its own pace; one whose head chooses temperature and guidance as well (schedule `adaptive`) only so.
A policy may be several files, one a training seed: its settings are searched on the first, all are measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from speedrl_lab import cache
from speedrl_lab.config import SamplerConfig
from speedrl_lab.evaluate import CODE, draw_pictures, score_samples
from speedrl_lab.generator import MaskedGenerator, can_revise
from speedrl_lab.generators import load_generator
from speedrl_lab.rewards.embedded import load_detector
from speedrl_lab.runs import outputs_root
from speedrl_lab.sampler import sample
from speedrl_lab.search import MANY, Scores, best_samplers, load_base_samplers_by_passes, prompt_scores, with_passes

BASE, USUAL = "base", "base, usual"
OWN_PACE = "{}, own pace"
POLICY = "policy.safetensors"  # in a run folder
KINDS = (
    SamplerConfig(order="confidence"),
    SamplerConfig(order="confidence", choice_temperature=4.0),
    SamplerConfig(schedule="power"),
    SamplerConfig(schedule="power", power=2.0),
)
TEMPERATURES = (1.0, 0.8, 0.6, 1.2)
HOT_STARTS = tuple(
    {"first_temperature": first, "temperature": temperature} for first in (2.0, 3.0) for temperature in (0.8, 0.6)
)
"""Settings under which samples of a prompt part in their first step and keep to the likely afterwards."""
UNGUIDED = (
    *(replace(kind, temperature=temperature) for kind in KINDS for temperature in TEMPERATURES),
    *(replace(kind, **hot) for kind in KINDS[2:] for hot in HOT_STARTS),
)
"""What everyone may be sampled with, the base as well."""
NOISY, BARELY_NOISY = (
    tuple({"start_noise": noise, "temperature": temperature} for noise in shares for temperature in TEMPERATURES[:3])
    for shares in ((0.4, 0.05, 0.03), (0.1, 0.05, 0.03, 0.015))
)
"""Di[M]O's start (arXiv 2503.15457), for policies that have learned it; they do better with less than in training. And
for policies that revise: one to six random codes part the samples of a prompt, and what they spoil is mended."""
REVISING = tuple(
    replace(kind, revise=True, **start)
    for kind in (
        SamplerConfig(),
        SamplerConfig(schedule="power", power=1.5),
        SamplerConfig(schedule="power", power=2.0),
    )
    for start in (*({"temperature": temperature} for temperature in TEMPERATURES[:3]), *HOT_STARTS, *BARELY_NOISY)
)
"""What a policy may be sampled with that has learned to draw anew what is drawn: it always does."""
CANDIDATES = (
    *UNGUIDED,
    *(replace(kind, **noisy) for kind in KINDS[2:] for noisy in NOISY),
    *(replace(kind, guidance_scale=2.0) for kind in (KINDS[0], KINDS[2])),
)
"""What any other tuned policy may be sampled with."""
ONE_STEP = tuple(SamplerConfig(temperature=temperature) for temperature in (*TEMPERATURES, 1.1))
"""A single pass from masks alone, where order and schedule change nothing."""
FOLDER, COLUMNS = "search", ["quality", "diversity"]
SEARCHING = [*CODE, *cache.sources("search")]
"""The code that decides what a search sees, for the key under which it is kept."""


@dataclass(frozen=True)
class Contender:
    """A model with the settings that it is sampled with at each budget; one generator a training seed."""

    name: str
    trainings: list[MaskedGenerator]
    samplers: dict[int, SamplerConfig]


def read_policies(entries: Sequence[str]) -> dict[str, list[Path]]:
    """Weights files by name, one a training seed, of `name=place` or `name=place,place`, or of run folders.

    A place is a file or a run folder, absolute or below `outputs_root()`; a run folder alone takes its own name.
    Raises ValueError for a name that is there twice or is the base's, FileNotFoundError for a missing file.
    """
    found: dict[str, list[Path]] = {}
    for entry in entries:
        if (outputs_root() / entry).exists():
            name, places = Path(entry).name, [entry]
        else:
            name, equals, given = entry.partition("=")
            if not (equals and name.strip() and given):
                raise ValueError(f"policy {entry!r}: no such run folder; expected name=file or name=file,file")
            places = [given] if (outputs_root() / given).exists() else given.split(",")
        name = name.strip()
        if name in (BASE, USUAL, *found):
            raise ValueError(f"policy {entry!r}: the name {name!r} is taken; give it another: name=file")
        paths = [outputs_root() / place.strip() for place in places]
        found[name] = [path / POLICY if path.is_dir() else path for path in paths]
        if missing := [path for path in found[name] if not path.is_file()]:
            raise FileNotFoundError(f"policy {name!r}: no file {missing[0]}")
    return found


def base_contenders(base: MaskedGenerator, budgets: Sequence[int], usual: bool = True) -> list[Contender]:
    """The base at its best for each number of passes that it was searched at, up to twice the largest budget.

    It is what others are measured by, so that its curve is the finer one. And, with `usual`, as such models are
    usually sampled: confidence order, guidance 3, as many steps as the largest budget. Raises ValueError for a budget,
    or twice the largest, that was never searched.
    """
    known = load_base_samplers_by_passes()
    wanted = {*budgets, 2 * max(budgets)}
    if missing := sorted(wanted - known.keys()):
        raise ValueError(f"the base was not searched at {missing} passes; known: {sorted(known)}")
    most = max(budgets)
    finer = sorted(passes for passes in known if min(budgets) <= passes <= 2 * most)
    found = [Contender(BASE, [base], {budget: known[budget] for budget in finer})]
    if usual:
        found.append(Contender(USUAL, [base], {most: usual_sampler(most)}))
    return found


def usual_sampler(steps: int) -> SamplerConfig:
    """How masked generators are usually sampled: confidence order, guidance 3."""
    return SamplerConfig(steps=steps, order="confidence", guidance_scale=3.0)


def usual_diversity(base: MaskedGenerator, prompts: Sequence[str], steps: int) -> float:
    """Mean diversity of the usual base on `prompts`; kept like a search."""
    return float(kept_scores(base)(list(dict.fromkeys(prompts)), usual_sampler(steps), MANY)[:, 1].mean())


def tuned_contenders(
    name: str,
    trainings: Sequence[MaskedGenerator],
    prompts: Sequence[str],
    budgets: Sequence[int],
    own_steps: Sequence[int] = (8,),
    least_diversity: float = 0.0,
) -> list[Contender]:
    """A tuned policy with searched samplers by passes, at its own pace of at most `own_steps` steps, or both.

    The second is named `<name>, own pace` and its budgets are the most steps; an adaptive policy, which is
    never sampled otherwise, keeps its name. Raises ValueError for trainings that have not the same head.
    """
    kinds = {head_kind(generator) for generator in trainings}
    if len(kinds) != 1:
        raise ValueError(f"policy {name!r}: its trainings have different pace heads: {', '.join(sorted(kinds))}")
    (kind,) = kinds
    if kind == "adaptive" and not own_steps:
        raise ValueError(f"policy {name!r} is sampled at its own pace only; expected at least one own_steps")
    revises = can_revise(trainings[0])
    fixed = {} if kind == "adaptive" else {passes: fixed_pool(passes, revises) for passes in budgets}
    own = {} if kind == "none" else {steps: own_pool(kind, steps, revises) for steps in own_steps}
    pools = {("passes", passes): pool for passes, pool in fixed.items()}
    pools |= {("steps", steps): pool for steps, pool in own.items()}
    best = searched(trainings[0], prompts, pools, least_diversity)
    found = []
    if fixed:
        found.append(Contender(name, list(trainings), {passes: best["passes", passes] for passes in fixed}))
    if own:
        own_name = name if kind == "adaptive" else OWN_PACE.format(name)
        found.append(Contender(own_name, list(trainings), {steps: best["steps", steps] for steps in own}))
    return found


def field_of(
    base: MaskedGenerator,
    policies: Mapping[str, Sequence[Path]],
    prompts: Sequence[str],
    budgets: Sequence[int],
    own_steps: Sequence[int] = (8,),
    usual: bool = True,
    diversity_share: float = 0.9,
) -> dict[str, Contender]:
    """All contenders by name: base, and every policy searched on `prompts`; on the base's device.

    Settings with less than `diversity_share` of the usual base's diversity are marked down (`search.worth`); with 0
    the search looks at quality alone.
    """
    found = base_contenders(base, budgets, usual)
    floor = diversity_share * usual_diversity(base, prompts, max(budgets)) if policies and diversity_share else 0.0
    for name, files in policies.items():
        trainings = [load_generator("emoji", str(base.device), file) for file in files]
        found += tuned_contenders(name, trainings, prompts, budgets, own_steps, floor)
    field = {contender.name: contender for contender in found}
    if len(field) < len(found):
        raise ValueError(f"two policies would share a name; names: {[contender.name for contender in found]}")
    return field


def head_kind(generator: MaskedGenerator) -> str:
    """`none`, `paced` or `adaptive`."""
    if generator.pace is None:
        return "none"
    return "adaptive" if generator.pace.adaptive else "paced"


def fixed_pool(passes: int, revises: bool = False) -> list[SamplerConfig]:
    """Settings that cost so many passes, for a policy that `revises` or for one that cannot."""
    if passes == 1:
        noisy = [SamplerConfig(**start) for start in (BARELY_NOISY if revises else NOISY)]
        return with_passes([*ONE_STEP, *noisy], passes)
    return with_passes(REVISING if revises else CANDIDATES, passes)


def own_pool(kind: str, steps: int, revises: bool = False) -> list[SamplerConfig]:
    """Settings with which a `paced` or `adaptive` head chooses, in at most so many steps."""
    ours = SamplerConfig(steps=steps, schedule=kind, revise=revises)
    each = [replace(ours, greedy_pace=greedy) for greedy in (True, False)]
    if kind == "adaptive":
        return each  # chooses temperatures itself
    starts = (*HOT_STARTS, *(BARELY_NOISY if revises else NOISY))
    plain = [replace(sampler, temperature=temperature) for sampler in each for temperature in TEMPERATURES]
    return plain + [replace(sampler, **start) for sampler in each for start in starts]


def kept_scores(generator: MaskedGenerator) -> Scores:
    """`prompt_scores` of a generator, kept in outputs/cache/search under the hash of all that they depend on."""
    detector = load_detector(generator.device)
    shared = cache.fingerprint(
        generator, detector, SEARCHING, torch.__version__, torch.get_float32_matmul_precision(), generator.device.type
    )

    def scores(prompts: Sequence[str], sampler: SamplerConfig, samples: int) -> Tensor:
        key = cache.fingerprint(shared, list(prompts), sampler, samples)
        if (table := cache.load(FOLDER, key, COLUMNS, len(prompts))) is None:
            found = prompt_scores(generator, prompts, sampler, samples, detector)
            table = pd.DataFrame(found.double().numpy(), columns=COLUMNS)
            cache.store(FOLDER, key, table)
        return torch.tensor(table.to_numpy())

    return scores


def searched(
    generator: MaskedGenerator,
    prompts: Sequence[str],
    pools: Mapping[tuple[str, int], Sequence[SamplerConfig]],
    least_diversity: float = 0.0,
) -> dict[tuple[str, int], SamplerConfig]:
    """`best_samplers`; another pool, or another diversity, looks only at what was never seen."""
    return best_samplers(generator, prompts, pools, least_diversity, kept_scores(generator))


def settings(field: Mapping[str, Contender]) -> pd.DataFrame:
    """How every contender is sampled: one row a model and budget, with the number of its trainings.

    The other columns are the fields of SamplerConfig.
    """
    rows = [
        {"model": name, "budget": budget, "trainings": len(one.trainings), **asdict(sampler)}
        for name, one in field.items()
        for budget, sampler in one.samplers.items()
    ]
    return pd.DataFrame(rows)


def score(field: Mapping[str, Contender], prompts: Sequence[str], seeds: int) -> pd.DataFrame:
    """`score_samples` of every contender at its own budgets: one row an image, from the cache where known."""
    parts = []
    for name, contender in field.items():
        given, samplers = {name: contender.trainings}, {name: contender.samplers}
        parts.append(score_samples(given, prompts, list(contender.samplers), seeds, samplers))
    return pd.concat(parts, ignore_index=True)


def timed(field: Mapping[str, Contender], prompts: Sequence[str], repeats: int = 3) -> pd.DataFrame:
    """Seconds an image of each contender and budget, measured now: medians of `repeats` turns.

    Columns model, budget, seconds_loop, seconds_total, and the share by which the slowest turn exceeds the
    fastest (spread). One batch of all prompts, one sample each, of the first training; a turn goes through
    all contenders and budgets, so that another load on the machine falls on all alike. A warm-up comes before.
    """
    points = [(name, budget) for name, contender in field.items() for budget in contender.samplers]
    points.sort(key=lambda point: point[1])
    for contender in field.values():
        sample(contender.trainings[0], list(prompts[:2]), next(iter(contender.samplers.values())))
    found: dict[tuple[str, int], list[tuple[float, float]]] = {point: [] for point in points}
    for turn in tqdm(range(repeats), desc="seconds", unit="turn"):
        for name, budget in points if turn % 2 == 0 else points[::-1]:
            sampler = field[name].samplers[budget]
            _, costs = draw_pictures(field[name].trainings[0], prompts, sampler, seed=0)
            found[name, budget].append((costs["seconds_loop"], costs["seconds_total"]))
    rows = []
    for (name, budget), seconds in found.items():
        loop, total = np.median(seconds, 0)
        totals = [pair[1] for pair in seconds]
        row = {"model": name, "budget": budget, "seconds_loop": loop, "seconds_total": total}
        rows.append(row | {"spread": max(totals) / min(totals) - 1})
    return pd.DataFrame(rows)


def with_seconds(samples: pd.DataFrame, times: pd.DataFrame) -> pd.DataFrame:
    """The frame of `score` with the seconds of `timed`: cached rows hold those of another day.

    Raises ValueError for a model and budget without a time.
    """
    columns = ["seconds_loop", "seconds_total"]
    merged = samples.drop(columns=columns).merge(
        times[["model", "budget", *columns]], "left", ["model", "budget"], validate="many_to_one"
    )
    if merged.seconds_total.isna().any():
        row = merged[merged.seconds_total.isna()].iloc[0]
        raise ValueError(f"no time of {row.model!r} at budget {row.budget}")
    return merged[list(samples.columns)]
