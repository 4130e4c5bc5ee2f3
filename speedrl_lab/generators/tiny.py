"""The exact generator: a real masked transformer, small enough that every trajectory can be enumerated.

A few tokens of a few codes, drawn as gray squares, from the captions of EmojiScenes. Its weights are
random numbers from a seed: it paints nothing, but every expectation over its samples is a finite sum.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from speedrl_lab import scenes
from speedrl_lab.generators.captioned import CaptionedGenerator
from speedrl_lab.networks import MaskedTransformer
from speedrl_lab.pace import PaceHead
from speedrl_lab.weights import load_pace, load_weights, read_metadata

PATCH = 4  # pixels along a token


class TinyGenerator(CaptionedGenerator):
    """A masked transformer behind the generator contract; code c of V is a square of brightness c/(V-1)."""

    def __init__(self, policy: MaskedTransformer, pace: PaceHead | None = None):
        super().__init__("tiny", policy, pace, PATCH)

    def decode(self, tokens: Tensor) -> Tensor:
        """Gray squares of PATCH pixels."""
        self.require_codes(tokens)
        gray = (tokens.float() / (self.spec.codebook_size - 1)).unflatten(1, self.spec.grid)  # (B, h, w)
        squares = gray.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)  # (B, H, W)
        return squares[:, None].repeat(1, 3, 1, 1)

    def tokenize(self, images: Tensor) -> Tensor:
        """The nearest brightness of each square."""
        gray = nn.functional.avg_pool2d(images.to(self.device).mean(1, keepdim=True), PATCH)  # (B, 1, h, w)
        return (gray.flatten(1) * (self.spec.codebook_size - 1)).round().long()


def make_tiny(grid: tuple[int, int] = (2, 2), codes: int = 3, seed: int = 0) -> TinyGenerator:
    """A tiny generator with random weights and a pace head that is not indifferent.

    Raises ValueError for fewer than two codes.
    """
    if codes < 2:
        raise ValueError(f"codes={codes}: expected at least 2")
    with torch.random.fork_rng(devices=[]):  # constructors draw from the global generator
        policy = MaskedTransformer(grid, (codes,), len(scenes.WORDS), scenes.MAX_WORDS, width=16, depth=1, heads=2)
        pace = PaceHead(width=8)
    rng = torch.Generator().manual_seed(seed)
    return TinyGenerator(_scatter(policy, 0.4, rng).eval(), _scatter(pace, 0.7, rng))


@torch.no_grad()
def _scatter(module: nn.Module, std: float, rng: torch.Generator) -> nn.Module:
    """Fill every parameter with normal numbers, the scales of norms around 1."""
    for name, parameter in module.named_parameters():
        is_norm_scale = parameter.ndim == 1 and name.endswith("weight")
        parameter.copy_(is_norm_scale + torch.randn(parameter.shape, generator=rng) * std)
    return module


def load_tiny(device: torch.device, policy: Path | str | None = None) -> TinyGenerator:
    """The generator of seed 0, or the one in a file written by `save_policy`."""
    generator = make_tiny() if policy is None else TinyGenerator(
        load_weights(policy, "MaskedTransformer"), load_pace(policy)
    )  # fmt: skip
    generator.revises = policy is not None and "revises" in read_metadata(policy)
    generator.policy.to(device)
    if generator.pace is not None:
        generator.pace.to(device)
    return generator
