"""Folders in the published diffusers layout and policy files: what is there, read strictly and offline.

transformer/, vqvae/, text_encoder/, tokenizer/, scheduler/, each with its config; weights as safetensors, whole
or sharded, in full or half precision, or as .bin files that hold nothing but tensors.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from speedrl_lab.pace import PaceHead

WANTED = (
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vqvae/config.json",
    "vqvae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/vocab.json",
)
"""Files of the layout; fp16 variants, shards and tensor-only .bin files stand in for .safetensors."""


def require_files(folder: Path | str, repository: str, wanted: Sequence[str] = WANTED) -> Path:
    """The folder, or FileNotFoundError in one line: what is missing, from which repository, and where it goes."""
    folder = Path(folder).expanduser()
    missing = [name for name in wanted if not _there(folder / name)]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}: download repository {repository} from the Hugging Face hub "
            f"(hf download {repository} --local-dir {folder}); nothing is fetched while a run starts"
        )
    return folder


def _there(path: Path) -> bool:
    """Whether a file is there, or what from_pretrained takes in its place."""
    if path.suffix == ".safetensors":
        return path.parent.is_dir() and bool(_weight_files(path.parent))
    return path.is_file() or (path.name == "vocab.json" and (path.parent / "tokenizer.json").is_file())


def _weight_files(part: Path) -> list[tuple[str, str | None]]:
    """Kinds of weights in a part's folder, (ending, variant), the best first."""
    stems = ("diffusion_pytorch_model", "model", "pytorch_model")
    names = [file.name for file in part.iterdir() if file.name.startswith(stems)]
    kinds = [(ending, variant) for ending in ("safetensors", "bin") for variant in (None, "fp16")]
    return [
        (ending, variant)
        for ending, variant in kinds
        if any(f".{ending}" in name and (".fp16" in name) == (variant is not None) for name in names)
    ]


def load_part(kind: type, folder: Path, part: str) -> nn.Module:
    """A network of a folder by its class's own `from_pretrained`: float32, in eval mode, never from the net.

    Safetensors before pickles, which are read without code (weights_only); full before half precision.
    Raises ValueError in one line for files that are broken, unsafe, or of another network.
    """
    (ending, variant), *_ = _weight_files(folder / part)
    try:
        with torch.random.fork_rng(devices=[]):  # constructors draw from the global generator
            network, report = kind.from_pretrained(
                str(folder), subfolder=part, local_files_only=True, output_loading_info=True,
                variant=variant, use_safetensors=ending == "safetensors",
            )  # fmt: skip
    except Exception as error:
        raise ValueError(f"{folder / part} cannot be read as {kind.__name__}: {_first_line(error)}") from None
    for problem in ("missing_keys", "mismatched_keys"):
        if report.get(problem):
            example = sorted(map(str, report[problem]))[0]
            raise ValueError(
                f"{folder / part} does not fit {kind.__name__}: {len(report[problem])} "
                f"{problem.replace('_', ' ')}, such as {example}"
            )
    return network.float().eval()


def load_text(folder: Path) -> tuple[Any, nn.Module]:
    """CLIP tokenizer and text encoder of a folder."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder / "tokenizer"), local_files_only=True)
    except Exception as error:
        raise ValueError(f"{folder / 'tokenizer'} cannot be read as a CLIP tokenizer: {_first_line(error)}") from None
    return tokenizer, load_part(CLIPTextModelWithProjection, folder, "text_encoder")


def require_libraries(family: str) -> None:
    """Raise ImportError in one line where diffusers or transformers is missing."""
    from importlib.util import find_spec

    missing = [name for name in ("diffusers", "transformers") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"generator {family!r} needs {' and '.join(missing)}, not installed: pip install 'speedrl_lab[real]'"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A config file of a folder; ValueError in one line where it is broken."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {_first_line(error)}") from None


def mask_id_of(folder: Path, vocab_size: int) -> int:
    """Input id of the mask: what the folder's scheduler says, else the last id."""
    path = folder / "scheduler" / "scheduler_config.json"
    return int(read_json(path).get("mask_token_id", vocab_size - 1)) if path.is_file() else vocab_size - 1


def write_tensors(state: Mapping[str, Tensor], path: Path, facts: Mapping[str, str]) -> None:
    """Write a safetensors file and its metadata; readers see the old or the new file, never a part."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, {"format": "pt", **facts})  # "pt": what the hub's loaders ask for
    partial.chmod(0o644)  # safetensors writes for the owner alone
    partial.replace(path)


def write_policy(
    state: Mapping[str, Tensor], path: Path, facts: Mapping[str, str], pace: PaceHead | None, revises: bool
) -> None:
    """Write a policy, with whether it `revises` in its facts, and its pace head to `<stem>.pace.safetensors` beside it.

    Without a head, that of an earlier policy of this name is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _pace_path(path)
    if pace is None:
        beside.unlink(missing_ok=True)
    else:
        settings = {"module": "PaceHead", "config": json.dumps(pace.config), "origin": facts["origin"]}
        write_tensors(pace.state_dict(), beside, settings)
    write_tensors(state, path, {**facts, "revises": "true"} if revises else facts)


def read_pace(path: Path, device: torch.device) -> PaceHead | None:
    """The pace head beside a policy file, on a device, or None; ValueError in one line for another network."""
    beside = _pace_path(path)
    if not beside.is_file():
        return None
    weights, settings = read_tensors(beside)
    if settings.get("module") != "PaceHead":
        raise ValueError(f"{beside} is no pace head; move it away or save the policy again")
    pace = PaceHead(**json.loads(settings["config"]))
    fill(pace, weights, beside)
    return pace.to(device)


def _pace_path(path: Path) -> Path:
    return path.with_name(path.stem + ".pace.safetensors")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file; FileNotFoundError or ValueError in one line."""
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; expected a safetensors file, such as save_policy writes")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from None


def fill(network: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy a complete set of tensors into a network; ValueError in one line, before anything is copied."""
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in tensors.items()}
    wrong = sorted(name for name in wanted | given if wanted.get(name) != given.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{path} does not fit the network in {len(wrong)} of {len(wanted)} tensors, such as {name}: "
            f"shape {given.get(name, 'missing')}, expected {wanted.get(name, 'none of this name')}"
        )
    network.load_state_dict(tensors, strict=True)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
