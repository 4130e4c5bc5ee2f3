"""The embedded generator: MaskedTransformer and FSQ tokenizer on EmojiScenes. A CPU is enough."""

from pathlib import Path

import torch
from torch import Tensor

from speedrl_lab import scenes
from speedrl_lab.generators.captioned import CaptionedGenerator
from speedrl_lab.networks import MaskedTransformer, Tokenizer
from speedrl_lab.pace import PaceHead
from speedrl_lab.weights import load_pace, load_weights, read_metadata

WEIGHTS = scenes.DATA / "weights"


class EmojiGenerator(CaptionedGenerator):
    """EmojiScenes behind the generator contract: 8x8 tokens of 1000 codes, 32x32 pixels."""

    def __init__(self, policy: MaskedTransformer, tokenizer: Tokenizer, pace: PaceHead | None = None):
        super().__init__("emoji", policy, pace, Tokenizer.PATCH)
        self.tokenizer = tokenizer.requires_grad_(False)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        self.require_codes(tokens)
        return self.tokenizer.decode(tokens, self.spec.grid)

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Tensor:
        return self.tokenizer.encode(images.to(self.device))


def load_emoji(device: torch.device, policy: Path | str | None = None) -> EmojiGenerator:
    """Read the committed weights; `policy` is a file written by `save_policy`, or one with a pace head alone."""
    policy = policy or WEIGHTS / "generator.safetensors"
    pace = load_pace(policy)
    facts = read_metadata(policy)
    if facts["module"] == "PaceHead":  # a schedule for the frozen base
        policy = WEIGHTS / "generator.safetensors"
    network = load_weights(policy, "MaskedTransformer")
    tokenizer = load_weights(WEIGHTS / "tokenizer.safetensors", "Tokenizer")
    generator = EmojiGenerator(network.to(device), tokenizer.to(device), None if pace is None else pace.to(device))
    generator.revises = "revises" in facts
    return generator
