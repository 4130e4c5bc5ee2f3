"""What generators of EmojiScenes captions share: everything but the picture."""

from collections.abc import Sequence
from copy import copy, deepcopy
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from speedrl_lab import scenes
from speedrl_lab.adapters import merged
from speedrl_lab.compilation import require_compiler
from speedrl_lab.generator import Cond, GeneratorSpec, StepInfo
from speedrl_lab.networks import MaskedTransformer
from speedrl_lab.pace import PaceHead
from speedrl_lab.weights import save_weights


class CaptionedGenerator:
    """A MaskedTransformer behind the generator contract; a subclass adds `decode` and `tokenize`."""

    lora_targets = ("qkv", "out", "up", "down")
    revises = False
    """Whether the policy has learned to draw its own drafts anew."""

    def __init__(self, name: str, policy: MaskedTransformer, pace: PaceHead | None, patch: int):
        rows, columns = policy.config["grid"]
        self.policy, self.pace = policy, pace
        self.spec = GeneratorSpec(
            name=name,
            grid=(rows, columns),
            image_size=(rows * patch, columns * patch),
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
        tables = tuple(cond.tensors[name] for name in ("table", "head") if name in cond.tensors)
        return self.policy(tokens, cond.take("words"), rows, tables or None)

    def prepare(self, cond: Cond) -> Cond:
        """Beside the words what codes are embedded as, `table` (V+1, D), and predicted by, `head` (V, D)."""
        table, head = self.policy.tables()
        return Cond({"words": cond.take("words"), "table": table, "head": head}).shared()

    def compile(self) -> None:
        """From now on run the blocks of the network, and of copies, as torch.compile makes them.

        Raises OSError in one line where it cannot.
        """
        require_compiler(self.device)
        self.policy.compiled = True

    def require_codes(self, tokens: Tensor) -> None:
        """Raise ValueError where a token is a mask or no code."""
        bad = tokens[(tokens < 0) | (tokens >= self.spec.codebook_size)]
        if len(bad):
            raise ValueError(
                f"cannot decode token {int(bad[0])}: expected codes 0 to {self.spec.codebook_size - 1}, no mask"
            )

    def copy(self) -> Self:
        """The same generator with its own copy of policy and pace head."""
        twin = copy(self)
        twin.policy, twin.pace = deepcopy(self.policy), deepcopy(self.pace)
        return twin

    def save_policy(self, path: Path | str, origin: str = "") -> None:
        save_weights(merged(self.policy), path, origin, self.pace, revises=self.revises)
