"""Pure functions: rewards of groups into advantages.

Rows are group-major: sample j of prompt i is row i * group_size + j. Nothing here knows a config.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

MIN_STD = 1e-4
"""Spreads below this count as none: dividing by them would blow up rounding noise."""
SPEED_FORMS = ("additive", "multiplicative", "hinge", "lagrangian")


@dataclass(frozen=True)
class Advantages:
    """What a batch of rewards says: `advantage` (B,), `kept` bool (B,), and how it came about."""

    advantage: Tensor
    kept: Tensor
    """False for samples that the filter dropped, and for those that no quality reward could score."""
    quality: Tensor
    """Weighted sum of the z-scored quality rewards, (B,); 0 where none could score."""
    effective_weights: dict[str, float]
    """Correlation of the advantage with each reward, over the samples that it scored."""
    silent_groups: int
    """Groups whose weighted rewards do not differ: no signal."""
    silent_rewards: tuple[str, ...]
    """Rewards that do not vary inside any group, so that they cannot act."""
    masked: dict[str, int] = field(default_factory=dict)
    """How many samples each reward could not score (NaN)."""


def group_centered(values: Tensor, group_size: int) -> Tensor:
    """Values (B,) minus the mean of their group; NaN takes no part in the mean and becomes 0."""
    groups = values.unflatten(0, (-1, group_size))  # (P, G)
    centered = (groups - groups.nanmean(1, keepdim=True)).flatten()
    return centered.where(~values.isnan(), 0.0)


def comparable(values: Tensor, group_size: int) -> Tensor:
    """Where values (B,) can be compared: not NaN, and not the only such one of its group; bool (B,)."""
    known = ~values.isnan().unflatten(0, (-1, group_size))  # (P, G)
    return (known & (known.sum(1, keepdim=True) > 1)).flatten()


def z_score(values: Tensor, group_size: int, least_std: float = 0.0) -> Tensor:
    """Centre in the group, divide by the within-group standard deviation pooled over the batch.

    Pooling keeps groups in which all samples are nearly alike from being blown up to full size; so does
    `least_std` for a reward whose natural unit is known: a smaller spread is divided by it.
    NaN scores 0 and takes no part in mean and deviation; nor does the only value of a group.
    """
    centered = group_centered(values, group_size)
    std = _deviation(centered, comparable(values, group_size))
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
    speed_form: str = "additive",
    quality_floor: Mapping[str, float] | None = None,
    slowest: float = 1.0,
) -> Advantages:
    """Turn raw rewards (each (B,)) into advantages (Speed-RL, arXiv 2512.01094; the formula is ours).

    Each quality reward is z-scored in its group, weighted and summed; speed joins; the group's mean is
    taken off, and the rest divided by its global or group standard deviation, or by nothing. Samples
    whose quality lies below `filter_quantile` of their group cannot be rewarded (`clip`: advantage at
    most 0, however fast they are), or leave the update (`drop`). A NaN reward says nothing about its
    sample (`z_score`); a sample about which every quality reward says nothing leaves the update.

    The raw speed reward is - steps / N, and `step_reward` what one step is worth in it. `speed_form`:
    - additive: quality + speed_weight * z(speed). Once nearly all samples take equally many steps, a step
      costs `speed_weight` and not ever more.
    - multiplicative: 4 sigmoid(quality) * (share of the steps saved) ** speed_weight (`speed_factor`):
      fast but wrong earns nothing. The form for text is r * factor with r >= 0; our quality has either
      sign, so a sigmoid stands for r, times 4 so that its slope at 0 is 1. `slowest` is the most steps
      there can be, as a share of N.
    - hinge: as additive, but speed counts only where every reward named in `quality_floor` reaches its
      least raw value (`speed_score`).
    - lagrangian: additive with the multiplier as `speed_weight`; `next_multiplier` moves it.
    Raises ValueError for an unknown option, a hinge without a floor, or more steps than `slowest`.
    """
    if speed_form not in SPEED_FORMS:
        raise ValueError(f"speed_form={speed_form!r}: expected one of {', '.join(SPEED_FORMS)}")
    scores = {name: z_score(rewards[name], group_size) for name in quality_weights}
    unscored = torch.stack([rewards[name].isnan() for name in quality_weights]).all(0)
    quality = torch.stack([weight * scores[name] for name, weight in quality_weights.items()]).sum(0)
    quality = quality.masked_fill(unscored, torch.nan)
    total = 4 * quality.sigmoid() if speed_form == "multiplicative" else quality
    if speed_weight:
        speed = rewards["speed"].masked_fill(unscored, torch.nan)
        counts = reaches(rewards, quality_floor) if speed_form == "hinge" else None
        scores["speed"] = speed_score(speed, group_size, step_reward, counts)
        if speed_form == "multiplicative":
            total = total * speed_factor(speed, step_reward, slowest) ** speed_weight
        else:
            total = total + speed_weight * scores["speed"]
    scored = ~total.isnan()
    centered = group_centered(total, group_size)
    advantage = normalized(centered, comparable(total, group_size), group_size, std)
    kept = scored
    if low_quality != "off" and filter_quantile > 0:
        poor = below_quantile(quality, group_size, filter_quantile)
        advantage = advantage.where(~poor, 0.0 if low_quality == "drop" else advantage.clamp(max=0))
        kept = scored & ~poor if low_quality == "drop" else scored
    seen = {name: scored & ~rewards[name].isnan() for name in scores}
    return Advantages(
        advantage=advantage,
        kept=kept,
        quality=quality.masked_fill(unscored, 0.0),
        effective_weights={name: correlation(advantage[seen[name]], scores[name][seen[name]]) for name in scores},
        silent_groups=int((centered.unflatten(0, (-1, group_size)).abs().amax(1) < MIN_STD).sum()),
        silent_rewards=tuple(name for name, score in scores.items() if not score.any()),
        masked={name: int(value.isnan().sum()) for name, value in rewards.items()},
    )


def reaches(rewards: Mapping[str, Tensor], floor: Mapping[str, float] | None) -> Tensor:
    """Where every reward named in `floor` is at least its value there; bool (B,). NaN reaches nothing."""
    if not floor:
        raise ValueError("quality_floor={}: speed_form='hinge' needs at least one reward and its least raw value")
    missing = [name for name in floor if name not in rewards]
    if missing:
        raise ValueError(f"quality_floor names {missing[0]!r}: expected one of {', '.join(rewards)}")
    return torch.stack([rewards[name] >= least for name, least in floor.items()]).all(0)


def speed_score(speed: Tensor, group_size: int, step_reward: float, counts: Tensor | None = None) -> Tensor:
    """The z-scored speed (B,); with `counts` (bool) among the samples that count alone.

    Samples that do not count score as the slowest of their group that does. With 0, the mean, a slow good
    sample would gain by falling below the floor; so none does, and how fast a bad one is never matters.
    """
    if counts is None:
        return z_score(speed, group_size, step_reward)
    score = z_score(speed.masked_fill(~counts, torch.nan), group_size, step_reward)
    lowest = score.unflatten(0, (-1, group_size)).amin(1, keepdim=True)  # (P, 1): <= 0, as scores sum to 0
    return score.where(counts, lowest.expand(-1, group_size).flatten())


def speed_factor(speed: Tensor, step_reward: float, slowest: float) -> Tensor:
    """(T_max - steps + 1) / T_max, in (0, 1]: 1 for one step; (B,). `slowest` is T_max as a share of N.

    Raises ValueError where a sample took more steps (half a step is left to rounding).
    """
    drawn = float((-speed).nan_to_num(0.0).amax())
    if drawn > slowest + step_reward / 2:
        raise ValueError(f"slowest={slowest:g}: a sample took {drawn:g} of N steps; expected at least that")
    return ((slowest + speed + step_reward) / slowest).clamp(0, 1)


def next_multiplier(multiplier: float, excess: float, rate: float) -> float:
    """Dual ascent: the multiplier rises by `rate` times the relative excess of steps, mean / target - 1.

    The weight of speed is multiplier + excess: the second, proportional part damps the swings of the first
    (Stooke et al., arXiv 2007.03964). The target is held from both sides, so both may turn negative.
    """
    return multiplier + rate * excess


def normalized(centered: Tensor, compared: Tensor, group_size: int, std: str) -> Tensor:
    """Values (B,) over their `global` or `group` deviation among those compared, or as they are (`none`)."""
    match std:
        case "global":
            return centered / _deviation(centered, compared).clamp(min=MIN_STD)
        case "group":
            groups, parts = (values.unflatten(0, (-1, group_size)) for values in (centered, compared))  # (P, G)
            return (groups / _deviation(groups, parts, 1).clamp(min=MIN_STD)).flatten()
        case "none":
            return centered
        case _:
            raise ValueError(f"std={std!r}: expected 'global', 'group' or 'none'")


def below_quantile(quality: Tensor, group_size: int, quantile: float) -> Tensor:
    """Where quality (B,) lies below that quantile of its group; bool (B,). NaN is left out."""
    groups = quality.unflatten(0, (-1, group_size))  # (P, G)
    return (groups < groups.nanquantile(quantile, dim=1, keepdim=True)).flatten()


def _deviation(centered: Tensor, compared: Tensor, dim: int = 0) -> Tensor:
    """Root mean square along `dim` (kept, of size 1) of values of which those not compared are 0."""
    return (centered.square().sum(dim, keepdim=True) / compared.sum(dim, keepdim=True).clamp(min=1)).sqrt()


def correlation(left: Tensor, right: Tensor) -> float:
    """Pearson correlation of two vectors; 0 where one is constant."""
    left, right = left - left.mean(), right - right.mean()
    norm = (left.square().sum() * right.square().sum()).sqrt()
    return float((left * right).sum() / norm) if norm > 0 else 0.0
