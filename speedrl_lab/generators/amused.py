"""aMUSEd (Patil et al., arXiv 2401.01808): 256 or 1024 tokens of 8192 codes, 256x256 or 512x512 pixels.

The network is diffusers' UVit2DModel, run here part by part, so that its head is computed only at the rows asked
for and its blocks can be recomputed in the backward pass. It has no time input: the masks tell where it stands.
"""

from pathlib import Path

import torch
from torch import Tensor

from speedrl_lab.generator import Cond, GeneratorSpec, StepInfo
from speedrl_lab.generators.folder import (
    load_part,
    load_text,
    mask_id_of,
    read_json,
    require_files,
    require_libraries,
)
from speedrl_lab.generators.published import PublishedGenerator, code_logits

REPOSITORIES = ("amused/amused-256", "amused/amused-512")


class AmusedGenerator(PublishedGenerator):
    """A UVit2DModel with its CLIP text encoder and VQ codec behind the generator contract."""

    family = "amused"
    lora_targets = ("to_q", "to_k", "to_v")

    def logits(self, tokens: Tensor, cond: Cond, step: StepInfo, rows: Tensor | None = None) -> Tensor:
        """Time is not an input: the masks tell the network where it stands."""
        return code_logits(self.policy.mlm_layer, self._hidden(self.picture(tokens), cond), rows)

    def _hidden(self, tokens: Tensor, cond: Cond) -> Tensor:
        """What the head reads, (B, C, h, w), of tokens (B, h, w): UVit2DModel.forward without its last layer."""
        from diffusers.models.embeddings import get_timestep_embedding

        net = self.policy
        text, pooled = self.text_of(cond)
        text = net.encoder_proj_layer_norm(net.encoder_proj(text))  # (B, L, D)
        sinusoids = get_timestep_embedding(
            self.micro_conditions(len(tokens)).flatten(), net.config.micro_cond_encode_dim,
            flip_sin_to_cos=True, downscale_freq_shift=0,
        ).unflatten(0, (len(tokens), -1))  # (B, 5, E)  # fmt: skip
        pooled = torch.cat([pooled, sinusoids.flatten(1).to(pooled.dtype)], 1)
        pooled = net.cond_embed(pooled).to(text.dtype)  # (B, D)
        named = {"pooled_text_emb": pooled, "encoder_hidden_states": text, "cross_attention_kwargs": None}
        hidden = self.run_block(net.down_block, net.embed(tokens), **named)  # (B, C, h', w')
        size = hidden.shape[2:]
        hidden = hidden.flatten(2).transpose(1, 2)  # (B, N', C)
        hidden = net.project_to_hidden(net.project_to_hidden_norm(hidden))  # (B, N', D)
        for block in net.transformer_layers:
            hidden = self.run_block(
                block, hidden, encoder_hidden_states=text, added_cond_kwargs={"pooled_text_emb": pooled}
            )
        hidden = net.project_from_hidden(net.project_from_hidden_norm(hidden))
        hidden = hidden.transpose(1, 2).unflatten(2, size)  # (B, C, h', w')
        return self.run_block(net.up_block, hidden, **named)  # (B, C, h, w)


def load_amused(
    folder: Path | str, device: torch.device, policy: Path | str | None = None, negative_prompt: str = ""
) -> AmusedGenerator:
    """Read a published folder, such as a copy of amused/amused-256 or amused/amused-512, in float32.

    Args:
        policy: file written by `save_policy`, or any safetensors file with UVit2DModel's keys.
        negative_prompt: what guidance leads away from.

    Raises ImportError, FileNotFoundError or ValueError in one line for what is missing or broken.
    """
    require_libraries(AmusedGenerator.family)
    path = require_files(folder, REPOSITORIES["512" in Path(folder).name])
    config = read_json(path / "transformer" / "config.json")
    if config.get("_class_name") != "UVit2DModel":
        raise ValueError(f"{path / 'transformer'} holds a {config.get('_class_name')}, expected aMUSEd's UVit2DModel")
    from diffusers import UVit2DModel, VQModel

    network = load_part(UVit2DModel, path, "transformer")
    codec = load_part(VQModel, path, "vqvae")
    tokenizer, text_encoder = load_text(path)
    if codec.config.num_vq_embeddings != network.config.codebook_size:
        raise ValueError(
            f"{path}: the codec has {codec.config.num_vq_embeddings} codes, the network {network.config.codebook_size}"
        )
    side, pixels = network.config.sample_size, 2 ** (len(codec.config.block_out_channels) - 1)
    spec = GeneratorSpec(
        name=f"amused:{folder}",
        grid=(side, side),
        image_size=(side * pixels, side * pixels),
        codebook_size=network.config.codebook_size,
        mask_id=mask_id_of(path, network.config.vocab_size),
        conditioning="text",
        time_input="none",
    )
    generator = AmusedGenerator(spec, network, codec, tokenizer, text_encoder, negative_prompt).to(device)
    if policy is not None:
        generator.load_policy(policy)
    return generator
