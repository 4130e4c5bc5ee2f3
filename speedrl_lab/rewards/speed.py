"""The speed reward: minus the share of the longest possible unmasking that a sample took."""

from collections.abc import Sequence

from torch import Tensor

from speedrl_lab.trajectory import Trajectory


def speed_reward(images: Tensor, prompts: Sequence[str], trajectory: Trajectory) -> Tensor:
    """-steps / N, float32 (B,), where N is the number of tokens (one a step is the slowest).

    The additive form; our interpretation, since the paper's formula is not public.
    """
    return -trajectory.steps.float() / trajectory.tokens.shape[1]
