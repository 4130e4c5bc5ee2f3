"""Speed-RL: GRPO on quality and speed for masked image generators (arXiv 2512.01094).

Read `train` top to bottom: rollout, score, advantages, update, record. The paper's code and formulas
are not public. Ours: the step count is an action of a pace head, the order is independent of the model
so that the replayed trajectory probability is exact, every reward is z-scored before it is weighted,
and the penalty is the full-vocabulary KL to the starting point. Left out: several GPUs, LoRA.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from speedrl_lab import noise
from speedrl_lab.advantage import Advantages, combine
from speedrl_lab.config import TrainConfig
from speedrl_lab.generator import MaskedGenerator
from speedrl_lab.likelihood import visit_logits, visits
from speedrl_lab.objective import clipped_surrogate, entropy, kl_penalty
from speedrl_lab.pace import PaceHead
from speedrl_lab.rewards import Reward
from speedrl_lab.runs import Run
from speedrl_lab.sampler import sample
from speedrl_lab.trajectory import Trajectory

STATE = ("iteration", "smoothed", "best_progress", "scale", "best", "first_diversity", "collapsed")
"""What a learner remembers beside weights and optimizer."""
SMOOTHING = 0.9
"""Of the progress that the collapse guard watches."""


@dataclass(frozen=True)
class Rollout:
    """P * G samples, group-major, with their pictures and raw rewards."""

    prompts: list[str]
    trajectory: Trajectory
    images: Tensor
    rewards: dict[str, Tensor]


def train(
    generator: MaskedGenerator,
    prompts: Sequence[str],
    rewards: Mapping[str, Reward],
    config: TrainConfig,
    run: Run | None = None,
) -> Iterator[dict[str, Any]]:
    """Tune `generator` in place and yield one record an iteration.

    Stop by leaving the loop; with a `run`, call again to go on from its checkpoint, bit for bit on a
    CPU. When the smoothed progress collapses, the best weights are restored and the loop ends.
    Raises ValueError before any work for rewards that are missing or cannot act.
    """
    check(generator, prompts, rewards, config)
    if config.sampler.schedule == "paced" and generator.pace is None:
        generator.pace = PaceHead().reset(config.seed).to(generator.device)
    learner = Learner(generator, config)
    if run is not None:
        saved = run.load_checkpoint()
        if saved is not None:
            learner.restore(saved)
    while learner.iteration < config.iterations and not learner.collapsed:
        began = time.perf_counter()
        drawn = rollout(generator, prompts, rewards, config, learner.iteration)
        advantages = weigh(drawn, config)
        measured = learner.update(drawn, advantages)
        record = describe(learner, drawn, advantages, measured)
        record["warnings"] = learner.guard(record)
        record["seconds"] = time.perf_counter() - began
        if run is not None:
            run.log(record)
            done = learner.iteration == config.iterations or learner.collapsed
            if done or learner.iteration % config.save_every == 0:
                run.save_checkpoint(learner.state())
        yield record
    if learner.collapsed:
        learner.restore_best()
    if run is not None:
        generator.save_policy(run.path / "policy.safetensors", origin=f"Speed-RL run {run.path.name}")


def check(
    generator: MaskedGenerator, prompts: Sequence[str], rewards: Mapping[str, Reward], config: TrainConfig
) -> None:
    """Raise ValueError in one line for what would fail or be a silent no-op later."""
    needed = [*config.quality_weights, *(["speed"] if config.speed_weight else [])]
    missing = [name for name in needed if name not in rewards]
    if missing:
        raise ValueError(
            f"reward {missing[0]!r} has a weight but is not among the rewards given ({', '.join(rewards)})"
        )
    if config.speed_weight and config.sampler.schedule != "paced":
        raise ValueError(
            f"speed_weight={config.speed_weight} cannot act with schedule={config.sampler.schedule!r}: every "
            "sample of a group takes the same number of steps; use schedule='paced' or speed_weight=0"
        )
    if not prompts:
        raise ValueError("no training prompts given; expected at least one")
    if config.sampler.steps > generator.spec.num_tokens:
        most = generator.spec.num_tokens
        raise ValueError(f"steps={config.sampler.steps}: expected 1 to {most}; nearest: {most}")
    generator.encode(list(prompts))  # an unreadable prompt fails here, not in iteration 300


def rollout(
    generator: MaskedGenerator,
    prompts: Sequence[str],
    rewards: Mapping[str, Reward],
    config: TrainConfig,
    iteration: int,
) -> Rollout:
    """Draw `num_groups` prompts and `group_size` samples of each, decode and score them.

    Everything random depends on (seed, iteration) alone.
    """
    rng = torch.Generator().manual_seed(config.seed * 1_000_003 + iteration)
    chosen = torch.randperm(len(prompts), generator=rng)[: config.num_groups].tolist()
    repeated = [prompts[index] for index in chosen for _ in range(config.group_size)]
    key = noise.fold(torch.tensor([config.seed]), iteration)
    trajectory = sample(generator, repeated, config.sampler, seed=int(key))
    images = generator.decode(trajectory.tokens)
    scored = {name: reward(images, repeated, trajectory).float() for name, reward in rewards.items()}
    for name, value in scored.items():
        if value.shape != (len(repeated),) or not value.isfinite().all():
            raise ValueError(
                f"reward {name!r} gave shape {tuple(value.shape)}"
                f"{'' if value.isfinite().all() else ' with non-finite values'}; "
                f"expected {len(repeated)} finite numbers"
            )
    return Rollout(repeated, trajectory, images, scored)


def weigh(drawn: Rollout, config: TrainConfig) -> Advantages:
    """The advantages of a rollout, as the config weighs its rewards; one step of speed is 1 / N."""
    return combine(
        drawn.rewards,
        config.quality_weights,
        config.speed_weight,
        config.group_size,
        config.advantage_std,
        config.filter_quantile,
        config.low_quality,
        step_reward=1 / drawn.trajectory.tokens.shape[1],
    )


class Learner:
    """What changes during training: weights, optimizers, counters, guards; all of it in `state`."""

    def __init__(self, generator: MaskedGenerator, config: TrainConfig):
        self.generator, self.config = generator, config
        self.reference = generator.copy()
        self.reference.policy.requires_grad_(False)
        self.modules: dict[str, nn.Module] = {"policy": generator.policy}
        groups = [{"params": list(generator.policy.parameters()), "lr": config.learning_rate}]
        if config.sampler.schedule == "paced":
            self.modules["pace"] = generator.pace
            groups.append({"params": list(generator.pace.parameters()), "lr": config.pace_learning_rate})
        self.optimizer = torch.optim.Adam(groups)
        self.rates = [group["lr"] for group in groups]
        self.iteration = 0
        self.smoothed: float | None = None
        self.best_progress: float | None = None
        self.scale: dict[str, tuple[float, float]] | None = None
        self.best = self.played = self._weights()
        self.first_diversity: float | None = None
        self.collapsed = False

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        return {name: deepcopy(module.state_dict()) for name, module in self.modules.items()}

    def update(self, drawn: Rollout, advantages: Advantages) -> dict[str, float]:
        """Learn from one rollout: `inner_epochs` optimizer steps on surrogate minus KL.

        Loss a sample = - mean over its N tokens of (clipped surrogate - kl_weight * KL), and minus the
        surrogate of its pace actions; averaged over the B samples.
        """
        self.played = self._weights()  # what drew the rollout, and what its quality belongs to
        warm_up = min(1.0, (self.iteration + 1) / max(1, self.config.warmup_iterations))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * min(warm_up, 1 - self.iteration / self.config.iterations)
        for _ in range(self.config.inner_epochs):
            self.optimizer.zero_grad(set_to_none=True)
            measured = self._backward(drawn, advantages)
            norm = nn.utils.clip_grad_norm_(self.generator.policy.parameters(), 1.0)
            self.optimizer.step()
        self.iteration += 1
        return {**measured, "gradient_norm": float(norm)}

    def _backward(self, drawn: Rollout, advantages: Advantages) -> dict[str, float]:
        """Accumulate gradients over micro-batches of visited states; returns means over tokens."""
        config, trajectory = self.config, drawn.trajectory
        cond = self.generator.encode(drawn.prompts)
        count, num_tokens = trajectory.tokens.shape
        totals = dict.fromkeys(("kl", "entropy", "clip_fraction", "approx_kl"), 0.0)
        most = 0.0
        for visit in visits(trajectory, config.micro_batch_size):
            log_probs = visit_logits(self.generator, visit, cond, config.sampler)  # (R, V)
            with torch.no_grad():
                anchor = visit_logits(self.reference, visit, cond, config.sampler)
            chosen = log_probs.gather(1, visit.codes[:, None]).squeeze(1)
            old = trajectory.log_prob[visit.owners, visit.positions]
            advantage = advantages.advantage[visit.owners]
            value, ratio, clipped = clipped_surrogate(chosen, old, advantage, config.clip_range)
            kl = kl_penalty(log_probs, anchor, config.kl_estimator)
            loss = -(value - config.kl_weight * kl).sum() / (count * num_tokens)
            loss.backward()
            totals["kl"] += float(kl.detach().sum())
            totals["entropy"] += float(entropy(log_probs.detach()).sum())
            totals["clip_fraction"] += float(clipped.sum())
            totals["approx_kl"] += float((old - chosen.detach()).sum())
            most = max(most, float((ratio.detach() - 1).abs().max()))
        measured = {name: total / (count * num_tokens) for name, total in totals.items()}
        measured["ratio_deviation"] = most
        if trajectory.pace is not None:
            measured["pace_entropy"] = self._backward_pace(trajectory, advantages.advantage)
        return measured

    def _backward_pace(self, trajectory: Trajectory, advantage: Tensor) -> float:
        """Gradient of the pace head from stored features; the path through the network is left out."""
        acted = trajectory.pace >= 0  # (B, T)
        log_probs = self.generator.pace(trajectory.pace_features[acted])  # (A, K)
        chosen = log_probs.gather(1, trajectory.pace[acted][:, None]).squeeze(1)
        owner = acted.nonzero()[:, 0]
        old = trajectory.pace_log_prob[acted]
        value, _, _ = clipped_surrogate(chosen, old, advantage[owner], self.config.clip_range)
        (-value.sum() / len(trajectory)).backward()
        return float(entropy(log_probs.detach()).mean()) if len(owner) else 0.0

    def guard(self, record: Mapping[str, Any]) -> list[str]:
        """Watch quality and diversity; remember the best weights; say in words what is wrong."""
        progress, warnings = self.progress(record), []
        before = progress if self.smoothed is None else self.smoothed
        self.smoothed = SMOOTHING * before + (1 - SMOOTHING) * progress
        if self.best_progress is None or self.smoothed >= self.best_progress:
            self.best_progress, self.best = self.smoothed, self.played
        if self.smoothed < self.best_progress - self.config.collapse_drop:
            self.collapsed = True
            warnings.append(
                f"collapse: smoothed progress {self.smoothed:.2f} fell more than {self.config.collapse_drop:g} "
                f"below its best {self.best_progress:.2f}; best weights restored"
            )
        if self.first_diversity is None:
            self.first_diversity = record["diversity"]
        if record["diversity"] < self.config.diversity_floor * self.first_diversity:
            warnings.append(
                f"diversity {record['diversity']:.3f} is below {self.config.diversity_floor:.0%} of its "
                "start; raise kl_weight or give 'novelty' a weight"
            )
        for name in record["silent_rewards"]:
            warnings.append(f"reward {name!r} does not vary inside any group, so its weight does nothing")
        return warnings

    def progress(self, record: Mapping[str, Any]) -> float:
        """Weighted rise of the quality rewards, each in its within-group deviations of iteration 1."""
        weights = self.config.quality_weights
        if self.scale is None:
            self.scale = {name: (record["rewards"][name], max(record["rewards_std"][name], 1e-3)) for name in weights}
        rises = [
            weight * (record["rewards"][name] - self.scale[name][0]) / self.scale[name][1]
            for name, weight in weights.items()
        ]
        return sum(rises) / sum(map(abs, weights.values()))

    def restore_best(self) -> None:
        """Put the weights of the best smoothed quality back."""
        for name, module in self.modules.items():
            module.load_state_dict(self.best[name])

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint needs; random numbers depend on the iteration alone."""
        kept = {name: getattr(self, name) for name in STATE}
        modules = {**self._weights(), "reference": self.reference.policy.state_dict()}
        return {**kept, "modules": modules, "optimizer": self.optimizer.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint made by `state`."""
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        self.reference.policy.load_state_dict(state["modules"]["reference"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in STATE:
            setattr(self, name, state[name])


def within_group_diversity(images: Tensor, group_size: int) -> float:
    """Mean root-mean-square pixel distance between two samples of a prompt, in [0, 1]."""
    groups = images.flatten(1).unflatten(0, (-1, group_size))  # (P, G, 3HW)
    distances = torch.cdist(groups, groups) / groups.shape[-1] ** 0.5  # (P, G, G)
    return float(distances.sum() / (len(groups) * group_size * (group_size - 1)))


def describe(learner: Learner, drawn: Rollout, advantages: Advantages, measured: Mapping[str, float]) -> dict[str, Any]:
    """The record of one iteration: plain numbers, names as TRL logs them where it has the same."""
    config, trajectory = learner.config, drawn.trajectory
    raw = {name: float(value.mean()) for name, value in drawn.rewards.items()}
    weights = config.quality_weights
    quality = sum(weight * raw[name] for name, weight in weights.items()) / sum(map(abs, weights.values()))
    return {
        "iteration": learner.iteration,
        "reward": quality + config.speed_weight * raw.get("speed", 0.0),
        "quality": quality,
        "rewards": raw,
        "rewards_std": {
            name: float(value.unflatten(0, (-1, config.group_size)).std(1).mean())
            for name, value in drawn.rewards.items()
        },
        "effective_weights": advantages.effective_weights,
        "steps": float(trajectory.steps.float().mean()),
        "forwards": int(trajectory.forwards.sum()),
        "diversity": within_group_diversity(drawn.images, config.group_size),
        "dropped": int((~advantages.kept).sum()),
        "silent_groups": advantages.silent_groups,
        "silent_rewards": list(advantages.silent_rewards),
        "learning_rate": learner.optimizer.param_groups[0]["lr"],
        **measured,
    }
