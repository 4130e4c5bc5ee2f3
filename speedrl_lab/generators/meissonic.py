"""Meissonic (Bai et al., arXiv 2410.08261): 4096 or 1024 tokens of 8192 codes, 1024x1024 or 512x512 pixels.

The network is told the time, and its authors tell it differently when they train and when they sample:

- `step_index`: their sampling pipeline feeds the steps still to come, T-1 ... 0. A change of T changes what the
  network is told, and the default here, because it is what published pictures were made with.
- `mask_ratio`: their trainer feeds 1000 * the share of masked tokens, in (0, 1000].

The network multiplies either by 1000 once more.
"""

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import safe_open
from torch import Tensor, nn

from speedrl_lab.config import nearest
from speedrl_lab.generator import Cond, GeneratorSpec, StepInfo
from speedrl_lab.generators.folder import (
    WANTED,
    load_part,
    load_text,
    mask_id_of,
    read_json,
    require_files,
    require_libraries,
)
from speedrl_lab.generators.published import PublishedGenerator, code_logits

REPOSITORY = "MeissonFlow/Meissonic"
TEXT_REPOSITORY = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""The text encoder that the authors' scripts put in place of the checkpoint's own."""
TimeConditioning = Literal["step_index", "mask_ratio"]


class MeissonicGenerator(PublishedGenerator):
    """A MeissonicTransformer with its CLIP text encoder and VQ codec behind the generator contract."""

    family = "meissonic"
    lora_targets = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    )  # fmt: skip
    text_source = "own"
    """Which text encoder it reads with: `own`, or the folder of another one."""

    def logits(self, tokens: Tensor, cond: Cond, step: StepInfo, rows: Tensor | None = None) -> Tensor:
        """The time is told as `spec.time_input` says."""
        text, pooled = self.text_of(cond)
        hidden = self.policy.hidden(
            self.picture(tokens), text, pooled, self.micro_conditions(len(tokens)), self.timestep(tokens, step)
        )
        return code_logits(self.policy.mlm_layer, hidden, rows)

    def timestep(self, tokens: Tensor, step: StepInfo) -> Tensor:
        """What the network is fed: float32 (1,) steps to come, or (B,) 1000 * the masked share of each row."""
        if self.spec.time_input == "step_index":
            return torch.full((1,), float(step.total - 1 - step.index), device=tokens.device)
        return (tokens == self.spec.mask_id).float().mean(1) * 1000

    def enable_gradient_checkpointing(self) -> None:
        super().enable_gradient_checkpointing()
        self.policy.enable_gradient_checkpointing()

    def describe(self) -> dict[str, str]:
        """What a run card must say to repeat its pictures."""
        return {
            "family": self.family,
            "time_conditioning": self.spec.time_input,
            "text_encoder": self.text_source,
            "negative_prompt": self.negative_prompt,
        }


def load_meissonic(
    folder: Path | str,
    device: torch.device,
    policy: Path | str | None = None,
    negative_prompt: str = "",
    time_conditioning: TimeConditioning = "step_index",
    text_encoder: Path | str | None = None,
    image_size: tuple[int, int] | None = None,
) -> MeissonicGenerator:
    """Read a published folder, such as a copy of MeissonFlow/Meissonic or Collov-Labs/Monetico, in float32.

    Args:
        policy: file written by `save_policy`, or any safetensors file with the published keys.
        negative_prompt: what guidance leads away from.
        time_conditioning: how the network is told the time; see this module's first lines.
        text_encoder: folder of another CLIP text model of the same widths; None for the checkpoint's own.
        image_size: pixels (H, W); None for the layout the network was trained on, which its config tells.

    Raises ImportError, FileNotFoundError or ValueError in one line for what is missing, broken or does not fit.
    """
    known = list(get_args(TimeConditioning))
    if time_conditioning not in known:
        raise ValueError(
            f"time_conditioning={time_conditioning!r} is not known; nearest: {nearest(time_conditioning, known)!r}"
        )
    require_libraries(MeissonicGenerator.family)
    own_text = text_encoder is None
    wanted = [name for name in WANTED if own_text or not name.startswith("text_encoder/")]
    path = require_files(folder, REPOSITORY, wanted)
    config = read_json(path / "transformer" / "config.json")
    if "num_single_layers" not in config or "codebook_size" not in config:
        raise ValueError(
            f"{path / 'transformer'} holds a {config.get('_class_name')}, expected Meissonic's Transformer2DModel"
        )
    from diffusers import VQModel

    from speedrl_lab.generators.meissonic_transformer import MeissonicTransformer

    network = load_part(MeissonicTransformer, path, "transformer")
    _require_all_used(path / "transformer", network)
    codec = load_part(VQModel, path, "vqvae")
    tokenizer, reader = load_text(path) if own_text else _other_text(path, Path(text_encoder))
    _require_fit(path, network, codec, reader)
    spec = GeneratorSpec(
        name=f"meissonic:{folder}",
        **_layout(network, 2 ** (len(codec.config.block_out_channels) - 1), image_size),
        codebook_size=network.config.codebook_size,
        mask_id=mask_id_of(path, network.config.vocab_size),
        conditioning="text",
        time_input=time_conditioning,
    )
    generator = MeissonicGenerator(spec, network, codec, tokenizer, reader, negative_prompt).to(device)
    if not own_text:
        generator.text_source = str(text_encoder)
    if policy is not None:
        generator.load_policy(policy)
    return generator


def _other_text(folder: Path, other: Path) -> tuple[Any, nn.Module]:
    """The tokenizer of `folder` and the text model of `other`, which is its folder or holds a `text_encoder/`."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    model = other / "text_encoder" if (other / "text_encoder").is_dir() else other
    require_files(model, TEXT_REPOSITORY, ("config.json", "model.safetensors"))
    model = model.resolve()  # so that it has a name
    tokenizer = CLIPTokenizer.from_pretrained(str(folder / "tokenizer"), local_files_only=True)
    return tokenizer, load_part(CLIPTextModelWithProjection, model.parent, model.name)


def _require_all_used(part: Path, network: nn.Module) -> None:
    """Raise ValueError for weights that the network has no place for: they belong to another config."""
    stored = set()
    for path in part.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            stored |= set(file.keys())
    unused = sorted(stored - network.state_dict().keys())
    if unused:
        raise ValueError(
            f"{part} does not fit its config: {len(unused)} unexpected keys, such as {unused[0]}; "
            f"the config says downsample={network.config.downsample}"
        )


def _require_fit(path: Path, network: nn.Module, codec: nn.Module, reader: nn.Module) -> None:
    """Raise ValueError in one line where the parts of a folder are of different models."""
    needs, text = network.config, reader.config
    for what, given, expected in (
        ("codec has codes", codec.config.num_vq_embeddings, needs.codebook_size),
        ("text encoder has states of width", text.hidden_size, needs.joint_attention_dim),
        ("text encoder has sentences of width", text.projection_dim, needs.pooled_projection_dim),
    ):
        if given != expected:
            raise ValueError(f"{path}: {what} {given}, the network expects {expected}")


def _layout(network: nn.Module, pixels: int, image_size: tuple[int, int] | None) -> dict[str, tuple[int, int]]:
    """`grid` and `image_size` of a network whose tokens are `pixels` wide; ValueError for a size that is no grid."""
    grid = (network.side, network.side)
    if image_size is not None:
        unit = pixels * (2 if network.config.downsample else 1)
        if any(side < unit or side % unit for side in image_size):
            valid = tuple(max(1, round(side / unit)) * unit for side in image_size)
            raise ValueError(f"image_size={image_size}: expected multiples of {unit} pixels; nearest: {valid}")
        grid = (image_size[0] // pixels, image_size[1] // pixels)
    return {"grid": grid, "image_size": (grid[0] * pixels, grid[1] * pixels)}
