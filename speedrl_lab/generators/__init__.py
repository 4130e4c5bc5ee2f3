"""Adapters, one file a family; `load_generator` finds one by name."""

from pathlib import Path

import torch

from speedrl_lab.generator import MaskedGenerator

FAMILIES = ("emoji",)


def resolve_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; raises ValueError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={device!r} cannot be used ({str(error).splitlines()[0]}); expected 'auto', 'cpu' or 'cuda'"
        ) from None
    return torch.device(device)


def load_generator(name: str = "emoji", device: str = "auto", policy: Path | str | None = None) -> MaskedGenerator:
    """Load a pretrained generator by name; `policy` replaces its policy weights by those of a file.

    Raises ValueError for an unknown name, FileNotFoundError or ValueError for missing or broken weights.
    """
    if name == "emoji":
        from speedrl_lab.generators.emoji import load_emoji

        return load_emoji(resolve_device(device), policy)
    if name == "tiny":
        from speedrl_lab.generators.tiny import load_tiny

        return load_tiny(resolve_device(device), policy)
    raise ValueError(f"unknown generator {name!r}; known: {', '.join(FAMILIES)}, tiny")
