"""Speed-RL: GRPO on quality and speed for masked image generators (arXiv 2512.01094).

Read `train` top to bottom: rollout, score, advantages, update, record. The paper's code and formulas
are not public. Ours, by default: the step count is an action of a pace head, the order is independent of
the model so that the replayed trajectory probability is exact, every reward is z-scored before it is
weighted, and the penalty is a full-vocabulary KL to the starting point. Launched as several processes, each
draws its share of the groups (`parallel`), and the loop below is the same.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from speedrl_lab import noise, parallel
from speedrl_lab.adapters import require_whole
from speedrl_lab.advantage import Advantages, combine
from speedrl_lab.config import HEADED, VARYING, SamplerConfig, TrainConfig
from speedrl_lab.generator import MaskedGenerator
from speedrl_lab.learner import Learner, Rollout, Weights
from speedrl_lab.pace import head_for
from speedrl_lab.rewards import Reward
from speedrl_lab.runs import Run
from speedrl_lab.sampler import require_head, sample
from speedrl_lab.steering import Steer


def train(
    generator: MaskedGenerator,
    prompts: Sequence[str],
    rewards: Mapping[str, Reward],
    config: TrainConfig,
    run: Run | None = None,
    steer: Steer | None = None,
) -> Iterator[dict[str, Any]]:
    """Tune `generator` in place and yield one record an iteration.

    Stop by leaving the loop: with a `run` the state is saved; call again to go on from there, bit for bit
    on a CPU. When the smoothed progress collapses, the best weights are restored and the loop ends.

    Where several processes train together, all call it alike and get the same records; the main one writes.

    `steer` is asked before each iteration, by its number, for weights to change (a quality reward, `speed` or
    `kl`). They are in force from that iteration on, resumed or not, instead of constants and schedules; its
    record lists them as `changed`.

    Raises ValueError before any work for rewards that are missing or cannot act.
    """
    check(generator, prompts, rewards, config)
    if config.sampler.schedule in HEADED and generator.pace is None:
        generator.pace = head_for(config.sampler.schedule, config.seed).to(generator.device)
    parallel.same_start(module for module in (generator.policy, generator.pace) if module is not None)
    learner = Learner(generator, config)
    if run is not None:
        with parallel.main_first():
            saved = run.load_checkpoint()
        if saved is not None:
            learner.restore(saved)
        elif parallel.is_main():
            run.save_checkpoint(learner.state())  # so that a second call knows where the first began
    run = run if parallel.is_main() else None  # one process writes
    while learner.iteration < config.iterations and not learner.guard.collapsed:
        began = time.perf_counter()
        if steer is not None:
            asked = steer(learner.iteration + 1) if parallel.is_main() else None
            _change(learner, rewards, parallel.from_main(asked), run)
        drawn, weights = rollout(generator, prompts, rewards, config, learner.iteration), learner.weights
        practised = drawn.trajectory.sampler != config.sampler
        if practised:
            weights = replace(weights, speed=0.0)  # nobody chose the number of steps
        advantages = weigh(drawn, config, weights)
        measured = learner.update(drawn, advantages)
        record = describe(learner, drawn, weights, advantages, measured)
        record |= {"practised": practised, "warnings": [] if practised else learner.watch(record)}
        record["seconds"] = time.perf_counter() - began
        done = learner.iteration == config.iterations or learner.guard.collapsed
        is_saved = run is None or done or learner.iteration % config.save_every == 0
        if run is not None:
            run.log(record)
            if is_saved:
                run.save_checkpoint(learner.state())
        try:
            yield record
        except GeneratorExit:
            if not is_saved and _is_last(run, record):
                run.save_checkpoint(learner.state())
            raise
    learner.finish()
    if config.sampler.revise:
        generator.revises = True
    if run is not None:
        generator.save_policy(run.path / "policy.safetensors", origin=f"Speed-RL run {run.path.name}")


def _change(learner: Learner, rewards: Mapping[str, Reward], weights: Mapping[str, float], run: Run | None) -> None:
    """Change weights, and save that it was done: a run that is killed afterwards goes on with them."""
    if not weights:
        return
    if "speed" in weights and "speed" not in rewards:
        raise ValueError(f"weight 'speed' cannot be changed: it is not among the rewards ({', '.join(rewards)})")
    learner.change(weights)
    if run is not None:
        run.save_checkpoint(learner.state())


def _is_last(run: Run, record: Mapping[str, Any]) -> bool:
    """Whether nobody has gone on with the run, or removed it, since it logged that record."""
    logged = run.records().tail(1).to_dict("records")
    return bool(logged) and all(logged[0][name] == record[name] for name in ("iteration", "seconds"))


def check(
    generator: MaskedGenerator, prompts: Sequence[str], rewards: Mapping[str, Reward], config: TrainConfig
) -> None:
    """Raise ValueError in one line for what would fail or be a silent no-op later."""
    if generator.pace is not None:  # one that is missing is made
        require_head(generator, config.sampler)
    fast = config.speed_weight or config.speed_form == "lagrangian" or "speed" in config.weight_schedules
    needed = [*config.quality_weights, *(["speed"] if fast else [])]
    missing = [name for name in needed if name not in rewards]
    if missing:
        raise ValueError(
            f"reward {missing[0]!r} has a weight but is not among the rewards given ({', '.join(rewards)})"
        )
    if "speed" in needed and config.sampler.schedule not in VARYING:
        raise ValueError(
            f"speed_weight={config.speed_weight} cannot act with schedule={config.sampler.schedule!r}: every "
            "sample of a group takes the same number of steps; use schedule='paced' or speed_weight=0"
        )
    if "speed" in needed and config.sampler.schedule == "random_budget" and config.speed_form != "multiplicative":
        raise ValueError(
            f"speed_form={config.speed_form!r} teaches nothing with schedule='random_budget', where chance draws the "
            "steps; use schedule='paced', speed_form='multiplicative', or speed_weight=0"
        )
    if len(prompts) < config.num_groups and prompts:
        raise ValueError(
            f"num_groups={config.num_groups}: expected at most one group a prompt; nearest: {len(prompts)}"
        )
    unknown = [name for name in config.quality_floor if name not in rewards]
    if unknown:
        raise ValueError(f"quality_floor names {unknown[0]!r}, which is not among the rewards ({', '.join(rewards)})")
    if not prompts:
        raise ValueError("no training prompts given; expected at least one")
    if config.gradient_checkpointing and not hasattr(generator, "enable_gradient_checkpointing"):
        raise ValueError(
            f"gradient_checkpointing=True: generator {generator.spec.name!r} has none; lower micro_batch_size instead"
        )
    if config.sampler.steps > generator.spec.num_tokens:
        most = generator.spec.num_tokens
        raise ValueError(f"steps={config.sampler.steps}: expected 1 to {most}; nearest: {most}")
    parallel.require_whole_groups(config.num_groups)
    if config.trained != "schedule":
        require_whole(generator.policy)
    generator.encode(list(prompts))  # an unreadable prompt fails here, not in iteration 300


def rollout(
    generator: MaskedGenerator,
    prompts: Sequence[str],
    rewards: Mapping[str, Reward],
    config: TrainConfig,
    iteration: int,
) -> Rollout:
    """Draw `num_groups` prompts and `group_size` samples of each, decode and score them.

    Everything random depends on (seed, iteration) alone; each of several processes draws its share of the groups,
    and a sample is the same whoever draws it. ValueError for a reward of another shape, or infinite, or at first NaN.
    """
    rng = torch.Generator().manual_seed(config.seed * 1_000_003 + iteration)
    chosen = torch.randperm(len(prompts), generator=rng)[: config.num_groups].tolist()
    repeated = [prompts[index] for index in parallel.own(chosen) for _ in range(config.group_size)]
    key = noise.fold(torch.tensor([config.seed]), iteration)
    trajectory = sample(generator, repeated, sampler_at(config, iteration), seed=int(key))
    images = generator.decode(trajectory.tokens)
    scored = {name: reward(images, repeated, trajectory).float() for name, reward in rewards.items()}
    scored = {name: _gathered(name, value, len(repeated), iteration == 0) for name, value in scored.items()}
    return Rollout(repeated, trajectory, images, scored)


def _gathered(name: str, value: Tensor, count: int, first: bool) -> Tensor:
    """A reward's values for the samples of all processes; raises ValueError in one line for what is no reward (B,)."""
    fits = value.shape == (count,)
    everyone = parallel.gather(value) if fits else value
    unusable = everyone.isinf().any() or (first and everyone.isnan().all())
    if not fits or unusable:
        raise ValueError(
            f"reward {name!r} gave shape {tuple(value.shape)}"
            f"{' with infinite values or nothing but NaN' if unusable else ''}; expected {count} numbers "
            "(NaN for a sample that cannot be scored)"
        )
    return everyone


def sampler_at(config: TrainConfig, iteration: int) -> SamplerConfig:
    """What an iteration (from 0) is drawn with: every second one practises a fixed number of steps."""
    turn, practises = divmod(iteration, 2)
    if not (practises and config.practice_steps):
        return config.sampler
    steps = config.practice_steps[turn % len(config.practice_steps)]
    sampler = replace(config.sampler, schedule="power", steps=steps)
    return sampler if steps > 1 else replace(sampler, first_temperature=1.0)


def weigh(drawn: Rollout, config: TrainConfig, weights: Weights) -> Advantages:
    """The advantages of a rollout under the weights of its iteration; speed counts passes, each 1 / N."""
    sampler, num_tokens = drawn.trajectory.sampler or config.sampler, drawn.trajectory.tokens.shape[1]
    guided = 2 if sampler.guidance_scale != 1.0 else 1  # passes of every step
    most = 2 if sampler.schedule == "adaptive" else guided
    return combine(
        drawn.rewards,
        weights.quality,
        weights.speed,
        config.group_size,
        config.advantage_std,
        config.filter_quantile,
        config.low_quality,
        step_reward=guided / num_tokens,
        speed_form=config.speed_form,
        quality_floor=config.quality_floor,
        slowest=most * sampler.steps / num_tokens,
    )


def within_group_diversity(images: Tensor, group_size: int) -> float:
    """Mean root-mean-square pixel distance between two samples of a prompt, in [0, 1]."""
    groups = images.flatten(1).unflatten(0, (-1, group_size))  # (P, G, 3HW)
    distances = torch.cdist(groups, groups) / groups.shape[-1] ** 0.5  # (P, G, G)
    return float(distances.sum() / (len(groups) * group_size * (group_size - 1)))


def describe(
    learner: Learner, drawn: Rollout, weights: Weights, advantages: Advantages, measured: Mapping[str, float]
) -> dict[str, Any]:
    """The record of one iteration: plain numbers, names as TRL logs them where it has the same."""
    config, trajectory = learner.config, drawn.trajectory
    scored = {name: value for name, value in drawn.rewards.items() if not value.isnan().all()}
    raw = {name: float(value.nanmean()) for name, value in scored.items()}
    used = {name: weight for name, weight in weights.quality.items() if name in raw}
    quality = sum(weight * raw[name] for name, weight in used.items())
    quality = quality / max(sum(map(abs, used.values())), 1e-9)
    return {
        "iteration": learner.iteration,
        "reward": quality + weights.speed * raw.get("speed", 0.0),
        "quality": quality,
        "rewards": raw,
        "rewards_std": {name: within_group_std(value, config.group_size) for name, value in scored.items()},
        "weights": {**weights.quality, "speed": weights.speed, "kl": weights.kl},
        "changed": {name: weight for name, (first, weight) in learner.changed.items() if first == learner.iteration},
        "effective_weights": advantages.effective_weights,
        "masked": advantages.masked,
        "steps": parallel.mean(float(trajectory.steps.float().mean())),
        "forwards": int(parallel.total(trajectory.forwards.sum())),
        "diversity": parallel.mean(within_group_diversity(drawn.images, config.group_size)),
        "dropped": int((~advantages.kept).sum()),
        "silent_groups": advantages.silent_groups,
        "silent_rewards": list(advantages.silent_rewards),
        "learning_rate": learner.optimizer.param_groups[0]["lr"],
        "optimizer_steps": learner.optimizer_steps,
        **measured,
    }


def within_group_std(values: Tensor, group_size: int) -> float:
    """Standard deviation inside a group, averaged over groups; NaN values (B,) are left out."""
    groups = values.unflatten(0, (-1, group_size))  # (P, G)
    known = (~groups.isnan()).sum(1, keepdim=True)
    squared = (groups - groups.nanmean(1, keepdim=True)).square().nansum(1, keepdim=True)
    std = (squared / (known - 1).clamp(min=1)).sqrt()[known >= 2]
    return float(std.mean()) if len(std) else 0.0
