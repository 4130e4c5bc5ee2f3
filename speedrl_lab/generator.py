"""The contract between a masked generator and everything that uses one.

A generator is networks and codecs behind one interface, without randomness of its own: the sampler
owns all of it. The loops receive a generator and never learn its family.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from speedrl_lab.pace import PaceHead


@dataclass(frozen=True)
class GeneratorSpec:
    """What a sampler must know of a generator."""

    name: str
    grid: tuple[int, int]
    """Token rows and columns; N = rows * columns, raster order."""
    image_size: tuple[int, int]
    """Pixels (H, W)."""
    codebook_size: int
    """V, the codes that may be emitted; the mask is never one of them."""
    mask_id: int
    """Input id of the mask; may lie above V."""
    conditioning: Literal["text", "class"]
    time_input: Literal["none", "step_index", "mask_ratio"]
    """What the network is told of the time."""

    @property
    def num_tokens(self) -> int:
        """N, the positions of the grid."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class StepInfo:
    """Where a sampling loop stands; host numbers, so that no device is synchronized."""

    index: int
    """0 ... total-1."""
    total: int
    """Steps of the loop, at most."""


@dataclass(frozen=True)
class Cond:
    """Encoded prompts: named tensors with one row a prompt; opaque to everyone but their generator."""

    tensors: dict[str, Tensor]
    owners: Tensor | None = None
    """Row of the tensors that each prompt has, int64, where large tensors are shared; None where row i is prompt i's.
    Only a generator's own `prepare` makes such."""

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())) if self.owners is None else self.owners)

    def index(self, rows: Tensor) -> "Cond":
        """The prompts at `rows`."""
        if self.owners is not None:
            return Cond(self.tensors, self.owners[rows])
        return Cond({name: value[rows] for name, value in self.tensors.items()})

    def repeat_interleave(self, times: int) -> "Cond":
        """Group-major copies: sample j of prompt i at row i * times + j."""
        if self.owners is not None:
            return Cond(self.tensors, self.owners.repeat_interleave(times))
        return Cond({name: value.repeat_interleave(times, 0) for name, value in self.tensors.items()})

    def cat(self, other: "Cond") -> "Cond":
        """The rows of both; shared tensors must be the same ones."""
        if self.owners is not None:
            return Cond(self.tensors, torch.cat([self.owners, other.owners]))
        return Cond({name: torch.cat([value, other.tensors[name]]) for name, value in self.tensors.items()})

    def shared(self) -> "Cond":
        """The same prompts, which `index` then copies by number alone."""
        return Cond(self.tensors, torch.arange(len(self), device=next(iter(self.tensors.values())).device))

    def take(self, name: str) -> Tensor:
        """A tensor with one row a prompt, shared or not."""
        value = self.tensors[name]
        if self.owners is None:
            return value
        return value.expand(len(self), *value.shape[1:]) if len(value) == 1 else value[self.owners]


class MaskedGenerator(Protocol):
    """A pretrained masked image generator."""

    spec: GeneratorSpec
    policy: nn.Module
    """The trainable network; codec and text encoder stay frozen."""
    lora_targets: tuple[str, ...]
    """Ends of the names of the linear layers of `policy` that LoRA adapts; empty where it cannot."""
    pace: PaceHead | None
    """Head that chooses how many tokens to reveal; None until one is trained."""

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        ...

    def encode(self, prompts: Sequence[str]) -> Cond:
        """Encode B prompts, without gradient."""
        ...

    def null(self, count: int) -> Cond:
        """`count` unconditional rows."""
        ...

    def logits(self, tokens: Tensor, cond: Cond, step: StepInfo, rows: Tensor | None = None) -> Tensor:
        """Logits of tokens (B, N): float32 (B, N, V), or (len(rows), V) at flat indices into B*N."""
        ...

    def decode(self, tokens: Tensor) -> Tensor:
        """Codes (B, N) to images, float32 (B, 3, H, W) in [0, 1]; raises ValueError on a mask."""
        ...

    def tokenize(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to codes, int64 (B, N)."""
        ...

    def copy(self) -> "MaskedGenerator":
        """The same generator with its own copy of the policy and pace head."""
        ...

    def save_policy(self, path: Path | str, origin: str = "") -> None:
        """Write policy and pace head to one safetensors file."""
        ...


def prepared(generator: MaskedGenerator, cond: Cond) -> Cond:
    """`cond` with what no step changes computed once, where the generator has a `prepare(cond)`; else as it is.

    For loops without gradient in which the weights stand still: the result holds numbers made of them.
    """
    own = getattr(generator, "prepare", None)
    return cond if own is None else own(cond)


def can_revise(generator: MaskedGenerator) -> bool:
    """Whether the policy has learned to draw its own drafts anew (`SamplerConfig.revise`).

    Training sets `generator.revises`, and a policy's file keeps it; a generator that lacks it has not.
    """
    return getattr(generator, "revises", False)


def guided_logits(
    generator: MaskedGenerator,
    tokens: Tensor,
    cond: Cond,
    guidance_scale: float,
    step: StepInfo,
    rows: Tensor | None = None,
    null: Cond | None = None,
    alike: bool = False,
) -> Tensor:
    """z = u + s (c - u); s = 1 is no guidance and one pass, anything else two passes in one batch.

    `null` is one unconditional row, made here where it is not given. `alike` says that all rows of tokens are
    equal, so that one unconditional pass serves them all.
    """
    if guidance_scale == 1.0:
        return generator.logits(tokens, cond, step, rows)
    count, num_tokens = tokens.shape
    free = 1 if alike else count
    unprompted = generator.null(free) if null is None else null.index(tokens.new_zeros(free))
    if rows is None and alike:
        rows, shape = torch.arange(tokens.numel(), device=tokens.device), (count, num_tokens, -1)
        return guided_logits(generator, tokens, cond, guidance_scale, step, rows, null, alike).view(shape)
    both = None if rows is None else torch.cat([rows, (rows % num_tokens if alike else rows) + tokens.numel()])
    logits = generator.logits(torch.cat([tokens, tokens[:free]]), cond.cat(unprompted), step, both)
    conditional, unconditional = logits.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)
