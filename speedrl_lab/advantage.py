"""Pure functions: rewards of groups into advantages.

Rows are group-major: sample j of prompt i is row i * group_size + j. Nothing here knows a config.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_STD = 1e-4
"""Spreads below this count as none: dividing by them would blow up rounding noise."""


@dataclass(frozen=True)
class Advantages:
    """What a batch of rewards says: `advantage` (B,), `kept` bool (B,), and how it came about."""

    advantage: Tensor
    kept: Tensor
    """False for samples that the filter dropped."""
    quality: Tensor
    """Weighted sum of the z-scored quality rewards, (B,)."""
    effective_weights: dict[str, float]
    """Correlation of the advantage with each reward."""
    silent_groups: int
    """Groups whose weighted rewards do not differ: no signal."""
    silent_rewards: tuple[str, ...]
    """Rewards that do not vary inside any group, so that they cannot act."""


def group_centered(values: Tensor, group_size: int) -> Tensor:
    """Values (B,) minus the mean of their group."""
    groups = values.unflatten(0, (-1, group_size))  # (P, G)
    return (groups - groups.mean(1, keepdim=True)).flatten()


def z_score(values: Tensor, group_size: int, least_std: float = 0.0) -> Tensor:
    """Centre in the group, divide by the within-group standard deviation pooled over the batch.

    Pooling keeps groups in which all samples are nearly alike from being blown up to full size; so does
    `least_std` for a reward whose natural unit is known: a smaller spread is divided by it.
    """
    centered = group_centered(values, group_size)
    std = centered.square().mean().sqrt()
    return centered / std.clamp(min=least_std) if std > MIN_STD else torch.zeros_like(centered)


def combine(
    rewards: Mapping[str, Tensor],
    quality_weights: Mapping[str, float],
    speed_weight: float,
    group_size: int,
    std: str = "global",
    filter_quantile: float = 0.0,
    low_quality: str = "off",
    step_reward: float = 0.0,
) -> Advantages:
    """Turn raw rewards (each (B,)) into advantages (Speed-RL, arXiv 2512.01094; the formula is ours).

    Each reward is z-scored in its group, weighted and summed; the sum is divided by its global or group
    standard deviation, or by nothing. Samples whose quality lies below `filter_quantile` of their group
    cannot be rewarded (`clip`: advantage at most 0, however fast they are), or leave the update (`drop`).
    `step_reward` is what one step is worth in the raw speed reward: once nearly all samples take equally
    many steps, a step costs `speed_weight` and not ever more.
    """
    scores = {name: z_score(rewards[name], group_size) for name in quality_weights}
    quality = torch.stack([weight * scores[name] for name, weight in quality_weights.items()]).sum(0)
    total = quality
    if speed_weight:
        scores["speed"] = z_score(rewards["speed"], group_size, step_reward)
        total = quality + speed_weight * scores["speed"]
    total = group_centered(total, group_size)
    groups = total.unflatten(0, (-1, group_size))  # (P, G)
    match std:
        case "global":
            advantage = total / total.square().mean().sqrt().clamp(min=MIN_STD)
        case "group":
            advantage = (groups / groups.square().mean(1, keepdim=True).sqrt().clamp(min=MIN_STD)).flatten()
        case "none":
            advantage = total
        case _:
            raise ValueError(f"std={std!r}: expected 'global', 'group' or 'none'")
    kept = torch.ones_like(advantage, dtype=torch.bool)
    if low_quality != "off" and filter_quantile > 0:
        by_group = quality.unflatten(0, (-1, group_size))
        poor = (by_group < by_group.quantile(filter_quantile, dim=1, keepdim=True)).flatten()
        if low_quality == "drop":
            kept = ~poor
            advantage = advantage * kept
        else:
            advantage = torch.where(poor, advantage.clamp(max=0), advantage)
    return Advantages(
        advantage=advantage,
        kept=kept,
        quality=quality,
        effective_weights={name: correlation(advantage, score) for name, score in scores.items()},
        silent_groups=int((groups.abs().amax(1) < MIN_STD).sum()),
        silent_rewards=tuple(name for name, score in scores.items() if not score.any()),
    )


def correlation(left: Tensor, right: Tensor) -> float:
    """Pearson correlation of two vectors; 0 where one is constant."""
    left, right = left - left.mean(), right - right.mean()
    norm = (left.square().sum() * right.square().sum()).sqrt()
    return float((left * right).sum() / norm) if norm > 0 else 0.0
