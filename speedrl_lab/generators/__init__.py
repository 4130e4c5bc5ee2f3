"""Adapters, one file a family; `load_generator` finds one by name."""

from pathlib import Path

import torch

from speedrl_lab.config import nearest
from speedrl_lab.generator import MaskedGenerator

FAMILIES = {"emoji": "", "tiny": "", "amused": "<folder>", "meissonic": "<folder>", "maskgit": "<file>"}
"""What follows the colon in a generator's name; embedded ones take nothing."""


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

    Names: `emoji`, `tiny`, `amused:<folder>`, `meissonic:<folder>`, `maskgit:<file>`.
    A family's loader takes further settings, such as `negative_prompt` or Meissonic's `time_conditioning`.

    Raises ValueError for an unknown name, FileNotFoundError or ValueError for missing or broken weights.
    """
    family, _, place = name.partition(":")
    if family not in FAMILIES or bool(place) != bool(FAMILIES[family]):
        known = [key + (f":{value}" if value else "") for key, value in FAMILIES.items()]
        raise ValueError(f"unknown generator {name!r}; nearest: {nearest(name, known)!r} (one of {', '.join(known)})")
    where = resolve_device(device)
    match family:
        case "emoji":
            from speedrl_lab.generators.emoji import load_emoji

            return load_emoji(where, policy)
        case "tiny":
            from speedrl_lab.generators.tiny import load_tiny

            return load_tiny(where, policy)
        case "amused":
            from speedrl_lab.generators.amused import load_amused

            return load_amused(place, where, policy)
        case "meissonic":
            from speedrl_lab.generators.meissonic import load_meissonic

            return load_meissonic(place, where, policy)
        case "maskgit":
            from speedrl_lab.generators.maskgit import load_maskgit

            return load_maskgit(place, where, policy)
