"""Self-describing weights: one safetensors file that names its module, its settings and its origin."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from speedrl_lab import networks
from speedrl_lab.pace import PaceHead

FORMAT = "speedrl_lab/1"
_MODULES = {
    cls.__name__: cls
    for cls in (networks.Tokenizer, networks.MaskedTransformer, networks.SmallClip, networks.Detector, PaceHead)
}


def save_weights(
    module: nn.Module,
    path: Path | str,
    origin: str = "",
    pace: PaceHead | None = None,
    dtype: torch.dtype = torch.float16,
    revises: bool = False,
) -> None:
    """Write a module atomically with its class, constructor settings and the command that made it.

    Floating-point tensors are stored in `dtype` (half by default: the files are committed). The pace
    head of a policy travels in the same file, under the prefix "pace."; so does whether it `revises`.
    """
    path = Path(path)
    state = dict(module.state_dict())
    metadata = {
        "format": FORMAT,
        "module": type(module).__name__,
        "config": json.dumps(module.config),
        "origin": origin,
    }
    if revises:
        metadata["revises"] = "true"
    if pace is not None:
        state |= {"pace." + name: value for name, value in pace.state_dict().items()}
        metadata["pace"] = json.dumps(pace.config)
    tensors = {
        name: (value.to(dtype) if value.is_floating_point() else value).detach().cpu().contiguous()
        for name, value in state.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata)
    partial.chmod(0o644)  # safetensors writes for the owner alone
    partial.replace(path)


def read_metadata(path: Path | str) -> dict[str, str]:
    """The metadata of a weights file; raises FileNotFoundError or ValueError in one line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; run notebook 00_pretrain or check the name")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from None
    if metadata.get("format") != FORMAT or metadata.get("module") not in _MODULES:
        raise ValueError(f"{path} is not a {FORMAT} weights file (module {metadata.get('module')!r})")
    return metadata


def load_weights(path: Path | str, module: str) -> nn.Module:
    """Rebuild the module stored in a file, float32, in eval mode.

    Args:
        module: expected class name, such as "Detector"; anything else in the file is a ValueError.
    """
    metadata = read_metadata(path)
    if metadata["module"] != module:
        raise ValueError(f"{path} holds a {metadata['module']}, expected a {module}")
    with torch.random.fork_rng(devices=[]):  # constructors draw from the global generator
        network = _MODULES[module](**json.loads(metadata["config"]))
    state = {name: value for name, value in _tensors(path).items() if not name.startswith("pace.")}
    return _filled(network, state, path)


def load_pace(path: Path | str) -> PaceHead | None:
    """The pace head stored beside a policy, or alone in its file; None where the file has none."""
    metadata = read_metadata(path)
    if metadata["module"] == "PaceHead":
        return load_weights(path, "PaceHead")
    if "pace" not in metadata:
        return None
    with torch.random.fork_rng(devices=[]):
        head = PaceHead(**json.loads(metadata["pace"]))
    tensors = _tensors(path).items()
    return _filled(head, {name[5:]: value for name, value in tensors if name.startswith("pace.")}, path)


def _tensors(path: Path | str) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def _filled(network: nn.Module, state: dict[str, torch.Tensor], path: Path | str) -> nn.Module:
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n")[1:2]).strip()
        raise ValueError(f"{path} does not fit its own description: {reason}") from None
    return network.eval()
