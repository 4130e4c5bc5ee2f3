"""Weights of reward models: found on this machine alone, read without running pickled code, known by their hash."""

import hashlib
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor


def find_file(path: str, reward: str, repository: str, filename: str) -> Path:
    """The file at `path`, in the folder `path`, or for an empty path in the hub's local cache.

    Raises FileNotFoundError in one line: what is missing, from which repository, and where to put it.
    """
    if path:
        given = Path(path).expanduser()
        found = given / filename if given.is_dir() else given
        if found.is_file():
            return found
        where = f"no file {found}"
    else:
        cached = cached_file(repository, filename)
        if cached is not None:
            return cached
        where = "not in the hub's local cache"
    raise FileNotFoundError(
        f"reward {reward!r}: {where}; wanted: {filename} of repository {repository} "
        f"({how_to_fetch(repository, [filename])}, or name the file '{reward}:<file>'); nothing is fetched by a run"
    )


def how_to_fetch(repository: str, filenames: Sequence[str]) -> str:
    """The command that fetches files of a hub repository into its local cache."""
    return " ".join(["hf download", repository, *filenames])


def cached_file(repository: str, filename: str) -> Path | None:
    """A file of a hub repository that the hub's local cache holds, or None; never the net."""
    from huggingface_hub import constants, try_to_load_from_cache

    found = try_to_load_from_cache(repository, filename, cache_dir=constants.HF_HUB_CACHE)
    return Path(found) if isinstance(found, str) else None


@contextmanager
def offline() -> Iterator[None]:
    """Inside, the hub's libraries answer from local files or raise; outside they are as before."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a pickle that holds nothing but tensors; a `state_dict` inside wins.

    Raises ValueError in one line for a broken file and for a pickle with code in it (TorchScript too).
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as plain tensors ({why(error)}); "
            "expected a state dict as .safetensors or as a .pt without pickled code"
        ) from None
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict; expected tensors by name, or a 'state_dict' of them")
    return state


def identify(path: Path) -> str:
    """Name and SHA-256 of a file, for run cards."""
    stat = path.stat()
    return f"{path.name} (sha256 {_sha256(path, stat.st_size, stat.st_mtime_ns)})"


@lru_cache(maxsize=64)
def _sha256(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def why(error: Exception) -> str:
    """What an error says, in its first line."""
    if isinstance(error, pickle.UnpicklingError):
        return "it is no plain pickle of tensors, and code in pickles is never run"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
