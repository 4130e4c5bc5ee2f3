"""How the judges err: each one on real scenes and on scenes that were broken on purpose.

All pictures are rebuilt by the tokenizer first, the best that a generator can paint. A judge that answers
yes or no (the detectors) raises an alarm where it says no. One that gives a number raises an alarm beyond a
limit that 95% of other intact scenes keep. So a judge has false alarms on intact scenes and true ones on
broken scenes. A number may also be compared with that of an intact picture of the same caption, as rewards
are in a group: there half the intact pictures lose.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from speedrl_lab import compositor, scenes
from speedrl_lab.compositor import IMAGE_SIZE, STYLES, Layout
from speedrl_lab.evaluate import SAMPLES_PER_PROMPT, Jury, judge, references
from speedrl_lab.generator import MaskedGenerator
from speedrl_lab.intervals import SET_METRICS
from speedrl_lab.scenes import COLORS, OBJECTS, Scene

ANSWERS = ("accuracy", "relation", "color", "accuracy2", "relation2", "color2")
LESS_IS_WORSE = ("clip", "psnr")
MORE_IS_WORSE = SET_METRICS
OF_SETS = (*SET_METRICS, "diversity", "style_entropy", "size_entropy", "position_entropy")
QUANTILE, DEVIATIONS = 0.05, 1.645  # false alarms allowed: a share of images, the same of normal means of sets
STRAY = 0.1  # share of the tokens that "stray tokens" draws anew

CONTENT = ("wrong count", "wrong object", "swapped relation", "wrong background")
SURFACE = ("mixed styles", "stray tokens", "noise", "smear")
SAMENESS = ("one style", "one picture")
CLAIMS = {
    "accuracy": ("wrong count", "wrong object"),
    "relation": ("wrong count", "wrong object", "swapped relation"),
    "color": ("wrong background",),
    "clip": CONTENT,
    "psnr": (*CONTENT, *SURFACE),
    "kid": ("wrong count", "smear"),
    "fd": (*CONTENT, "smear", "one picture"),
    "kid_surface": SURFACE,
    "fd_surface": SURFACE,
    "diversity": ("one picture",),
    "style_entropy": SAMENESS,
    "size_entropy": ("one picture",),
    "position_entropy": ("one picture",),
}
"""What each judge is there to notice (a second detector: as the first); of all else its rate is no fault."""


@dataclass
class Sample:
    """Pictures (B, 3, 32, 32) and the scenes that they are shown for; rows of a caption side by side."""

    scenes: list[Scene]
    layout: Layout
    images: Tensor


def draw_sample(captions: int, seed: int) -> Sample:
    """Real scenes of held-out captions, SAMPLES_PER_PROMPT pictures of each."""
    rng = torch.Generator().manual_seed(seed)
    drawn = [s for s in scenes.draw_scenes(captions, "test", rng) for _ in range(SAMPLES_PER_PROMPT)]
    layout = scenes.draw_layouts(drawn, rng)
    return Sample(drawn, layout, compositor.paint(layout))


def _repainted(sample: Sample, wrong: Sequence[Scene], rng: torch.Generator) -> Tensor:
    return compositor.paint(scenes.draw_layouts(wrong, rng))


def wrong_count(sample: Sample, rng: torch.Generator) -> Tensor:
    """Two for one, one for two, one of a pair missing."""
    wrong = [Scene("two" if s.kind == "one" else "one", s.objects[:1], s.background) for s in sample.scenes]
    return _repainted(sample, wrong, rng)


def wrong_object(sample: Sample, rng: torch.Generator) -> Tensor:
    """The first object is another one."""
    draws = torch.randint(1 << 30, (len(sample.scenes),), generator=rng).tolist()
    others = [[name for name in OBJECTS if name not in scene.objects] for scene in sample.scenes]
    wrong = [
        replace(scene, objects=(rest[draw % len(rest)], *scene.objects[1:]))
        for scene, rest, draw in zip(sample.scenes, others, draws, strict=True)
    ]
    return _repainted(sample, wrong, rng)


def swapped_relation(sample: Sample, rng: torch.Generator) -> Tensor:
    """The two objects in each other's place; nothing changes but in left and above."""
    return _repainted(sample, [replace(scene, objects=scene.objects[::-1]) for scene in sample.scenes], rng)


def wrong_background(sample: Sample, rng: torch.Generator) -> Tensor:
    """The same picture on another background."""
    shift = torch.randint(1, len(COLORS), (len(sample.scenes),), generator=rng)
    return compositor.paint(replace(sample.layout, backgrounds=(sample.layout.backgrounds + shift) % len(COLORS)))


def mixed_styles(sample: Sample, rng: torch.Generator) -> Tensor:
    """Each sprite half in one drawing style, half in another: right in all else."""
    shift = torch.randint(1, len(STYLES), sample.layout.styles.shape, generator=rng)
    other = compositor.paint(replace(sample.layout, styles=(sample.layout.styles + shift) % len(STYLES)))
    layout, columns = sample.layout, torch.arange(IMAGE_SIZE)
    second = torch.zeros(len(layout), IMAGE_SIZE, IMAGE_SIZE, dtype=torch.bool)
    for slot in range(2):
        size, top, left = layout.sizes, layout.tops[:, slot], layout.lefts[:, slot]
        present = layout.objects[:, slot] >= 0
        rows = (columns >= top[:, None]) & (columns < (top + size)[:, None])  # (B, H)
        right = (columns >= (left + size // 2)[:, None]) & (columns < (left + size)[:, None])  # (B, W)
        second |= present[:, None, None] & rows[:, :, None] & right[:, None]
    return torch.where(second[:, None], other, sample.images)


def one_style(sample: Sample, rng: torch.Generator) -> Tensor:
    """Every sprite in the same drawing style."""
    return compositor.paint(replace(sample.layout, styles=torch.zeros_like(sample.layout.styles)))


def one_picture(sample: Sample, rng: torch.Generator) -> Tensor:
    """Both samples of a caption are the same picture."""
    return sample.images[::SAMPLES_PER_PROMPT].repeat_interleave(SAMPLES_PER_PROMPT, 0)


def stray_tokens(tokens: Tensor, codes: int, rng: torch.Generator) -> Tensor:
    """A tenth of the tokens (B, N) drawn anew from all codes: the confetti of a bad sampler."""
    stray = torch.rand(tokens.shape, generator=rng) < STRAY
    return torch.where(
        stray.to(tokens.device), torch.randint(codes, tokens.shape, generator=rng).to(tokens.device), tokens
    )


def noise(images: Tensor, rng: torch.Generator) -> Tensor:
    """Gaussian noise with standard deviation 0.15 on every pixel."""
    return (images + 0.15 * torch.randn(images.shape, generator=rng)).clamp(0, 1)


def smear(images: Tensor, rng: torch.Generator) -> Tensor:
    """The mean of 5x5 pixels."""
    return functional.avg_pool2d(functional.pad(images, (2, 2, 2, 2), mode="replicate"), 5, stride=1)


PAINTED: dict[str, Callable[[Sample, torch.Generator], Tensor]] = {
    "wrong count": wrong_count,
    "wrong object": wrong_object,
    "swapped relation": swapped_relation,
    "wrong background": wrong_background,
    "mixed styles": mixed_styles,
    "one style": one_style,
    "one picture": one_picture,
}
"""Breakages of what is painted, before the tokenizer; `noise` and `smear` come after it."""
BREAKAGES = (*CONTENT, *SURFACE, *SAMENESS)


def shown(sample: Sample, breakage: str, generator: MaskedGenerator, rng: torch.Generator) -> Tensor:
    """The pictures of a sample, broken and rebuilt, (B, 3, 32, 32) in [0, 1]; "none" breaks nothing."""
    images = PAINTED[breakage](sample, rng) if breakage in PAINTED else sample.images
    tokens = generator.tokenize(images)
    if breakage == "stray tokens":
        tokens = stray_tokens(tokens, generator.spec.codebook_size, rng)
    rebuilt = generator.decode(tokens).cpu()
    after = {"noise": noise, "smear": smear}.get(breakage)
    return rebuilt if after is None else after(rebuilt, rng)


def _broken_rows(sample: Sample, breakage: str) -> Tensor:
    """Which pictures a breakage breaks, bool (B,)."""
    if breakage == "swapped relation":
        return torch.tensor([scene.kind in ("left", "above") for scene in sample.scenes])
    if breakage == "wrong background":
        return torch.tensor([scene.background is not None for scene in sample.scenes])
    return torch.ones(len(sample.scenes), dtype=torch.bool)


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95% score interval of a rate (Wilson 1927), which is honest near 0 and 1."""
    z = 1.959964
    center = (hits + z**2 / 2) / (count + z**2)
    half = z / (count + z**2) * math.sqrt(hits * (count - hits) / count + z**2 / 4)
    return max(0.0, center - half), min(1.0, center + half)


def _scores(sample: Sample, images: Tensor, jury: Jury, seed: int) -> pd.DataFrame:
    """All judges on the images; sets are compared with other real scenes of the same captions."""
    captions = [scene.caption for scene in sample.scenes]
    return pd.DataFrame(judge(images, captions, references(tuple(captions), seed, jury), jury))


def check_judges(generator: MaskedGenerator, jury: Jury, sets: int = 8, captions: int = 48) -> pd.DataFrame:
    """Rates at which each judge raises an alarm: one row a judge, unit and breakage, "none" for intact scenes.

    `sets` sets of `captions` captions, two pictures each; as many intact sets again fix the limits. Columns:
    judge, unit (image; pair: worse than an intact picture of the caption; set: judges that need many),
    breakage, claimed (whether the judge is there to notice it: then an alarm is right), rate, low, high (95%),
    count.
    """
    if sets < 2 or captions < 4:
        raise ValueError(f"sets={sets}, captions={captions}: expected at least 2 sets of 4 captions")
    intact: list[pd.DataFrame] = []
    for seed in range(10_000, 10_000 + sets):  # other scenes than below
        sample, rng = draw_sample(captions, seed), torch.Generator().manual_seed(seed)
        intact.append(_scores(sample, shown(sample, "none", generator, rng), jury, seed))
    limits = _limits(intact)
    alarms: dict[tuple[str, str, str], list[bool]] = {}
    for seed in range(sets):
        sample, rng = draw_sample(captions, seed), torch.Generator().manual_seed(seed)
        whole = _scores(sample, shown(sample, "none", generator, rng), jury, seed)
        for breakage in ("none", *BREAKAGES):
            broken = (
                whole if breakage == "none" else _scores(sample, shown(sample, breakage, generator, rng), jury, seed)
            )
            rows = _broken_rows(sample, breakage).numpy()
            for key, raised in _alarms(broken, whole, rows, breakage, limits).items():
                alarms.setdefault((*key, breakage), []).extend(raised)
    return pd.DataFrame([_row(*key, raised) for key, raised in alarms.items()])


def _alarms(
    broken: pd.DataFrame, whole: pd.DataFrame, rows: np.ndarray, breakage: str, limits: Mapping[str, float]
) -> dict[tuple[str, str], list[bool]]:
    """For each judge and unit, which of the broken rows (or the set) it raises an alarm for."""
    found = {(name, "image"): (broken[name][rows] < limits[name]).tolist() for name in (*ANSWERS, *LESS_IS_WORSE)}
    for name in LESS_IS_WORSE if breakage not in SAMENESS else ():
        if breakage == "none":  # the samples of a caption against each other
            found[name, "pair"] = (whole[name].to_numpy()[::2] < whole[name].to_numpy()[1::2]).tolist()
        else:
            found[name, "pair"] = (broken[name] < whole[name])[rows].tolist()
    for name in OF_SETS:
        sign = -1 if name in MORE_IS_WORSE else 1
        found[name, "set"] = [bool(sign * broken[name].mean() < sign * limits[name])]
    return found


def _limits(intact: Sequence[pd.DataFrame]) -> dict[str, float]:
    """Below (above, for distances) which a judge raises an alarm; detectors: at a no."""
    images = pd.concat(intact)
    sets = pd.DataFrame([scores[list(OF_SETS)].mean() for scores in intact])
    limits = dict.fromkeys(ANSWERS, 0.5)
    limits |= {name: float(images[name].quantile(QUANTILE)) for name in LESS_IS_WORSE}
    for name in OF_SETS:
        sign = 1 if name in MORE_IS_WORSE else -1
        limits[name] = float(sets[name].mean() + sign * DEVIATIONS * sets[name].std())
    return limits


def _row(judge_name: str, unit: str, breakage: str, raised: Sequence[bool]) -> dict[str, object]:
    hits, count = int(sum(raised)), len(raised)
    low, high = wilson(hits, count) if count else (math.nan, math.nan)
    return {
        "judge": judge_name,
        "unit": unit,
        "breakage": breakage,
        "claimed": breakage in CLAIMS[judge_name.removesuffix("2")],
        "rate": hits / count if count else math.nan,
        "low": low,
        "high": high,
        "count": count,
    }


def as_markdown(table: pd.DataFrame) -> str:
    """The table for people: judges down, breakages across, rates with intervals; bold what a judge is there for."""
    columns = list(dict.fromkeys(table.breakage))
    lines = ["| judge | " + " | ".join("intact" if name == "none" else name for name in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for (judge_name, unit), rows in table.groupby(["judge", "unit"], sort=False):
        cells = []
        for name in columns:
            (text,) = [
                f"{row.rate:.2f} [{row.low:.2f}, {row.high:.2f}]" for row in rows[rows.breakage == name].itertuples()
            ] or [""]
            cells.append(f"**{text}**" if name in CLAIMS[judge_name.removesuffix("2")] and text else text)
        label = {"image": "", "pair": ", pairs", "set": ", sets"}[unit]
        lines.append(f"| `{judge_name}`{label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
