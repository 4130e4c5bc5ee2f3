"""Meissonic's network (arXiv 2410.08261) on public diffusers classes: Flux blocks between aMUSEd's embedding and head.

Config and state-dict keys are the published ones, so that its checkpoints load strictly here and what is
saved here loads there. This module imports diffusers: only the loader of the family imports it.
"""

from collections.abc import Iterable

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import (
    CombinedTimestepTextProjEmbeddings,
    TimestepEmbedding,
    get_timestep_embedding,
)
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import RMSNorm
from diffusers.models.resnet import Downsample2D, Upsample2D
from diffusers.models.transformers.transformer_flux import (
    FluxPosEmbed,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from diffusers.models.unets.uvit_2d import ConvMlmLayer, UVit2DConvEmbed
from torch import Tensor, nn

EPS = 1e-6
MICRO_CONDITIONS = 5  # width, height, two crop coordinates, aesthetic score
MICRO_WIDTH = 256  # of the sinusoid of each
RESAMPLING = {
    "kernel_size": 2, "padding": 0, "norm_type": "rms_norm", "eps": EPS, "elementwise_affine": True, "bias": False,
}  # fmt: skip


class MeissonicTransformer(ModelMixin, ConfigMixin):
    """Masked image transformer: token ids and text to logits of the codes.

    The arguments are the keys of the published config, their defaults the published size: 1,006,946,304
    parameters. `patch_size` and `in_channels` are in that config and used by nobody. `sample_size` is not: it is the
    side of the token grid where it is neither 64, the layout of networks that halve it, nor 32, that of the others.

    Raises ValueError for sizes that do not fit each other, and for `guidance_embeds`.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        num_layers: int = 14,
        num_single_layers: int = 28,
        attention_head_dim: int = 128,
        num_attention_heads: int = 8,
        joint_attention_dim: int = 1024,
        pooled_projection_dim: int = 1024,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, ...] = (16, 56, 56),
        vocab_size: int = 8256,
        codebook_size: int = 8192,
        downsample: bool = True,
        upsample: bool = True,
        sample_size: int | None = None,
    ):
        super().__init__()
        heads, head_dim = num_attention_heads, attention_head_dim
        width = heads * head_dim
        _check(width, head_dim, pooled_projection_dim, axes_dims_rope, guidance_embeds, downsample, upsample)
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(width, pooled_projection_dim)
        self.cond_embed = TimestepEmbedding(
            MICRO_CONDITIONS * MICRO_WIDTH + pooled_projection_dim, width, sample_proj_bias=False
        )
        self.context_embedder = nn.Linear(joint_attention_dim, width)
        self.encoder_proj_layer_norm = RMSNorm(width, EPS)
        self.embed = UVit2DConvEmbed(width, width, vocab_size, True, EPS, False)
        self.down_block, self.up_block = nn.ModuleDict(), nn.ModuleDict()
        if downsample:
            self.down_block["downsample"] = Downsample2D(width, use_conv=True, name="Conv2d_0", **RESAMPLING)
        if upsample:
            self.up_block["upsample"] = Upsample2D(
                width, use_conv_transpose=True, interpolate=False, name="conv", **RESAMPLING
            )
        self.project_to_hidden_norm = RMSNorm(width, EPS)
        self.project_to_hidden = nn.Linear(width, width, bias=False)
        self.transformer_blocks = nn.ModuleList(
            _published_norms(FluxTransformerBlock(width, heads, head_dim)) for _ in range(num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            _published_norms(FluxSingleTransformerBlock(width, heads, head_dim)) for _ in range(num_single_layers)
        )
        self.project_from_hidden_norm = RMSNorm(width, EPS)
        self.project_from_hidden = nn.Linear(width, width, bias=False)
        self.mlm_layer = ConvMlmLayer(width, width, False, True, EPS, codebook_size)
        self.pos_embed = FluxPosEmbed(10000, axes_dims_rope)
        self.gradient_checkpointing = False
        self._rotations: dict[tuple, tuple[Tensor, Tensor]] = {}

    @property
    def side(self) -> int:
        """Rows and columns of the token grid it was trained on; the blocks then see 32 x 32 in either layout."""
        return self.config.sample_size or (64 if self.config.downsample else 32)

    def forward(self, ids: Tensor, text: Tensor, pooled: Tensor, micro_conds: Tensor, timestep: Tensor) -> Tensor:
        """Logits (B, V, H, W) of ids (B, H, W): `mlm_layer` on what `hidden` gives for the same arguments."""
        return self.mlm_layer(self.hidden(ids, text, pooled, micro_conds, timestep))

    def hidden(self, ids: Tensor, text: Tensor, pooled: Tensor, micro_conds: Tensor, timestep: Tensor) -> Tensor:
        """What the head reads, (B, D, H, W).

        Args:
            ids: int64 (B, H, W), codes and the mask's id; H and W even where the config says `downsample`.
            text: (B, L, `joint_attention_dim`) states of the text encoder.
            pooled: (B, `pooled_projection_dim`), the pooled text.
            micro_conds: (B, 5): width and height in pixels, two crop coordinates, aesthetic score.
            timestep: (1,) for all rows, or (B,); multiplied by 1000 inside.
        """
        halved = 2 if self.config.downsample else 1
        if ids.shape[1] % halved or ids.shape[2] % halved:
            raise ValueError(f"grid {tuple(ids.shape[1:])}: this network halves it; expected even rows and columns")
        temb = self.time_and_text(pooled, micro_conds, timestep)  # (B, D)
        text = self.encoder_proj_layer_norm(self.context_embedder(text.to(self.dtype)))  # (B, L, D)
        x = self.embed(ids)  # (B, D, H, W)
        for block in self.down_block.values():
            x = block(x)  # (B, D, h, w), half the rows and columns
        rows, columns = x.shape[2:]
        x = self.project_to_hidden(self.project_to_hidden_norm(x.flatten(2).transpose(1, 2)))  # (B, h*w, D)
        rotation = self.rotations(text.shape[1], rows, columns)
        for block in [*self.transformer_blocks, *self.single_transformer_blocks]:
            text, x = self._run(block, x, text, temb, rotation)
        x = self.project_from_hidden(self.project_from_hidden_norm(x))
        x = x.transpose(1, 2).unflatten(2, (rows, columns))  # (B, D, h, w)
        for block in self.up_block.values():
            x = block(x)  # (B, D, H, W)
        return x

    def time_and_text(self, pooled: Tensor, micro_conds: Tensor, timestep: Tensor) -> Tensor:
        """The vector (B, D) that modulates every block.

        The time is multiplied in float32: bfloat16 would make 62976 of 63 * 1000, float16 infinity of 66 * 1000.
        """
        sinusoids = get_timestep_embedding(
            micro_conds.float().flatten(), MICRO_WIDTH, flip_sin_to_cos=True, downscale_freq_shift=0
        ).unflatten(0, (-1, MICRO_CONDITIONS))  # (B, 5, 256)
        cond = torch.cat([pooled, sinusoids.flatten(1)], 1).to(self.dtype)
        return self.time_text_embed(timestep.float() * 1000, self.cond_embed(cond))

    def rotations(self, length: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (length + rows * columns, head_dim) of the rotary positions; kept for the next call.

        Text tokens are at (0, 0, 0), image tokens at (0, row, column) of the grid the blocks work on.
        """
        key = (length, rows, columns, self.device)
        if key not in self._rotations:
            image = torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float())
            angles = self.pos_embed(torch.cat([torch.zeros(length, 3), image]))
            self._rotations[key] = tuple(part.to(self.device) for part in angles)
        return self._rotations[key]

    def _run(self, block: nn.Module, x: Tensor, text: Tensor, temb: Tensor, rotation: tuple) -> tuple[Tensor, Tensor]:
        """One block of either kind; its activations are computed again in the backward pass if asked for."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, x, text, temb, rotation)
        return block(x, text, temb, rotation)


def _published_norms(block: nn.Module) -> nn.Module:
    """Queries and keys of a block normalized as published: float32 inside also where the network is not."""
    for name, norm in list(block.attn.named_children()):
        if isinstance(norm, nn.RMSNorm):
            setattr(block.attn, name, RMSNorm(norm.normalized_shape[0], EPS))
    return block


def _check(
    width: int, head_dim: int, pooled: int, axes: Iterable[int], guidance: bool, downsample: bool, upsample: bool
) -> None:
    """Raise ValueError in one line for a config that is no Meissonic."""
    if pooled != width:
        raise ValueError(f"pooled_projection_dim={pooled}: expected heads * head_dim = {width}")
    if sum(axes) != head_dim or any(axis % 2 for axis in axes):
        raise ValueError(f"axes_dims_rope={list(axes)}: expected even numbers that add up to head_dim = {head_dim}")
    if guidance:
        raise ValueError("guidance_embeds=True: no published Meissonic has a guidance input; expected False")
    if downsample != upsample:
        raise ValueError(f"downsample={downsample}, upsample={upsample}: the two must agree")
