"""From a model's scores to a reward: micro-batches, precision, device, texts encoded once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from speedrl_lab.rewards import Reward
from speedrl_lab.trajectory import Trajectory

MICRO_BATCH = 32
"""Pictures that a reward model sees at once, to bound the memory."""

Score = Callable[[Tensor, Sequence[str]], Tensor]


def make_reward(score: Score, device: torch.device | str, record: str, half: bool = True) -> Reward:
    """A reward from `score(images float32 (b, 3, H, W) on `device`, prompts) -> (b,)`.

    Rewards come back float32 on the pictures' own device. On CUDA the network runs in float16 autocast
    where `half`, else and elsewhere in float32, whatever autocast surrounds the call. `record` says what
    scores: model, file and hash, preprocessing (`describe_rewards`).
    """
    device = torch.device(device)
    half = half and device.type == "cuda"

    @torch.no_grad()
    def reward(images: Tensor, prompts: Sequence[str], trajectory: Trajectory) -> Tensor:
        if len(images) != len(prompts):
            raise ValueError(f"got {len(prompts)} prompts for {len(images)} images; give one prompt an image")
        scores = []
        with torch.autocast(device.type, torch.float16 if half else None, enabled=half):
            for start in range(0, len(images), MICRO_BATCH):
                part = slice(start, start + MICRO_BATCH)
                scores.append(score(images[part].to(device, torch.float32), prompts[part]).float())
        return torch.cat(scores).to(images.device)

    reward.record = f"{record}; {'float16 autocast' if half else 'float32'}"
    return reward


def once_a_prompt(encode: Callable[[Sequence[str]], Tensor]) -> Callable[[Sequence[str]], Tensor]:
    """`encode` (texts to rows) that keeps the row of every text: a group asks for the same one many times."""
    known: dict[str, Tensor] = {}

    def rows(prompts: Sequence[str]) -> Tensor:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        if new:
            known.update(zip(new, encode(new).unbind(), strict=True))
        return torch.stack([known[prompt] for prompt in prompts])

    return rows


class ScoreHead(nn.Module):
    """Features to one number: five linear layers and no activation, as LAION's aesthetic predictor published it.

    ImageReward took it over. Its dropouts (layers 1, 3, 5) do nothing here but hold their numbers.
    """

    def __init__(self, width: int):
        super().__init__()
        gap = nn.Identity
        self.layers = nn.Sequential(
            nn.Linear(width, 1024), gap(), nn.Linear(1024, 128), gap(), nn.Linear(128, 64), gap(),
            nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        """Scores (B,) of features (B, width), in float32."""
        with torch.autocast(features.device.type, enabled=False):
            return self.layers(features.float())[:, 0]
