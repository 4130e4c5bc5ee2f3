"""What learns: policy, pace head, optimizer, reference, average; one rollout is one update.

The update takes `inner_epochs` optimizer steps on the loss of a rollout. With `trained="schedule"` the network is
frozen: only the pace head learns, from what it saw. Nothing here draws random numbers. Where several processes train
together, each has a learner of its own, and they stay equal: the same gradients, the same records.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from speedrl_lab import parallel
from speedrl_lab.adapters import adapter_off, add_lora, has_adapter
from speedrl_lab.advantage import Advantages, next_multiplier
from speedrl_lab.allocator import keep_memory
from speedrl_lab.average import Average
from speedrl_lab.config import HEADED, TrainConfig
from speedrl_lab.generator import MaskedGenerator
from speedrl_lab.guard import Guard
from speedrl_lab.loss import RolloutLoss, backward_pace
from speedrl_lab.planner import largest_micro_batch
from speedrl_lab.precision import halve, make_whole
from speedrl_lab.schedules import piecewise_linear
from speedrl_lab.steering import check_change
from speedrl_lab.trajectory import Trajectory


@dataclass(frozen=True)
class Rollout:
    """P * G samples, group-major, with their pictures and raw rewards.

    Where several processes train together, `prompts`, `trajectory` and `images` are those of this one's groups;
    `rewards` are those of all, in order of rank.
    """

    prompts: list[str]
    trajectory: Trajectory
    images: Tensor
    rewards: dict[str, Tensor]


@dataclass(frozen=True)
class Weights:
    """The nominal weights of one iteration."""

    quality: dict[str, float]
    speed: float
    kl: float


def weights_at(
    config: TrainConfig,
    iteration: int,
    multiplier: float | None = None,
    changed: Mapping[str, tuple[int, float]] = MappingProxyType({}),
) -> Weights:
    """Weights at an iteration (from 0): constant, as `weight_schedules` says, or a Lagrangian multiplier.

    Those `changed` while the run went on, name -> (iteration from 1, weight), come before all of these.
    """

    def at(name: str, constant: float) -> float:
        if name in changed:
            return changed[name][1]
        points = config.weight_schedules.get(name)
        return constant if points is None else piecewise_linear(points, iteration)

    speed = multiplier if multiplier is not None and config.speed_form == "lagrangian" else config.speed_weight
    quality = {name: at(name, weight) for name, weight in config.quality_weights.items()}
    return Weights(quality, at("speed", speed), at("kl", config.kl_weight))


class Learner:
    """What changes during training: weights, optimizer, counters, guard; all of it in `state`."""

    def __init__(self, generator: MaskedGenerator, config: TrainConfig):
        self.generator, self.config, self.guard = generator, config, Guard(config)
        if generator.device.type == "cpu":
            keep_memory()
        self.frozen = config.trained == "schedule"
        self.micro_batch_size = config.micro_batch_size or self._fitting()
        if config.lora_rank and not has_adapter(generator.policy):
            add_lora(generator, config.lora_rank, seed=config.seed)
        if config.gradient_checkpointing:
            generator.enable_gradient_checkpointing()
        self.originals = halve(generator.policy) if config.policy_dtype == "bfloat16" else None
        self.adapted = has_adapter(generator.policy)
        self.reference = generator if self.frozen else None if self.adapted else generator.copy()
        self.modules: dict[str, nn.Module] = {} if self.frozen else {"policy": generator.policy}
        groups = [{"params": _trainable(module), "lr": config.learning_rate} for module in self.modules.values()]
        if config.sampler.schedule in HEADED:
            self.modules["pace"] = generator.pace
            groups.append({"params": list(generator.pace.parameters()), "lr": config.pace_learning_rate})
        self.optimizer = torch.optim.Adam(groups)
        self.rates = [group["lr"] for group in groups]
        self.average = Average(generator.policy, config.ema_decay) if config.ema_decay else None
        self.iteration = self.optimizer_steps = 0
        self.multiplier, self.excess = config.speed_weight, 0.0  # of the Lagrangian speed form
        self.changed: dict[str, tuple[int, float]] = {}  # weights: from which iteration, to what
        self.best = self.played = self._weights()

    def _fitting(self) -> int:
        """Rows of a micro-batch that fit into memory beside what is there already."""
        mine = replace(self.config, num_groups=max(1, self.config.num_groups // parallel.world_size()))
        return 1 if self.frozen else largest_micro_batch(self.generator, mine)

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        """Copies of all that is trained."""
        return {
            name: {key: value.detach().clone() for key, value in module.named_parameters() if value.requires_grad}
            for name, module in self.modules.items()
        }

    @torch.no_grad()
    def _load(self, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name, module in self.modules.items():
            parameters = dict(module.named_parameters())
            for key, value in weights[name].items():
                parameters[key].copy_(value)

    @property
    def weights(self) -> Weights:
        """The nominal weights of the coming update."""
        return weights_at(self.config, self.iteration, self.multiplier + self.excess, self.changed)

    def change(self, weights: Mapping[str, float]) -> None:
        """Put other weights in force from the coming update on; ValueError for one that cannot be changed."""
        for name, weight in weights.items():
            check_change(self.config, name, weight)
        self.changed = self.changed | {name: (self.iteration + 1, float(weight)) for name, weight in weights.items()}

    @contextmanager
    def anchored(self) -> Iterator[MaskedGenerator]:
        """The reference: its own copy, or the policy with the adapter off."""
        with torch.no_grad():
            if self.adapted:
                with adapter_off(self.generator.policy):
                    yield self.generator
            else:
                yield self.reference

    def update(self, drawn: Rollout, advantages: Advantages) -> dict[str, float]:
        """Learn from one rollout: `inner_epochs` optimizer steps on its loss (`RolloutLoss`).

        The numbers returned are means over scored tokens in the last epoch, `passes` a sum; `kl` and
        `ratio_deviation` are those of the first, before any step. Where the schedule alone is trained, the
        pace actions are the whole loss, and the numbers are means over them.
        """
        self.played = self._weights()  # what drew the rollout, and what its quality belongs to
        config, trajectory = self.config, drawn.trajectory
        self._set_rates()
        advantage, kept = parallel.own(advantages.advantage), parallel.own(advantages.kept)
        loss = None if self.frozen else self._loss(drawn)
        for epoch in range(config.inner_epochs):
            self.optimizer.zero_grad(set_to_none=True)
            if self.frozen:
                measured = backward_pace(self.generator, trajectory, advantage, config.clip_range)
            else:
                measured = loss.backward(advantage, kept, self.weights.kl)
            for module in self.modules.values():
                parallel.sum_gradients(_trainable(module))
            clipped = self.generator.pace if self.frozen else self.generator.policy
            norm = nn.utils.clip_grad_norm_(clipped.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer_steps += 1
            if epoch == 0:
                first = {name: measured[name] for name in ("kl", "ratio_deviation")}
        if self.average is not None:
            self.average.update(self.generator.policy)
        self._move_multiplier(trajectory)
        self.iteration += 1
        passes = int(trajectory.forwards.sum()) + (0 if loss is None else loss.passes())
        measured["passes"] = int(parallel.total(torch.tensor(passes)))
        return {**measured, **first, "gradient_norm": float(norm)}

    def _set_rates(self) -> None:
        """Learning rates of the coming update."""
        warm_up = min(1.0, (self.iteration + 1) / max(1, self.config.warmup_iterations))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * min(warm_up, 1 - self.iteration / self.config.iterations)

    def _loss(self, drawn: Rollout) -> RolloutLoss:
        seed = self.config.seed * 1_000_003 + self.iteration
        return RolloutLoss(
            self.generator, self.anchored, self.config, drawn.prompts, drawn.trajectory, seed, self.micro_batch_size
        )

    def _move_multiplier(self, trajectory: Trajectory) -> None:
        """The Lagrangian speed form's, by the passes of a rollout of the run's own settings."""
        config = self.config
        if config.speed_form == "lagrangian" and trajectory.sampler in (None, config.sampler):
            spent = parallel.mean(float(trajectory.forwards.float().mean()))
            self.excess = spent / config.target_steps - 1
            self.multiplier = next_multiplier(self.multiplier, self.excess, config.multiplier_rate)

    def watch(self, record: Mapping[str, Any]) -> list[str]:
        """The guard's warnings; remembers the weights that drew the best rollout."""
        warnings = self.guard.watch(record)
        if self.guard.at_best:
            self.best = self.played
        return warnings

    def finish(self) -> None:
        """Leave the weights that are the result, in full precision: the best after a collapse, the average where
        one is kept."""
        if self.guard.collapsed:
            self._load(self.best)
        elif self.average is not None:
            self.average.copy_to(self.generator.policy)
        if self.originals is not None:
            make_whole(self.generator.policy, self.originals)

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint needs; random numbers depend on the iteration alone."""
        return {
            "world_size": parallel.world_size(),
            "micro_batch_size": self.micro_batch_size,
            "iteration": self.iteration,
            "optimizer_steps": self.optimizer_steps,
            "multiplier": self.multiplier,
            "excess": self.excess,
            "changed": self.changed,
            "guard": self.guard.state(),
            "best": self.best,
            "modules": self._weights(),
            "reference": self._reference_state(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def _reference_state(self) -> dict[str, Tensor]:
        """The reference's weights, which a frozen network is itself; with an adapter, the weights below it. Full
        precision where that is kept."""
        if self.originals is not None:
            return dict(self.originals)
        if self.reference is not None:
            return deepcopy(self.reference.policy.state_dict())
        policy = self.generator.policy
        return {key: value.detach().clone() for key, value in policy.named_parameters() if not value.requires_grad}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint made by `state`; ValueError where another number of processes made it."""
        before, now = state.get("world_size", 1), parallel.world_size()
        if before != now:
            raise ValueError(
                f"the run was started with {_processes(before)}, now {now}; launch {_processes(before)}, or choose "
                "another run name"
            )
        if self.config.micro_batch_size == 0:  # what fitted then, or sums would be rounded in another way
            self.micro_batch_size = state["micro_batch_size"]
        self._load(state["modules"])
        if self.originals is not None:
            self.originals = {name: value.cpu() for name, value in state["reference"].items()}
        reference = self.generator.policy if self.reference is None else self.reference.policy
        whole = self.reference is not None and self.originals is None
        reference.load_state_dict(state["reference"], strict=whole)
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.guard.restore(state["guard"])
        self.iteration, self.optimizer_steps = state["iteration"], state["optimizer_steps"]
        self.multiplier, self.excess, self.best = state["multiplier"], state["excess"], state["best"]
        self.changed = state.get("changed", {})  # of older checkpoints: none


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _processes(count: int) -> str:
    return f"{count} process{'es' if count > 1 else ''}"
