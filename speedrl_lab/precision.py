"""Weights that training leaves alone, stored in bfloat16; adapters stay float32, and the originals are kept."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def untrained(policy: nn.Module) -> dict[str, nn.Parameter]:
    """The weights by name that are no adapter's."""
    return {name: value for name, value in policy.named_parameters() if "lora_" not in name}


@torch.no_grad()
def halve(policy: nn.Module) -> dict[str, Tensor]:
    """Round all weights but adapters to bfloat16, in place; returns the originals, in main memory.

    Without them a small adapter would be lost where it is merged: bfloat16 keeps 8 bits of a weight.
    """
    originals = {name: value.detach().cpu().clone() for name, value in untrained(policy).items()}
    for value in untrained(policy).values():
        value.data = value.data.bfloat16()
    return originals


@torch.no_grad()
def make_whole(policy: nn.Module, originals: Mapping[str, Tensor]) -> None:
    """Put the originals back, in their own number format."""
    for name, value in untrained(policy).items():
        value.data = originals[name].to(value.device, copy=True)
