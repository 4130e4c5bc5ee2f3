"""Checks before a training run, seconds each: the silent no-ops that released trainers were found to have."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor

from speedrl_lab.config import HEADED, TrainConfig
from speedrl_lab.generator import MaskedGenerator
from speedrl_lab.learner import Learner, weights_at
from speedrl_lab.likelihood import trajectory_log_prob
from speedrl_lab.objective import clipped_surrogate
from speedrl_lab.pace import head_for
from speedrl_lab.rewards import Reward
from speedrl_lab.rl import check, rollout, weigh
from speedrl_lab.trajectory import Trajectory


def selftest(
    generator: MaskedGenerator, config: TrainConfig, prompts: Sequence[str], rewards: Mapping[str, Reward]
) -> pd.DataFrame:
    """Run every check on a copy of the generator: a table name, value, passed; raises on a failure.

    Raises RuntimeError that names the failed checks; the generator itself is not touched.
    """
    check(generator, prompts, rewards, config)
    trial = generator.copy()
    if config.sampler.schedule in HEADED and trial.pace is None:
        trial.pace = head_for(config.sampler.schedule, config.seed).to(generator.device)
    small = replace(config, num_groups=min(4, config.num_groups), warmup_iterations=0)
    learner = Learner(trial, small)  # before the rollouts: it may round the weights
    # Where a CPU multiplies in bfloat16, passes with and without gradient round apart.
    rounded = config.policy_dtype == "bfloat16" or torch.get_float32_matmul_precision() == "medium"
    first = rollout(trial, prompts, rewards, small, iteration=0)
    # One prompt twice: other prompts would hide equal noise.
    once, again = (rollout(trial, prompts[:1], rewards, small, iteration) for iteration in (0, 1))
    advantages = weigh(first, config, weights_at(config, 0))
    with torch.no_grad():
        factor = config.order_factor
        replayed = trajectory_log_prob(trial, first.prompts, first.trajectory, config.sampler, order_factor=factor)
    stored = stored_log_prob(first.trajectory, factor)
    error = float((replayed - stored).abs().max() / stored.abs().max().clamp(min=1))
    started = learner.update(first, advantages)
    nudged = learner.update(first, advantages)
    planned = 2 * config.inner_epochs
    surrogate = clipped_surrogate(
        torch.tensor([1.0, -1.0]), torch.zeros(2), torch.tensor([1.0, -1.0]), config.clip_range
    )
    clipped = float(surrogate[2].float().mean())
    same = float((once.trajectory.tokens == again.trajectory.tokens).float().mean())
    spread = float(first.trajectory.forwards.float().std())
    if config.trained == "schedule":
        learner.finish()
        drift, ratio = _drift(trial, generator), nudged["ratio_deviation"]
        learns = [
            ("the network stays as it is (largest change of a weight)", drift, drift == 0),
            ("ratio is not 1 after an update (largest deviation)", ratio, ratio > 0),
        ]
    else:
        learns = [
            ("KL is 0 at the start (nats a token)", started["kl"], abs(started["kl"]) < 1e-4),
            ("KL is not 0 after an update", nudged["kl"], abs(nudged["kl"]) > 0),
        ]
    rows = [
        ("replay returns the stored log-probability (relative error)", error, error < (0.02 if rounded else 1e-4)),
        ("ratio is 1 before the first update (largest deviation)", started["ratio_deviation"],
         started["ratio_deviation"] < (0.3 if rounded else 1e-2)),
        *learns,
        ("the clip fires on forced ratios (share)", clipped, clipped == 1.0),
        ("optimizer steps beyond those planned", learner.optimizer_steps - planned, learner.optimizer_steps == planned),
        ("noise differs between iterations (share of equal tokens)", same, same < 1.0),
        ("some group has a signal (silent groups)", float(advantages.silent_groups),
         advantages.silent_groups < len(first.prompts) // config.group_size),
    ]  # fmt: skip
    if "speed" in advantages.effective_weights:
        rows.append(("passes vary, so that speed can act (std)", spread, spread > 0))
    table = pd.DataFrame(rows, columns=["name", "value", "passed"])
    failed = table[~table.passed]
    if len(failed):
        reasons = [f"{name} = {value:.3g}" for name, value in zip(failed.name, failed.value, strict=True)]
        raise RuntimeError(f"self-test failed: {'; '.join(reasons)}")
    return table


def _drift(trial: MaskedGenerator, generator: MaskedGenerator) -> float:
    """Largest difference between a weight of the two policies."""
    pairs = zip(trial.policy.parameters(), generator.policy.parameters(), strict=True)
    return max(float((left - right).detach().abs().max()) for left, right in pairs)


def stored_log_prob(trajectory: Trajectory, order_factor: str = "exact") -> Tensor:
    """Log-probability of each trajectory as it was recorded while drawing, (B,)."""
    if trajectory.proposals is not None and order_factor == "exact":
        total = trajectory.proposal_log_prob.sum((1, 2)) + trajectory.choice_log_prob.sum(1)
    elif trajectory.drafts is not None:
        total = trajectory.draft_log_prob.sum((1, 2))
    else:
        total = trajectory.log_prob.sum(1)
    return total if trajectory.pace is None else total + trajectory.pace_log_prob.sum(1)
