"""Networks in bfloat16: weights that training leaves alone, policies that only sample, and what pictures are made in.

Adapters stay float32, and so does all sampling mathematics. Training keeps the originals of what it rounds.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

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


def is_half(policy: nn.Module) -> bool:
    """Whether the weights of a policy, adapters aside, are bfloat16."""
    return any(value.dtype == torch.bfloat16 for value in untrained(policy).values())


def as_policy(policy: nn.Module) -> AbstractContextManager[None]:
    """Convolutions and products in bfloat16 inside, where the weights of `policy` are; else as they are."""
    device = next(policy.parameters()).device.type
    if device == "meta" or not is_half(policy):  # the planner's shapes know no autocast
        return nullcontext()
    return torch.autocast(device, torch.bfloat16)
