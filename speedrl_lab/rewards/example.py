"""A reward of one's own, as an example: copy it, change it, give it a name in `rewards`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from speedrl_lab.trajectory import Trajectory


def colorfulness(images: Tensor, prompts: Sequence[str], trajectory: Trajectory) -> Tensor:
    """How colourful each picture is, float32 (B,); gray is 0 (Hasler and Suesstrunk 2003)."""
    red, green, blue = images.flatten(2).unbind(1)  # (B, H * W) each, in [0, 1]
    opponents = torch.stack([red - green, (red + green) / 2 - blue])  # (2, B, H * W)
    spread = opponents.std(2, correction=0).norm(dim=0)  # (B,)
    return spread + 0.3 * opponents.mean(2).norm(dim=0)
