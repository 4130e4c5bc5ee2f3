"""aMUSEd (Patil et al., arXiv 2401.01808): 256 or 1024 tokens of 8192 codes, 256x256 or 512x512 pixels.

The network is diffusers' UVit2DModel, run here part by part, so that its head is computed only at the rows asked
for and its blocks can be recomputed in the backward pass. It has no time input: the masks tell where it stands.
What its blocks make of a prompt, keys and values of all cross-attentions and the numbers that modulate norms, is
therefore the same at every step, and `prepare` computes it once.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

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

    def prepare(self, cond: Cond) -> Cond:
        """What the blocks make of prompts: `pooled` (B, D), `modulation.i` (B, 6 D), keys and values (B, L, D)."""
        net, (text, pooled) = self.policy, self._conditions(cond)
        fixed = {"pooled": pooled}
        for number, block in enumerate(net.transformer_layers):
            norms = (block.norm1, block.norm2, block.norm3)
            fixed[f"modulation.{number}"] = torch.cat([norm.linear(norm.silu(pooled)) for norm in norms], 1)
            fixed |= _keys_and_values(f"{number}", block.attn2, text)
        for side, stage in (("down", net.down_block), ("up", net.up_block)):
            for number, block in enumerate(stage.attention_blocks):
                seen = text if block.kv_mapper is None else block.kv_mapper(functional.silu(text))
                for name, attention in (("first", block.attn1), ("second", block.attn2)):
                    fixed |= _keys_and_values(f"{side}.{number}.{name}", attention, seen)
        return Cond(fixed).shared()

    def _conditions(self, cond: Cond) -> tuple[Tensor, Tensor]:
        """Text (B, L, D) and the vector of sentence and picture size (B, D) that all blocks are given."""
        from diffusers.models.embeddings import get_timestep_embedding

        net, count = self.policy, len(cond)
        text, pooled = self.text_of(cond)
        text = net.encoder_proj_layer_norm(net.encoder_proj(text))  # (B, L, D)
        sinusoids = get_timestep_embedding(
            self.micro_conditions(count).flatten(), net.config.micro_cond_encode_dim,
            flip_sin_to_cos=True, downscale_freq_shift=0,
        ).unflatten(0, (count, -1))  # (B, 5, E)  # fmt: skip
        pooled = torch.cat([pooled, sinusoids.flatten(1).to(pooled.dtype)], 1)
        return text, net.cond_embed(pooled).to(text.dtype)

    def _hidden(self, tokens: Tensor, cond: Cond) -> Tensor:
        """What the head reads, (B, C, h, w), of tokens (B, h, w): UVit2DModel.forward without its last layer."""
        net, fixed = self.policy, "text" not in cond.tensors
        if not fixed:
            text, pooled = self._conditions(cond)
            named = {"pooled_text_emb": pooled, "encoder_hidden_states": text, "cross_attention_kwargs": None}
            added = {"encoder_hidden_states": text, "added_cond_kwargs": {"pooled_text_emb": pooled}}
        x = net.embed(tokens)
        hidden = _stage(net.down_block, "down", x, cond) if fixed else self.run_block(net.down_block, x, **named)
        size = hidden.shape[2:]
        hidden = hidden.flatten(2).transpose(1, 2)  # (B, N', C)
        hidden = net.project_to_hidden(net.project_to_hidden_norm(hidden))  # (B, N', D)
        for number, block in enumerate(net.transformer_layers):
            hidden = _layer(block, number, hidden, cond) if fixed else self.run_block(block, hidden, **added)
        hidden = net.project_from_hidden(net.project_from_hidden_norm(hidden))
        hidden = hidden.transpose(1, 2).unflatten(2, size)  # (B, C, h', w')
        return _stage(net.up_block, "up", hidden, cond) if fixed else self.run_block(net.up_block, hidden, **named)


def _keys_and_values(name: str, attention: nn.Module, text: Tensor) -> dict[str, Tensor]:
    return {f"key.{name}": attention.to_k(text), f"value.{name}": attention.to_v(text)}


def _attended(attention: nn.Module, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """An Attention of diffusers on x (B, N, D) with keys and values (B, L, D) that are there already."""
    heads = (part.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for part in (attention.to_q(x), key, value))
    mixed = functional.scaled_dot_product_attention(*heads)  # (B, h, N, d)
    return attention.to_out[0](mixed.transpose(1, 2).flatten(2))


def _modulated(norm: nn.Module, x: Tensor, numbers: Tensor) -> Tensor:
    """An AdaLayerNormContinuous on x (B, N, D) with its scale and shift (B, 2 D) given."""
    scale, shift = numbers[:, None].chunk(2, 2)
    return norm.norm(x) * (1 + scale) + shift


def _layer(block: nn.Module, number: int, x: Tensor, cond: Cond) -> Tensor:
    """A BasicTransformerBlock on x (B, N, D) with prepared conditions."""
    first, second, third = cond.take(f"modulation.{number}").chunk(3, 1)
    seen = _modulated(block.norm1, x, first)
    x = x + _attended(block.attn1, seen, block.attn1.to_k(seen), block.attn1.to_v(seen))
    seen = _modulated(block.norm2, x, second)
    x = x + _attended(block.attn2, seen, cond.take(f"key.{number}"), cond.take(f"value.{number}"))
    return x + block.ff(_modulated(block.norm3, x, third))


def _stage(stage: nn.Module, side: str, x: Tensor, cond: Cond) -> Tensor:
    """A UVitBlock on x (B, C, h, w) with prepared conditions."""
    x = x if stage.downsample is None else stage.downsample(x)
    for number, (convolved, block) in enumerate(zip(stage.res_blocks, stage.attention_blocks, strict=True)):
        x = convolved(x, cond.take("pooled"))
        size, x = x.shape[2:], x.flatten(2).transpose(1, 2)  # (B, h*w, C)
        for name, norm, attention in (("first", block.norm1, block.attn1), ("second", block.norm2, block.attn2)):
            at = f"{side}.{number}.{name}"
            x = x + _attended(attention, norm(x), cond.take(f"key.{at}"), cond.take(f"value.{at}"))
        x = x.transpose(1, 2).unflatten(2, size)
    return x if stage.upsample is None else stage.upsample(x)


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
