"""A training run without a notebook, in one process or several: strict knobs in, a run folder out.

    speedrl train preset=smoke
    accelerate launch --multi_gpu --num_processes 8 -m speedrl_lab train preset=amused-256 \
        generator=amused:<folder> prompt_file=<file> num_groups=16
    torchrun --nproc-per-node 2 -m speedrl_lab train preset=smoke device=cpu

The folder is that of notebook 03_speed_rl. `num_groups` counts the groups of all processes, so that their number
changes the time of a run and not its result.
"""

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from speedrl_lab import parallel
from speedrl_lab.config import RunConfig, flat_fields, nearest
from speedrl_lab.generator import MaskedGenerator
from speedrl_lab.generators import describe_generator, load_generator, prompts_for
from speedrl_lab.planner import plan
from speedrl_lab.rewards import Reward, build_rewards, describe_rewards
from speedrl_lab.rl import train
from speedrl_lab.runs import Run
from speedrl_lab.selftest import selftest

OWN = {"run": "", "resume": False, "policy": "", "watched": None}
"""Knobs beside those of `RunConfig`, and their defaults: folder below outputs/ (empty: named by the time), whether to
go on with it, weights file to start from, rewards by name that have no weight (None: detector, for EmojiScenes)."""
SHOWN = ("quality", "steps", "kl", "diversity")
"""Numbers of a record beside the progress bar."""


def settings(knobs: Mapping[str, Any]) -> tuple[RunConfig, dict[str, Any]]:
    """The configuration and the knobs of `OWN`; TypeError or ValueError in one line, as `RunConfig.from_flat`."""
    known = {**OWN, **flat_fields()}
    for name in knobs:
        if name not in known and name != "preset":
            raise TypeError(f"unknown parameter {name!r}; nearest: {nearest(name, list(known))!r}")
    own = OWN | {name: value for name, value in knobs.items() if name in OWN}
    for name, kind in {"run": str, "resume": bool, "policy": str, "watched": list | None}.items():
        if not isinstance(own[name], kind):
            expected = getattr(kind, "__name__", "list or None")
            raise TypeError(f"parameter {name}={own[name]!r} has type {type(own[name]).__name__}, expected {expected}")
    return RunConfig.from_flat(**{name: value for name, value in knobs.items() if name not in OWN}), own


def run(knobs: Mapping[str, Any]) -> Path | None:
    """Train as the knobs say, going on with a stopped run where `resume` is True; returns the run folder.

    Progress is shown in the main process; the others return None. Raises what `settings`, `load_generator`,
    `Plan.require_fit`, `selftest`, `Run.open` and `train` raise, all of it before the first iteration.
    """
    config, own = settings(knobs)
    with parallel.joined():
        parallel.require_whole_groups(config.train.num_groups)
        torch.set_float32_matmul_precision(config.matmul_precision)
        generator = load_generator(
            config.generator, config.device, own["policy"] or None, config.negative_prompt, config.time_conditioning,
            config.text_encoder, config.compiled,
        )  # fmt: skip
        prompts, _ = prompts_for(generator, config.prompt_file)
        rewards = build_rewards(_names(config, generator, own["watched"]), generator.device)
        each = replace(config.train, num_groups=config.train.num_groups // parallel.world_size())
        plan(generator, each, rewards).require_fit()
        if parallel.is_main():
            with parallel.alone():
                selftest(generator, config.train, prompts, rewards)
        folder = _open(config, own)
        _train(generator, prompts, rewards, config, folder)
        if not parallel.is_main():
            return None
        folder.write_card(_facts(folder, config, own, generator, rewards))
        return folder.path


def _names(config: RunConfig, generator: MaskedGenerator, watched: list[str] | None) -> list[str]:
    """Rewards that are trained on or watched, each once."""
    if watched is None:
        watched = ["detector"] if generator.spec.name == "emoji" else []
    return list(dict.fromkeys([*config.train.quality_weights, "speed", *watched]))


def _open(config: RunConfig, own: Mapping[str, Any]) -> Run:
    """The run folder, made or checked by the main process."""
    described = {**config.flat(), "policy": own["policy"]}
    name = own["run"] or f"train/{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    opened = Run.open(name, described, own["resume"]) if parallel.is_main() else None
    path = parallel.from_main(str(opened.path) if opened else None)
    return opened or Run(Path(path), described)


def _train(
    generator: MaskedGenerator, prompts: list[str], rewards: Mapping[str, Reward], config: RunConfig, folder: Run
) -> None:
    """All iterations that are left, with a progress bar in the main process."""
    count = parallel.world_size()
    title = f"{folder.path.name}, {count} process{'es' if count > 1 else ''}"
    with tqdm(total=config.train.iterations, desc=title, unit="it", disable=not parallel.is_main()) as bar:
        for record in train(generator, prompts, rewards, config.train, folder):
            bar.set_postfix({name: f"{record[name]:.3f}" for name in SHOWN}, refresh=False)
            bar.update(record["iteration"] - bar.n)
            for warning in record["warnings"] if parallel.is_main() else ():
                bar.write(f"iteration {record['iteration']}: {warning}")


def _facts(
    folder: Run, config: RunConfig, own: Mapping[str, Any], generator: MaskedGenerator, rewards: Mapping[str, Reward]
) -> dict[str, Any]:
    """What the run card says: of generator and rewards as much as repeats them, of the run its first and last fifth."""
    records = folder.records()
    fifth = max(1, len(records) // 5)
    first, last = records.head(fifth), records.tail(fifth)
    return {
        "start": own["policy"] or "the weights as published",
        **describe_generator(generator),
        **{f"reward {name}": text for name, text in describe_rewards(rewards).items()},
        "processes": parallel.world_size(),
        "iterations": f"{len(records)} of {config.train.iterations}",
        "minutes": f"{records.seconds.sum() / 60:.1f}",
        **{name: f"{first[name].mean():.3f} -> {last[name].mean():.3f} (first and last fifth)"
           for name in (*SHOWN, "rewards.detector") if name in records},
        "warnings": "; ".join(sorted({w for row in records.warnings for w in row})) or "none",
    }  # fmt: skip
