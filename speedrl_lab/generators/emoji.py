"""The embedded generator: MaskedTransformer and FSQ tokenizer on EmojiScenes. A CPU is enough."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor

from speedrl_lab import scenes
from speedrl_lab.adapters import merged
from speedrl_lab.generator import Cond, GeneratorSpec, StepInfo
from speedrl_lab.networks import MaskedTransformer, Tokenizer
from speedrl_lab.pace import PaceHead
from speedrl_lab.weights import load_pace, load_weights, save_weights

WEIGHTS = scenes.DATA / "weights"


class EmojiGenerator:
    """EmojiScenes behind the generator contract: 8x8 tokens of 1000 codes, 32x32 pixels."""

    lora_targets = ("qkv", "out", "up", "down")

    def __init__(self, policy: MaskedTransformer, tokenizer: Tokenizer, pace: PaceHead | None = None):
        rows, columns = policy.config["grid"]
        self.policy, self.tokenizer, self.pace = policy, tokenizer, pace
        self.tokenizer.requires_grad_(False)
        self.spec = GeneratorSpec(
            name="emoji",
            grid=(rows, columns),
            image_size=(rows * Tokenizer.PATCH, columns * Tokenizer.PATCH),
            codebook_size=policy.codebook_size,
            mask_id=policy.mask_id,
            conditioning="text",
            time_input="none",
        )

    @property
    def device(self) -> torch.device:
        return self.policy.image_position.device

    def encode(self, prompts: Sequence[str]) -> Cond:
        """Word ids of the prompts; raises ValueError for a word or form outside the grammar."""
        return Cond({"words": scenes.encode_captions(prompts).to(self.device)})

    def null(self, count: int) -> Cond:
        return Cond({"words": torch.zeros(count, scenes.MAX_WORDS, dtype=torch.int64, device=self.device)})

    def logits(self, tokens: Tensor, cond: Cond, step: StepInfo, rows: Tensor | None = None) -> Tensor:
        """Time is not an input: the masks tell the network where it stands."""
        return self.policy(tokens, cond.tensors["words"], rows)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        if ((tokens < 0) | (tokens >= self.spec.codebook_size)).any():
            bad = int(tokens[(tokens < 0) | (tokens >= self.spec.codebook_size)][0])
            raise ValueError(f"cannot decode token {bad}: expected codes 0 to {self.spec.codebook_size - 1}, no mask")
        return self.tokenizer.decode(tokens, self.spec.grid)

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Tensor:
        return self.tokenizer.encode(images.to(self.device))

    def copy(self) -> "EmojiGenerator":
        return EmojiGenerator(deepcopy(self.policy), self.tokenizer, deepcopy(self.pace))

    def save_policy(self, path: Path | str, origin: str = "") -> None:
        save_weights(merged(self.policy), path, origin, self.pace)


def load_emoji(device: torch.device, policy: Path | str | None = None) -> EmojiGenerator:
    """Read the committed weights; `policy` is a file written by `save_policy`."""
    policy = policy or WEIGHTS / "generator.safetensors"
    network, pace = load_weights(policy, "MaskedTransformer"), load_pace(policy)
    tokenizer = load_weights(WEIGHTS / "tokenizer.safetensors", "Tokenizer")
    return EmojiGenerator(network.to(device), tokenizer.to(device), None if pace is None else pace.to(device))
