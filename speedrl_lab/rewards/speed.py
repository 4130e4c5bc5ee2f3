"""The speed reward: minus the forward passes of a sample, as a share of one pass a token."""

from collections.abc import Sequence

from torch import Tensor

from speedrl_lab.trajectory import Trajectory


def speed_reward(images: Tensor, prompts: Sequence[str], trajectory: Trajectory) -> Tensor:
    """-forwards / N, float32 (B,), where N is the number of tokens; without guidance, a step is one pass.

    The additive form; our interpretation, since the paper's formula is not public.
    """
    return -trajectory.forwards.float() / trajectory.tokens.shape[1]
