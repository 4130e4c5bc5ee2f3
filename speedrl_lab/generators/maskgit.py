"""MaskGIT with the Halton scheduler, class-conditional ImageNet (Besnier et al., arXiv 2503.17076).

A prompt is a class: its name in torchvision's list of ImageNet categories, or its index as text. Guidance is
the contract's z = u + s (c - u); the published code writes (1 + w) c - w u, so that s = 1 + w, and its best
settings are s = 2.5 (tiny), 2 (small), 1.7 (base) and 1.5 (large) at 32 steps.
"""

import json
import pickle
import zipfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speedrl_lab.adapters import merged
from speedrl_lab.config import nearest
from speedrl_lab.generator import Cond, GeneratorSpec, StepInfo
from speedrl_lab.generators.folder import read_pace, read_tensors, write_policy
from speedrl_lab.generators.llamagen_vq import LlamaGenVQ, vq_from
from speedrl_lab.generators.maskgit_transformer import MaskGitTransformer, transformer_from
from speedrl_lab.pace import PaceHead
from speedrl_lab.precision import as_policy

NUM_CLASSES = 1000
VQ_FILE = "vq_ds16_c2i.pt"
CODEC_BATCH = 8  # pictures at once through the codec


@cache
def class_names() -> tuple[str, ...]:
    """The 1000 ImageNet classes in the order of their indices, as torchvision spells them."""
    from torchvision.models import ResNet18_Weights

    return tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def class_index(prompt: str) -> int:
    """The class 0 to 999 that a prompt names or numbers; raises ValueError with the nearest for any other.

    Upper and lower case are one where that is clear: it is not for the dog Cardigan and the garment cardigan.
    """
    text, names = " ".join(prompt.split()), class_names()
    if text in names:
        return names.index(text)
    lowered = [name.lower() for name in names]
    if lowered.count(text.lower()) == 1:
        return lowered.index(text.lower())
    try:
        index = int(text)
    except ValueError:
        likely = nearest(text, list(names))
        raise ValueError(
            f"class {prompt!r} is not in ImageNet; nearest: {likely!r} ({names.index(likely)}); "
            f"expected a category's name or an index 0 to {NUM_CLASSES - 1}"
        ) from None
    if not 0 <= index < NUM_CLASSES:
        near = min(max(index, 0), NUM_CLASSES - 1)
        raise ValueError(f"class {prompt!r}: expected an index 0 to {NUM_CLASSES - 1}; nearest: {near}")
    return index


class MaskGitGenerator:
    """MaskGitTransformer and the VQ-16 of LlamaGen behind the generator contract."""

    family = "maskgit"
    lora_targets = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
    revises = False

    def __init__(self, policy: MaskGitTransformer, codec: LlamaGenVQ, pace: PaceHead | None = None):
        """Raises ValueError where the two networks do not fit each other, or the classes are not ImageNet's."""
        if policy.codebook_size != codec.codebook_size:
            raise ValueError(
                f"the transformer predicts {policy.codebook_size} codes, the VQ has {codec.codebook_size}: "
                "expected files of one family"
            )
        if policy.null_label != NUM_CLASSES:
            raise ValueError(f"the transformer knows {policy.null_label} classes: expected {NUM_CLASSES} of ImageNet")
        self.policy, self.pace = policy, pace
        self.codec = codec.requires_grad_(False).to(memory_format=torch.channels_last)  # faster convolutions
        self.spec = GeneratorSpec(
            name=self.family,
            grid=(policy.side, policy.side),
            image_size=(policy.side * codec.patch, policy.side * codec.patch),
            codebook_size=policy.codebook_size,
            mask_id=policy.mask_id,
            conditioning="class",
            time_input="none",
        )

    @property
    def device(self) -> torch.device:
        return self.policy.tok_emb.weight.device

    def enable_gradient_checkpointing(self) -> None:
        """From now on recompute each block in the backward pass: less memory, the same gradients."""
        self.policy.enable_gradient_checkpointing()

    def encode(self, prompts: Sequence[str]) -> Cond:
        """Class indices `labels` (B,); raises ValueError for what is neither a class nor an index."""
        return Cond({"labels": torch.tensor([class_index(prompt) for prompt in prompts], device=self.device)})

    def null(self, count: int) -> Cond:
        """`count` rows of the class that stands for none."""
        return Cond({"labels": torch.full((count,), self.policy.null_label, device=self.device)})

    def logits(self, tokens: Tensor, cond: Cond, step: StepInfo, rows: Tensor | None = None) -> Tensor:
        """Time is not an input: the masks tell the network where it stands."""
        modulation = cond.take("modulation") if "modulation" in cond.tensors else None
        return self.policy(tokens, cond.take("labels"), rows, modulation)

    def prepare(self, cond: Cond) -> Cond:
        """With what the blocks make of the classes, (B, blocks, 6 D): no step changes it."""
        return Cond(cond.tensors | {"modulation": self.policy.modulation(cond.tensors["labels"])}).shared()

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """As the contract says; computed in bfloat16 where the policy is."""
        bad = tokens[(tokens < 0) | (tokens >= self.spec.codebook_size)]
        if len(bad):
            raise ValueError(
                f"cannot decode token {int(bad[0])}: expected codes 0 to {self.spec.codebook_size - 1}, no mask"
            )
        batches = tokens.unflatten(1, self.spec.grid).split(CODEC_BATCH)  # (b, h, w)
        with as_policy(self.policy):
            return torch.cat([self.codec.decode(codes) for codes in batches])

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Tensor:
        """The nearest codes; raises ValueError for pictures of another size."""
        height, width = self.spec.image_size
        if images.shape[1:] != (3, height, width):
            raise ValueError(f"images of shape {tuple(images.shape)}: expected (B, 3, {height}, {width})")
        batches = images.to(self.device).split(CODEC_BATCH)
        return torch.cat([self.codec.encode(pictures).flatten(1) for pictures in batches])

    def copy(self) -> "MaskGitGenerator":
        """The same generator with its own copy of policy and pace head; the codec is shared."""
        twin = copy(self)
        twin.policy, twin.pace = deepcopy(self.policy), deepcopy(self.pace)
        return twin

    def save_policy(self, path: Path | str, origin: str = "") -> None:
        """Write the policy under its published names, and a pace head to `<stem>.pace.safetensors` beside it.

        LoRA is merged, the number format is kept; `head.weight` is in the file although it is `tok_emb.weight`.
        """
        path = Path(path)
        state = merged(self.policy).state_dict()
        state["head.weight"] = state["head.weight"].clone()  # safetensors takes no tensor twice
        facts = {"family": self.family, "config": json.dumps({"heads": self.policy.heads}), "origin": origin}
        write_policy(state, path, facts, self.pace, self.revises)


def load_maskgit(
    file: Path | str, device: torch.device, policy: Path | str | None = None, vq: Path | str | None = None
) -> MaskGitGenerator:
    """Read a published transformer and its VQ, without the network.

    Args:
        file: `ImageNet_384_large.pth` or another of llvictorll/Halton-Maskgit; .safetensors is read as well.
        policy: weights to take instead of those of `file`, such as `save_policy` writes, with their pace head.
        vq: LlamaGen's tokenizer; by default `vq_ds16_c2i.pt` beside `file`.

    Raises FileNotFoundError in one line that says what to get and where to put it, ValueError in one line for a
    file that is broken, of another network, or a pickle of more than tensors.
    """
    file = Path(file).expanduser()
    source, vq = Path(policy or file).expanduser(), Path(vq or file.parent / VQ_FILE).expanduser()
    require_files(file, source, vq)
    state, config = read_checkpoint(source, "model_state_dict")
    if config.get("family", MaskGitGenerator.family) != MaskGitGenerator.family:
        raise ValueError(f"{source} holds a policy of {config['family']!r}, expected {MaskGitGenerator.family!r}")
    network = _built(transformer_from, source, state, config.get("heads"))
    codec = _built(vq_from, vq, read_checkpoint(vq, "model")[0])
    generator = MaskGitGenerator(network.to(device), codec.to(device), read_pace(source, device))
    generator.policy.requires_grad_(True)
    generator.revises = "revises" in config
    return generator


def require_files(file: Path, source: Path, vq: Path) -> None:
    """Raise FileNotFoundError in one line where the transformer or the VQ is missing."""
    if source != file and not source.is_file():
        raise FileNotFoundError(f"no weights at {source}; expected a file such as save_policy writes")
    wanted = {
        source: f"{source} (ImageNet_384_large.pth or another size, of repository llvictorll/Halton-Maskgit)",
        vq: f"{vq} ({VQ_FILE} of repository FoundationVision/LlamaGen)",
    }
    missing = [text for path, text in wanted.items() if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"missing {' and '.join(missing)}: get them from the Hugging Face hub and put both into {file.parent}; "
            "nothing is fetched while a run starts"
        )


def read_checkpoint(path: Path, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and settings of a .safetensors file, or of a pickled dict that has the tensors under `key`.

    The prefixes of DataParallel and torch.compile are taken off. Raises ValueError in one line for a file that
    is broken or holds more than plain data: a pickle can run code when it is opened.
    """
    if path.suffix == ".safetensors":
        state, facts = read_tensors(path)
        config = json.loads(facts.get("config", "{}")) | {k: v for k, v in facts.items() if k in ("family", "revises")}
    else:
        payload = _unpickled(path)
        if not isinstance(payload, dict) or not isinstance(payload.get(key), Mapping):
            keys = ", ".join(map(str, payload)) if isinstance(payload, dict) else type(payload).__name__
            raise ValueError(f"{path} holds {keys[:200]}: expected a dict with {key!r}")
        state, config = payload[key], payload.get("config")
        config = dict(config) if isinstance(config, Mapping) else {}  # of another code's making, perhaps
    return {_bare(name): value for name, value in state.items()}, config


def _unpickled(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([Namespace]):  # settings of a training run: plain data
            # Optimizer states, if any, are mapped and never read.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "Unsupported operand" in str(error):
            raise ValueError(
                f"{path} pickles more than tensors and is not opened, since that could run code; "
                "expected weights alone: get the published file, or convert this one to .safetensors"
            ) from None
        raise ValueError(f"{path} is truncated or no file of weights") from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} is truncated or no file of weights ({_first_line(error)})") from None


def _bare(name: str) -> str:
    while name.startswith(("module.", "_orig_mod.")):
        name = name.partition(".")[2]
    return name


def _built(build: Any, path: Path, *inputs: Any) -> Any:
    """`build(*inputs)` with its errors in one line that names the file."""
    try:
        return build(*inputs)
    except KeyError as error:
        raise ValueError(f"{path} has no {error.args[0]!r}: expected weights under their published names") from None
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split("\n")[:2]).strip()
        raise ValueError(f"{path} does not fit: {reason}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
