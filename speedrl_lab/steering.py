"""Weights that are changed while a run goes on: which can be, and what may be asked for."""

import math
from collections.abc import Callable, Mapping

from speedrl_lab.config import VARYING, TrainConfig, nearest

Steer = Callable[[int], Mapping[str, float]]
"""From the number of the coming iteration (from 1) to the weights that change with it; usually none."""


def changeable(config: TrainConfig) -> list[str]:
    """Names of the weights that act in this run: its quality rewards, `speed` and `kl`.

    Speed is left out where every sample of a group takes as many steps, where chance draws the steps, and
    where a Lagrangian multiplier moves by itself.
    """
    acts = config.sampler.schedule in VARYING and config.speed_form != "lagrangian"
    drawn = config.sampler.schedule == "random_budget" and config.speed_form != "multiplicative"
    speed = ["speed"] if acts and not drawn else []
    return [*config.quality_weights, *speed, *(["kl"] if config.trained == "policy" else [])]


def check_change(config: TrainConfig, name: str, weight: float) -> None:
    """Raise ValueError in one line for a weight that cannot be changed, or not to that value."""
    known = changeable(config)
    if name not in known:
        raise ValueError(
            f"weight {name!r} cannot be changed in this run; nearest: {nearest(name, known)!r} "
            f"(one of {', '.join(known)})"
        )
    if type(weight) not in (int, float) or not math.isfinite(weight) or (name == "kl" and weight < 0):
        least = " of at least 0" if name == "kl" else ""
        raise ValueError(f"weight {name}={weight!r}: expected a finite number{least}")
