"""What learns: policy, pace head, optimizer, reference, average; one rollout is one update.

The update scores the states that the likelihood's estimator names, in micro-batches, and takes
`inner_epochs` optimizer steps on clipped surrogate minus KL. With `trained="schedule"` the network is frozen:
only the pace head learns, from what it saw. Nothing here draws random numbers.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from speedrl_lab.adapters import adapter_off, add_lora, has_adapter
from speedrl_lab.advantage import Advantages, next_multiplier
from speedrl_lab.average import Average
from speedrl_lab.config import HEADED, SamplerConfig, TrainConfig
from speedrl_lab.generator import Cond, MaskedGenerator
from speedrl_lab.guard import Guard
from speedrl_lab.likelihood import Visit, scored_states, visit_choice, visit_logits
from speedrl_lab.objective import clipped_surrogate, entropy, kl_penalty
from speedrl_lab.precision import halve, make_whole
from speedrl_lab.schedules import piecewise_linear
from speedrl_lab.steering import check_change
from speedrl_lab.trajectory import Trajectory


@dataclass(frozen=True)
class Rollout:
    """P * G samples, group-major, with their pictures and raw rewards."""

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
        self.frozen = config.trained == "schedule"
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
    def _anchored(self) -> Iterator[MaskedGenerator]:
        """The reference: its own copy, or the policy with the adapter off."""
        with torch.no_grad():
            if self.adapted:
                with adapter_off(self.generator.policy):
                    yield self.generator
            else:
                yield self.reference

    def update(self, drawn: Rollout, advantages: Advantages) -> dict[str, float]:
        """Learn from one rollout: `inner_epochs` optimizer steps on surrogate minus KL.

        Loss a sample = - sum over the scored tokens of (clipped surrogate - kl weight * KL) / N, and minus
        the surrogate of its pace actions; averaged over the B samples. Samples that the filter dropped take
        no part. The numbers returned are means over scored tokens in the last epoch; `kl` and
        `ratio_deviation` are those of the first, before any step. Where the schedule alone is trained, the
        pace actions are the whole loss, and the numbers are means over them.
        """
        self.played = self._weights()  # what drew the rollout, and what its quality belongs to
        config = self.config
        warm_up = min(1.0, (self.iteration + 1) / max(1, config.warmup_iterations))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * min(warm_up, 1 - self.iteration / config.iterations)
        scored = None if self.frozen else self._scored(drawn)
        for epoch in range(config.inner_epochs):
            self.optimizer.zero_grad(set_to_none=True)
            if self.frozen:
                measured = self._backward_pace(drawn.trajectory, advantages.advantage)
            else:
                measured = self._backward(drawn.trajectory, *scored, advantages)
            clipped = self.generator.pace if self.frozen else self.generator.policy
            norm = nn.utils.clip_grad_norm_(clipped.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer_steps += 1
            if epoch == 0:
                first = {name: measured[name] for name in ("kl", "ratio_deviation")}
        if self.average is not None:
            self.average.update(self.generator.policy)
        measured["passes"] = self._passes(drawn.trajectory, scored)
        self.iteration += 1
        if config.speed_form == "lagrangian" and self._drawn_with(drawn.trajectory) == config.sampler:
            self.excess = float(drawn.trajectory.forwards.float().mean()) / config.target_steps - 1
            self.multiplier = next_multiplier(self.multiplier, self.excess, config.multiplier_rate)
        return {**measured, **first, "gradient_norm": float(norm)}

    def _scored(self, drawn: Rollout) -> tuple[Cond, list[Visit], list[Tensor | None]]:
        """Encoded prompts, states to score, and the log-probabilities (R,) that ratios compare with."""
        config, cond = self.config, self.generator.encode(drawn.prompts)
        states = list(
            scored_states(
                drawn.trajectory, config.estimator, config.order_factor,
                seed=config.seed * 1_000_003 + self.iteration, batch_size=config.micro_batch_size,
            )
        )  # fmt: skip
        stored = [visit.stored for visit in states]
        if config.inner_epochs > 1 and any(old is None for old in stored):
            with torch.no_grad():
                stored = [self._chosen(visit, cond, drawn.trajectory)[0] for visit in states]
        return cond, states, stored

    def _drawn_with(self, trajectory: Trajectory) -> SamplerConfig:
        """The settings of a rollout: the run's, but for a practised number of steps."""
        return trajectory.sampler or self.config.sampler

    def _passes(self, trajectory: Trajectory, scored: tuple | None) -> int:
        """Forward passes of all networks in this iteration, a backward pass counted as two; rewards left out."""
        total = int(trajectory.forwards.sum())
        if scored is not None:
            guided = 1 if self._drawn_with(trajectory).guidance_scale == 1.0 else 2
            states = guided * sum(len(visit.samples) for visit in scored[1])
            if self._drawn_with(trajectory).schedule == "adaptive":  # some rows of a state are guided
                scales = [self.generator.pace.decode(visit.pace, 1)[2] for visit in scored[1]]
                states += sum(int((scale != 1).sum()) for scale in scales)
            total += self.config.inner_epochs * 4 * states  # policy forward and backward, reference
        return total

    def _chosen(self, visit: Visit, cond: Cond, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the scored tokens (R,) and of all codes there (R, V)."""
        log_probs = visit_logits(self.generator, visit, cond, self._drawn_with(trajectory))
        return log_probs.gather(1, visit.codes[:, None]).squeeze(1), log_probs

    def _backward(
        self,
        trajectory: Trajectory,
        cond: Cond,
        states: list[Visit],
        stored: list[Tensor | None],
        advantages: Advantages,
    ) -> dict[str, float]:
        """Accumulate gradients over the scored states; returns means over tokens."""
        config, kl_weight = self.config, self.weights.kl
        advantage, kept = advantages.advantage, advantages.kept.float()
        scale = trajectory.tokens.numel()  # B * N
        totals = dict.fromkeys(("kl", "entropy", "clip_fraction", "approx_kl", "ratio"), 0.0)
        scored, lowest, highest = 0, 1.0, 1.0
        for visit, old in zip(states, stored, strict=True):
            chosen, log_probs = self._chosen(visit, cond, trajectory)  # (R,), (R, V)
            with self._anchored() as reference:
                anchor = visit_logits(reference, visit, cond, self._drawn_with(trajectory))
            old = chosen.detach() if old is None else old
            value, ratio, clipped = clipped_surrogate(chosen, old, advantage[visit.owners], config.clip_range)
            kl = kl_penalty(log_probs, anchor, visit.codes, config.kl_estimator)
            loss = -((value - kl_weight * kl) * kept[visit.owners]).sum() * visit.weight
            if visit.picks is not None:
                loss = loss - self._choice_value(trajectory, visit, chosen, advantage).sum()
            (loss / scale).backward()
            ratio = ratio.detach()
            scored += len(ratio)
            lowest, highest = min(lowest, float(ratio.min())), max(highest, float(ratio.max()))
            totals["kl"] += float(kl.detach().sum())
            totals["entropy"] += float(entropy(log_probs.detach()).sum())
            totals["clip_fraction"] += float(clipped.sum())
            totals["approx_kl"] += float((old - chosen.detach()).sum())
            totals["ratio"] += float(ratio.sum())
        measured = {name: total / scored for name, total in totals.items()}
        measured |= {"ratio_min": lowest, "ratio_max": highest, "ratio_deviation": max(1 - lowest, highest - 1)}
        if trajectory.pace is not None:
            measured["pace_entropy"] = self._backward_pace(trajectory, advantage)["pace_entropy"]
        return measured

    def _choice_value(self, trajectory: Trajectory, visit: Visit, chosen: Tensor, advantage: Tensor) -> Tensor:
        """Surrogate (S,) of the confidence order's choice in a visit: one action a step."""
        old = trajectory.choice_log_prob[visit.samples, visit.step]
        return clipped_surrogate(
            visit_choice(visit, chosen), old, advantage[visit.samples], self.config.clip_range
        )[0]  # fmt: skip

    def _backward_pace(self, trajectory: Trajectory, advantage: Tensor) -> dict[str, float]:
        """Gradient of the pace head from stored features; the path through the network is left out.

        Returns the numbers of `_backward` as means over actions; `entropy` is that of the tokens, estimated
        from those that were drawn.
        """
        acted = trajectory.pace >= 0  # (B, T)
        log_probs = self.generator.pace(trajectory.pace_features[acted])  # (A, K)
        chosen = log_probs.gather(1, trajectory.pace[acted][:, None]).squeeze(1)
        owner = acted.nonzero()[:, 0]
        old = trajectory.pace_log_prob[acted]
        value, ratio, clipped = clipped_surrogate(chosen, old, advantage[owner], self.config.clip_range)
        (-value.sum() / len(trajectory)).backward()
        if not len(owner):  # one step: nothing was chosen
            return {"pace_entropy": 0.0}
        ratio = ratio.detach()
        lowest, highest = min(1.0, float(ratio.min())), max(1.0, float(ratio.max()))
        return {
            "kl": 0.0,  # the network is what it was
            "entropy": -float(trajectory.log_prob.mean()),
            "clip_fraction": float(clipped.float().mean()),
            "approx_kl": float((old - chosen.detach()).mean()),
            "ratio": float(ratio.mean()),
            "ratio_min": lowest,
            "ratio_max": highest,
            "ratio_deviation": max(1 - lowest, highest - 1),
            "pace_entropy": float(entropy(log_probs.detach()).mean()),
        }

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
        """Go on from a checkpoint made by `state`."""
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
