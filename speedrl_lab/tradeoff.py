"""What a speed weight buys: steps and quality of policies that were trained with different weights.

`trials` finds the policies of a sweep, `score_paces` samples each at its own pace, `summary` and
`steps_by_kind` put intervals on what came out. Intervals are percentiles of a bootstrap over prompts (samples
and training seeds of a prompt stay together); how much training seeds differ is reported beside them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from speedrl_lab import canvas, compositor, plots, scenes
from speedrl_lab.config import SamplerConfig
from speedrl_lab.evaluate import score_samples
from speedrl_lab.generators import load_generator
from speedrl_lab.runs import outputs_root

SAMPLES = compositor.DATA / "speed_weights.csv"
POLICY = "policy.safetensors"  # a run writes it when it is finished
FREE = ("path", "speed_weight", "seed", "device")  # what may differ between the trials of one sweep
OWN_PACE = 0  # stands for the budget that a policy with a pace does not have
METRICS = ("steps", "accuracy", "clip", "psnr", "diversity")
COLUMNS = ("speed_weight", "seed", "prompt", "kind", "sample", "forwards", *METRICS)
SCENES = {
    "one object": ("one",),
    "two of a kind": ("two",),
    "two objects": ("and",),
    "relation": ("left", "above"),
}
"""Kinds of scene, from easy to hard."""
EASY, HARD = "one object", "relation"


def trials(folder: str | Path) -> pd.DataFrame:
    """The finished runs below outputs/<folder>, or below an absolute folder: one row a run, by weight and seed.

    Columns: `path`, and every setting of the run's config.json. Raises FileNotFoundError where there is no
    run, ValueError for a weight and seed that are there twice, for a schedule whose steps a policy cannot
    choose, and for trials that differ in more than weight and seed.
    """
    root = outputs_root() / folder
    paths = sorted(file.parent for file in root.rglob(POLICY) if (file.parent / "config.json").is_file())
    if not paths:
        raise FileNotFoundError(f"no finished run (config.json and {POLICY}) below {root}")
    settings = [json.loads((path / "config.json").read_text()) for path in paths]
    frame = pd.DataFrame(settings).assign(path=paths)
    for name in frame.columns.difference(FREE):
        values = {json.dumps(run.get(name), sort_keys=True) for run in settings}
        if len(values) > 1:
            raise ValueError(f"trials below {root} differ in {name} ({', '.join(sorted(values))}), not only in weight")
    if (schedule := settings[0]["schedule"]) != "paced":
        raise ValueError(f"trials below {root} have schedule={schedule!r}; expected 'paced': a policy that chooses")
    if (twice := frame.duplicated(["speed_weight", "seed"])).any():
        raise ValueError(f"the weight and seed of {frame.path[twice].iloc[0]} are below {root} twice")
    return frame.sort_values(["speed_weight", "seed"], ignore_index=True)


def own_sampler(settings: Mapping[str, Any]) -> SamplerConfig:
    """The sampler of a run's settings, with the most probable pace instead of a drawn one."""
    known = {f.name: settings[f.name] for f in fields(SamplerConfig) if f.name in settings}
    return replace(SamplerConfig(**known), greedy_pace=True)


def balanced(prompts: Sequence[str], per_kind: int) -> list[str]:
    """The first `per_kind` prompts of each kind of scene: kinds equally often, as training draws them.

    Raises ValueError where there are fewer.
    """
    kinds = [scenes.parse_caption(prompt).kind for prompt in prompts]
    of_kind = {kind: [p for p, k in zip(prompts, kinds, strict=True) if k == kind] for kind in scenes.KINDS}
    fewest = min(map(len, of_kind.values()))
    if not 1 <= per_kind <= fewest:
        raise ValueError(f"per_kind={per_kind}: expected 1 to {fewest}, what every kind of scene has")
    return [prompt for group in of_kind.values() for prompt in group[:per_kind]]


def score_paces(runs: pd.DataFrame, prompts: Sequence[str], device: str = "auto") -> pd.DataFrame:
    """Sample the policies of `trials` at their own pace and judge each picture: one row an image.

    Two samples a prompt, the same random numbers for all policies. `seed` is the training seed.
    """
    settings = {str(run["path"]): run for run in runs.to_dict("records")}
    models = {name: load_generator("emoji", device, run["path"] / POLICY) for name, run in settings.items()}
    samplers = {name: {OWN_PACE: own_sampler(run)} for name, run in settings.items()}
    scored = score_samples(models, prompts, [OWN_PACE], seeds=1, samplers=samplers)
    for name in ("speed_weight", "seed"):
        scored[name] = [settings[model][name] for model in scored.model]
    return scored[list(COLUMNS)]


def load_samples(path: Path | str = SAMPLES) -> pd.DataFrame:
    """The committed frame of `score_paces`, or one that notebook 04_speed_weight wrote.

    Raises FileNotFoundError, or ValueError for a file without one of its columns.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}; notebook 04_speed_weight makes it from a sweep")
    frame = pd.read_csv(path)
    if missing := [name for name in COLUMNS if name not in frame]:
        raise ValueError(f"{path} has no column {missing[0]!r}; expected {', '.join(COLUMNS)}")
    return frame


def summary(samples: pd.DataFrame, draws: int = 1000) -> pd.DataFrame:
    """One row a speed weight, from the frame of `score_paces`.

    `<metric>`, `<metric>_low`, `<metric>_high`: mean and 95% interval of the METRICS. `steps_least` and
    `steps_most`: the extreme means of `seeds` training seeds.
    `easy`, `hard`, `gap`: mean steps of EASY and HARD scenes and hard - easy, all with intervals; the prompts
    differ, so that the two are resampled independently.
    """
    rng = np.random.default_rng(0)
    rows = []
    for weight, part in samples.groupby("speed_weight"):
        by_seed = part.groupby("seed").steps.mean()
        row = {"speed_weight": weight, "seeds": len(by_seed)}
        row |= {"steps_least": by_seed.min(), "steps_most": by_seed.max()}
        for metric in METRICS:
            row |= _named(metric, *_resampled(part, metric, draws, rng))
        easy, hard = (_resampled(_scenes(part, name), "steps", draws, rng) for name in (EASY, HARD))
        row |= _named("easy", *easy) | _named("hard", *hard)
        rows.append(row | _named("gap", hard[0] - easy[0], hard[1] - easy[1]))
    return pd.DataFrame(rows)


def steps_by_kind(samples: pd.DataFrame, draws: int = 1000) -> pd.DataFrame:
    """One row a speed weight and kind of SCENES: its number of prompts, mean steps and their 95% interval."""
    rng = np.random.default_rng(0)
    rows = []
    for weight, part in samples.groupby("speed_weight"):
        for name in SCENES:
            of_kind = _scenes(part, name)
            row = {"speed_weight": weight, "scene": name, "prompts": of_kind.prompt.nunique()}
            rows.append(row | _named("steps", *_resampled(of_kind, "steps", draws, rng)))
    return pd.DataFrame(rows)


def _scenes(part: pd.DataFrame, name: str) -> pd.DataFrame:
    chosen = part[part.kind.isin(SCENES[name])]
    if chosen.empty:
        raise ValueError(f"no prompt with {name} (kind {' or '.join(SCENES[name])}) among the samples")
    return chosen


def _resampled(part: pd.DataFrame, metric: str, draws: int, rng: np.random.Generator) -> tuple[float, np.ndarray]:
    """Mean over prompts, and the means (draws,) of as many prompts drawn with replacement."""
    values = part.groupby("prompt")[metric].mean().to_numpy()
    return values.mean(), rng.choice(values, (draws, len(values))).mean(1)


def _named(name: str, mean: float, drawn: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def figure(samples: pd.DataFrame) -> Figure:
    """Six panels: steps against the speed weight, of all scenes and by kind, and four qualities against steps.

    Weights stand at equal distances. Dots are training seeds; bands and bars are 95% intervals.
    """
    table, kinds = summary(samples), steps_by_kind(samples)
    seeds = samples.groupby(["speed_weight", "seed"])[list(METRICS)].mean().reset_index()
    sheet, (overall, by_kind, *qualities) = canvas.panels(6, 3, 3.5, 2.7)
    weights = list(table.speed_weight)
    _band(overall, table, plots.COLORS[0], "o", "mean")
    overall.plot(seeds.speed_weight.map(weights.index), seeds.steps, ".", color=canvas.INK, label="training seeds")
    canvas.label(overall, "steps of all scenes", "speed weight", "steps per image")
    for index, (name, rows) in enumerate(kinds.groupby("scene", sort=False)):
        _band(by_kind, rows, plots.COLORS[index], "osD^"[index], name)
    canvas.label(by_kind, "steps by kind of scene", "speed weight", "steps per image")
    for axes in (overall, by_kind):
        axes.set_xticks(range(len(weights)), [f"{weight:g}" for weight in weights])
        axes.set_ylim(0, 1.05 * max(kinds.steps_high.max(), seeds.steps.max()))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.legend(frameon=False, fontsize=8, labelcolor=canvas.INK, loc="lower left")
    for axes, metric in zip(qualities, METRICS[1:], strict=True):
        _quality(axes, table, seeds, metric)
    sheet.tight_layout()
    return sheet


def _band(axes: Axes, rows: pd.DataFrame, color: str, marker: str, name: str) -> None:
    """Mean steps as a line over the weights, with its interval."""
    places = range(len(rows))
    axes.fill_between(places, rows.steps_low, rows.steps_high, color=color, alpha=0.18, linewidth=0)
    axes.plot(places, rows.steps, color=color, marker=marker, markersize=5, label=name)


def _quality(axes: Axes, table: pd.DataFrame, seeds: pd.DataFrame, metric: str) -> None:
    """One quality against mean steps, each point with its interval and named by its weight."""
    color = plots.COLORS[1]
    low, high = table[metric] - table[f"{metric}_low"], table[f"{metric}_high"] - table[metric]
    axes.plot(seeds.steps, seeds[metric], ".", color=canvas.INK)
    axes.errorbar(table.steps, table[metric], (low, high), color=color, marker="o", markersize=5, linewidth=1.2)
    for index, point in enumerate(table.to_dict("records")):  # above and below in turn: neighbours may coincide
        end, offset, side = ("low", -3, "top") if index % 2 else ("high", 3, "bottom")
        axes.annotate(
            f"{point['speed_weight']:g}", (point["steps"], point[f"{metric}_{end}"]), (0, offset), ha="center", va=side,
            textcoords="offset points", fontsize=8, color=canvas.INK,
        )  # fmt: skip
    axes.margins(x=0.08, y=0.15)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    canvas.label(axes, plots.METRICS[metric].split(" (")[0], "steps per image; numbers: speed weight")
