"""Rewards by name: plain functions (images, prompts, trajectory) -> float32 (B,), in raw units.

Weights, z-scores and filters live in `advantage`, never here.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from speedrl_lab.trajectory import Trajectory

Reward = Callable[[Tensor, Sequence[str], Trajectory], Tensor]
NAMES = ("clip", "coherence", "novelty", "detector", "speed")


def build_rewards(names: Sequence[str], device: torch.device | str = "cpu") -> dict[str, Reward]:
    """The named rewards; raises ValueError for an unknown name and says the nearest one."""
    from speedrl_lab.rewards import embedded, speed

    built: dict[str, Reward] = {}
    for name in names:
        match name:
            case "clip":
                built[name] = embedded.clip_reward(device)
            case "coherence":
                built[name] = embedded.coherence_reward(device)
            case "novelty":
                built[name] = embedded.novelty_reward(device)
            case "detector":
                built[name] = embedded.detector_reward(device)
            case "speed":
                built[name] = speed.speed_reward
            case _:
                from speedrl_lab.config import nearest

                raise ValueError(f"unknown reward {name!r}; nearest: {nearest(name, list(NAMES))!r}")
    return built
