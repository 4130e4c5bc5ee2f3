"""Averages of weights: over the iterations of one run, and between two policies."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from speedrl_lab.generator import MaskedGenerator, can_revise


class Average:
    """Running mean of the trainable parameters of a module; buffers are left alone.

    mean <- keep * mean + (1 - keep) * parameter, with keep = min(decay, (k + 1) / (k + 10)) in update
    k = 0, 1, ..., so that the start is soon forgotten. Means are kept in at least float32.
    """

    def __init__(self, module: nn.Module, decay: float):
        """Start from the module as it is; raises ValueError for a decay outside [0, 1)."""
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: expected 0 (no averaging) up to, but not including, 1")
        self.decay, self.updates = decay, 0
        self.means = {name: _copy(value) for name, value in module.named_parameters() if value.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move every mean towards the module's present parameter."""
        keep = min(self.decay, (self.updates + 1) / (self.updates + 10))
        parameters = dict(module.named_parameters())
        for name, mean in self.means.items():
            mean.lerp_(parameters[name].to(mean.dtype), 1 - keep)
        self.updates += 1

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the means into the parameters of a module of the same kind."""
        parameters = dict(module.named_parameters())
        for name, mean in self.means.items():
            parameters[name].copy_(mean)

    def state_dict(self) -> dict[str, Any]:
        """The number of updates and the means themselves, not copies: plain values and tensors."""
        return {"updates": self.updates, "means": self.means}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; raises ValueError when it is of other parameters."""
        if state["means"].keys() != self.means.keys():
            other = sorted(state["means"].keys() ^ self.means.keys())[0]
            raise ValueError(f"the saved average does not fit this module: {other!r} is in one of them only")
        for name, mean in self.means.items():
            mean.copy_(state["means"][name])
        self.updates = state["updates"]


@torch.no_grad()
def interpolate(module: nn.Module, other: nn.Module, share: float) -> None:
    """Move the parameters of a module the given share of the way to those of another of the same kind.

    Between two policies that were tuned from the same start for different reward weights lies a curve of
    compromises, without training any of them (rewarded soups, Rame et al., arXiv 2306.04488). Raises
    ValueError where names or shapes differ.
    """
    mine, others = dict(module.named_parameters()), dict(other.named_parameters())
    unlike = [name for name in mine.keys() | others.keys() if name not in mine or name not in others]
    unlike += [name for name in mine.keys() & others.keys() if mine[name].shape != others[name].shape]
    if unlike:
        raise ValueError(f"the modules differ in {sorted(unlike)[0]!r}; expected two of the same kind and size")
    for name, value in mine.items():
        value.lerp_(others[name].to(value), share)


def mix(generator: MaskedGenerator, other: MaskedGenerator, share: float) -> None:
    """Move a generator's policy and pace head the given share of the way to those of another one of the same base.

    A pace head that one of them alone has is kept, and so is that one of them has learned to revise. Raises
    ValueError for a share outside [0, 1], and where their networks differ.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share}: expected a share of the other policy from 0 to 1")
    interpolate(generator.policy, other.policy, share)
    if generator.pace is not None and other.pace is not None:
        interpolate(generator.pace, other.pace, share)
    generator.pace = generator.pace or other.pace
    generator.revises = can_revise(generator) or can_revise(other)


def _copy(value: Tensor) -> Tensor:
    """A detached copy, float32 where the parameter is half: small steps would round to nothing."""
    return value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)
