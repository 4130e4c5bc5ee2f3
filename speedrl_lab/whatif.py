"""What if: what reward weights would do to rollouts that are there already, before anything is trained.

Advantages come from `rl.weigh`, the function that training calls. A run can leave its rollouts in a file.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from speedrl_lab import advantage as formulas
from speedrl_lab import notebooks
from speedrl_lab.advantage import Advantages
from speedrl_lab.comparison import folders, name_of
from speedrl_lab.config import HEADED, RunConfig, SamplerConfig, TrainConfig, nearest
from speedrl_lab.generator import MaskedGenerator
from speedrl_lab.learner import Rollout, Weights, weights_at
from speedrl_lab.pace import head_for
from speedrl_lab.presets import PRESETS
from speedrl_lab.rewards import MODEL_NAMES, NAMES, Reward
from speedrl_lab.rl import rollout, weigh, within_group_std
from speedrl_lab.runs import outputs_root, read_checkpoint, write_checkpoint
from speedrl_lab.trajectory import Trajectory

FILE = "rollouts.pt"
VERSION = 1
THUMBNAIL = 64
"""Pixels of a stored picture's longer side, at most."""


@dataclass(frozen=True)
class Explanation:
    """What settings make of a rollout: advantages, two tables, and what a person should know."""

    advantages: Advantages
    weights: pd.DataFrame
    """One row a reward: `reward, nominal, share` (of the sum of weights), `effective` (correlation of the
    advantage with the reward), `mean, spread` (raw units; spread inside a group), `acts`."""
    samples: pd.DataFrame
    """One row a sample: `prompt, group, steps, forwards`, each raw reward, `quality` (weighted z-scores),
    `advantage, fate` (wins, loses, neutral, clipped, dropped) and `why`."""
    warnings: list[str]


def draw(
    generator: MaskedGenerator,
    prompts: Sequence[str],
    rewards: Mapping[str, Reward],
    config: TrainConfig,
    iteration: int = 0,
) -> Rollout:
    """The rollout of an iteration (from 0) of a run with these settings; the generator stays as it is.

    Never one that practises a fixed number of steps: in such a one speed has no weight.
    """
    config = replace(config, practice_steps=())
    if config.sampler.schedule in HEADED and generator.pace is None:
        generator = generator.copy()
        generator.pace = head_for(config.sampler.schedule, config.seed).to(generator.device)
    return rollout(generator, prompts, rewards, config, iteration)


def write_rollouts(path: Path | str, drawn: Rollout, config: TrainConfig) -> Path:
    """Store a rollout with the settings that drew it, as plain values and tensors; returns the path.

    Pictures shrink to THUMBNAIL pixels, 8 bits. Raises FileExistsError: a run's rollouts are never overwritten.
    """
    path, trajectory = Path(path), drawn.trajectory
    if path.exists():
        raise FileExistsError(f"{path} exists and is not overwritten; choose another name")
    state = {
        "version": VERSION,
        "prompts": list(drawn.prompts),
        "config": asdict(config),
        "rewards": {name: value.float().cpu() for name, value in drawn.rewards.items()},
        "thumbnails": thumbnails(drawn.images),
        "tokens": trajectory.tokens.int().cpu(),
        "reveal_step": trajectory.reveal_step.cpu(),
        "steps": trajectory.steps.cpu(),
        "forwards": trajectory.forwards.cpu(),
        "mask_id": trajectory.mask_id,
    }
    write_checkpoint(path, state)
    return path


def read_rollouts(path: Path | str) -> tuple[Rollout, TrainConfig]:
    """What `write_rollouts` wrote, from its file or the run folder that holds it.

    Log-probabilities are not stored, and NaN. Raises FileNotFoundError or ValueError in one line.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(_absent(path))
    state = read_checkpoint(path)
    if not isinstance(state, dict) or state.get("version") != VERSION or "thumbnails" not in state:
        raise ValueError(f"{path} holds no rollouts of version {VERSION} of this project")
    settings = dict(state["config"])
    config = TrainConfig(**settings | {"sampler": SamplerConfig(**settings["sampler"])})
    trajectory = Trajectory(
        tokens=state["tokens"].long(), reveal_step=state["reveal_step"], steps=state["steps"],
        forwards=state["forwards"], log_prob=torch.full(state["tokens"].shape, torch.nan),
        mask_id=state["mask_id"], sampler=config.sampler,
    )  # fmt: skip
    return Rollout(state["prompts"], trajectory, state["thumbnails"].float() / 255, state["rewards"]), config


def _absent(path: Path) -> str:
    """One line for rollouts that are not there: who leaves them, and the nearest run that has some."""
    folder = path.parent if path.name == FILE else path
    what = f"run {name_of(folder)!r} holds no {FILE}" if folder.is_dir() else f"there is no run {name_of(folder)!r}"
    known = [name_of(run) for run in folders(outputs_root()) if (run / FILE).is_file()]
    hint = f"nearest that has one: {nearest(name_of(folder), known)!r}" if known else "no run here has one yet"
    return f"{what}; 03_speed_rl leaves one where it ends; {hint}"


def thumbnails(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] as uint8, shrunk to at most THUMBNAIL pixels a side."""
    images, factor = images.detach().float().cpu(), THUMBNAIL / max(images.shape[-2:])
    if factor < 1:
        size = [max(1, round(side * factor)) for side in images.shape[-2:]]
        images = functional.interpolate(images, size=size, mode="bilinear", antialias=True)
    return (images.clamp(0, 1) * 255).round().byte()


def weights_now(drawn: Rollout, config: TrainConfig) -> Weights:
    """The nominal weights of the first update; for the Lagrangian form, of the second, if rollouts stay alike."""
    if config.speed_form != "lagrangian":
        return weights_at(config, 0)
    excess = float(drawn.trajectory.forwards.float().mean()) / config.target_steps - 1
    multiplier = formulas.next_multiplier(config.speed_weight, excess, config.multiplier_rate)
    return weights_at(config, 0, multiplier + excess)


def explain(drawn: Rollout, config: TrainConfig) -> Explanation:
    """What `config` would make of a rollout: who wins, who is filtered and why, which weight acts.

    Raises ValueError where the rollout lacks a reward that has a weight, or has another group size.
    """
    needed = [*config.quality_weights, *(["speed"] if config.speed_weight else []), *config.quality_floor]
    missing = [name for name in needed if name not in drawn.rewards]
    if missing:
        raise ValueError(f"the rollouts have no reward {missing[0]!r}, only {', '.join(drawn.rewards)}")
    if len(drawn.prompts) % config.group_size:
        raise ValueError(f"group_size={config.group_size} does not divide the {len(drawn.prompts)} samples given")
    weights = weights_now(drawn, config)
    found = weigh(drawn, config, weights)
    plain = weigh(drawn, replace(config, low_quality="off", filter_quantile=0.0), weights)
    samples = _samples(drawn, config, found, plain)
    return Explanation(
        found, _weights(drawn, config, found, weights), samples, _warnings(drawn, config, found, weights, samples)
    )


def _weights(drawn: Rollout, config: TrainConfig, found: Advantages, weights: Weights) -> pd.DataFrame:
    nominal = dict.fromkeys(drawn.rewards, 0.0) | weights.quality | {"speed": weights.speed}
    nominal = {name: weight for name, weight in nominal.items() if name in drawn.rewards}
    total = sum(map(abs, nominal.values())) or 1.0
    rows = []
    for name, weight in nominal.items():
        raw = drawn.rewards[name]
        scores = formulas.z_score(raw, config.group_size)
        seen = ~raw.isnan() & found.kept
        watched = formulas.correlation(found.advantage[seen], scores[seen])  # of a reward without a weight
        rows.append({
            "reward": name, "nominal": weight, "share": weight / total,
            "effective": found.effective_weights.get(name, watched), "mean": float(raw.nanmean()),
            "spread": within_group_std(raw, config.group_size), "acts": bool(scores.any()),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _samples(drawn: Rollout, config: TrainConfig, found: Advantages, plain: Advantages) -> pd.DataFrame:
    groups = torch.arange(len(drawn.prompts)) // config.group_size
    table = pd.DataFrame({
        "prompt": drawn.prompts, "group": groups,
        "steps": drawn.trajectory.steps.cpu(), "forwards": drawn.trajectory.forwards.cpu(),
        **{name: raw.cpu() for name, raw in drawn.rewards.items()},
        "quality": found.quality.cpu(), "advantage": found.advantage.cpu(),
    })  # fmt: skip
    poor = torch.zeros_like(found.kept)
    if config.low_quality != "off" and config.filter_quantile > 0:
        quality = found.quality.masked_fill(~plain.kept, torch.nan)
        poor = formulas.below_quantile(quality, config.group_size, config.filter_quantile)
    hinged = config.speed_form == "hinge"
    reached = formulas.reaches(drawn.rewards, config.quality_floor) if hinged else torch.ones_like(poor)
    advantages = zip(found.advantage.tolist(), plain.advantage.tolist(), plain.kept.tolist(), strict=True)
    verdicts = [
        _verdict(config, *row) for row in zip(advantages, poor.tolist(), reached.tolist(), strict=True)
    ]  # fmt: skip
    table["fate"], table["why"] = zip(*verdicts, strict=True)
    return table


def _verdict(config: TrainConfig, values: tuple[float, float, bool], poor: bool, reached: bool) -> tuple[str, str]:
    """Fate and reason of one sample, from its advantage with and without the filter."""
    value, before, scored = values
    low = f"its quality is below the {config.filter_quantile:g} quantile of its group"
    if not scored:
        return "dropped", "no quality reward could score it"
    if poor and config.low_quality == "drop":
        return "dropped", low
    if poor and before > formulas.MIN_STD:
        return "clipped", f"would win {before:+.2f}, but {low}"
    fate = "wins" if value > formulas.MIN_STD else "loses" if value < -formulas.MIN_STD else "neutral"
    if not reached:
        floor = " and ".join(f"{name} {least:g}" for name, least in config.quality_floor.items())
        return fate, f"below the floor of {floor}: its speed does not count"
    return fate, "nothing tells it from its group" if fate == "neutral" else ""


def _warnings(
    drawn: Rollout, config: TrainConfig, found: Advantages, weights: Weights, samples: pd.DataFrame
) -> list[str]:
    said, steps = [], drawn.trajectory.steps
    if weights.speed and not formulas.group_centered(steps.float(), config.group_size).any():
        count = f"{int(steps[0])} steps" if len(steps.unique()) == 1 else "equally many steps"
        said.append(
            f"The speed reward cannot act: all samples of a group take {count}, and what they share is taken off. "
            "Let the count vary: schedule='paced'."
        )
    for name in found.silent_rewards:
        if name != "speed" or not said:
            said.append(f"Reward '{name}' does not vary inside any group: its weight does nothing.")
    if config.speed_form == "hinge":
        reached = float(formulas.reaches(drawn.rewards, config.quality_floor).float().mean())
        if reached in (0.0, 1.0):
            what = "No sample reaches" if reached == 0 else "Every sample reaches"
            said.append(f"{what} the quality floor: it changes nothing here.")
    if found.silent_groups:
        said.append(f"{found.silent_groups} of {int(samples.group.max()) + 1} groups give no signal.")
    said += [f"Reward '{name}' could not score {count} samples." for name, count in found.masked.items() if count]
    return said


def total_reward(quality: Tensor, forwards: Tensor, drawn: Rollout, config: TrainConfig) -> Tensor:
    """What the weighted sum would be at any quality and number of passes (broadcast), before the group's mean is off.

    As for a group whose mean of passes is that of the batch; in the hinge form, above the floor. Equal
    values are the iso-reward lines.
    """
    sampler, raw, weight = config.sampler, drawn.rewards["speed"], weights_now(drawn, config).speed
    num_tokens = drawn.trajectory.tokens.shape[1]
    guided = 2 if sampler.guidance_scale != 1.0 else 1
    speed = -forwards.float() / num_tokens
    if config.speed_form == "multiplicative":
        slowest = (2 if sampler.schedule == "adaptive" else guided) * sampler.steps / num_tokens
        return 4 * quality.sigmoid() * formulas.speed_factor(speed, guided / num_tokens, slowest) ** weight
    if config.speed_form == "hinge":
        raw = raw.masked_fill(~formulas.reaches(drawn.rewards, config.quality_floor), torch.nan)
    centered = formulas.group_centered(raw, config.group_size)
    score = formulas.z_score(raw, config.group_size, guided / num_tokens)
    slope = float((score * centered).sum() / centered.square().sum()) if centered.any() else 0.0
    return quality + weight * slope * (speed - float(raw.nanmean().nan_to_num(0.0)))


def knobs(config: RunConfig, notebook: str = "03_speed_rl") -> dict[str, Any]:
    """What the notebook must be given for these settings: the preset, and all that differs from it.

    Raises ValueError for a setting that the notebook does not take, or a reward that has no name there.
    """
    usual = PRESETS[config.preset].flat()
    changed = {name: value for name, value in config.flat().items() if value != usual[name]}
    declared = notebooks.parameters(notebook)
    for name in changed:
        if name not in declared:
            raise ValueError(f"{notebook} has no parameter {name!r}; leave it as preset {config.preset!r} has it")
    for name in config.train.quality_weights:
        if name.split(":")[0].split("@")[0] not in (*NAMES, *MODEL_NAMES):
            raise ValueError(
                f"reward {name!r} is your own: train with it in a copy of {notebook}, or set its weight to 0"
            )
    lists = {name: list(value) for name, value in changed.items() if isinstance(value, tuple)}
    return {"preset": config.preset, **changed, **lists}


def commands(given: Mapping[str, Any], notebook: str = "03_speed_rl") -> dict[str, str]:
    """The two command lines that start a notebook with these knobs: our strict runner's, and papermill's."""
    words = [f"{name}={value if isinstance(value, str) else repr(value)}" for name, value in given.items()]
    files = [f"notebooks/{notebook}.ipynb", f"outputs/{notebook}.ipynb"]
    return {
        "speedrl_lab": shlex.join(["python", "-m", "speedrl_lab", "run", notebook, *words]),
        "papermill": shlex.join(["papermill", "--engine", "speedrl", *files, "-y", json.dumps(given)]),
    }
