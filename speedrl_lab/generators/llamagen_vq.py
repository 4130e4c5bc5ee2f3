"""The VQ-16 image tokenizer of LlamaGen, with the names of its published weights.

A convolutional autoencoder around a codebook of unit vectors (Sun et al., arXiv 2406.06525; layers of taming's
VQGAN, arXiv 2012.09841): 16384 codes of 8 channels, one for 16x16 pixels. Frozen here: what only its training
needs is left out. Comments give shapes with B pictures, C channels, K code channels, h x w the token grid.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class GroupNorm(nn.GroupNorm):
    """32 groups, epsilon 1e-6."""

    def __init__(self, channels: int):
        super().__init__(32, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, added to the input."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1 = GroupNorm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = GroupNorm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(functional.silu(self.norm1(x)))
        y = self.conv2(functional.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionBlock(nn.Module):
    """Self-attention of one head over all pixels, added to the input."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = GroupNorm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))  # (B, HW, C)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # (B, C, HW)
        return x + self.proj_out(mixed.unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Halves height and width; the padding is on the right and below only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width by repetition, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, and the step to the next."""

    def __init__(self, inputs: int, outputs: int, blocks: int, attends: bool):
        super().__init__()
        self.res = nn.ModuleList(ResidualBlock(outputs if k else inputs, outputs) for k in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(outputs) for _ in range(blocks if attends else 0))
        self.downsample = self.upsample = nn.Identity()  # has no weights, so no names

    def forward(self, x: Tensor) -> Tensor:
        for k, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[k](x)
        return self.upsample(self.downsample(x))


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList(
        [ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels)]
    )


class _Pyramid(nn.Module):
    """What encoder and decoder share: the last convolution's norm, and a list of layers in turn."""

    def _run(self, x: Tensor, layers: Sequence[nn.Module]) -> Tensor:
        for layer in layers:
            x = layer(x)
        return self.conv_out(functional.silu(self.norm_out(x)))


class Encoder(_Pyramid):
    """Pictures (B, 3, H, W) to latents (B, latent, h, w)."""

    def __init__(self, width: int, multipliers: Sequence[int], blocks: int, latent: int):
        super().__init__()
        widths = [width, *(width * multiplier for multiplier in multipliers)]
        last = len(multipliers) - 1
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(widths[k], widths[k + 1], blocks, attends=k == last) for k in range(len(multipliers))
        )
        for k in range(last):
            self.conv_blocks[k].downsample = Downsample(widths[k + 1])
        self.mid = _middle(widths[-1])
        self.norm_out = GroupNorm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, [self.conv_in, *self.conv_blocks, *self.mid])


class Decoder(_Pyramid):
    """Latents (B, latent, h, w) to pictures (B, 3, H, W); one block a level more than the encoder."""

    def __init__(self, width: int, multipliers: Sequence[int], blocks: int, latent: int):
        super().__init__()
        widths = [width * multiplier for multiplier in (multipliers[-1], *reversed(multipliers))]
        self.conv_in = nn.Conv2d(latent, widths[0], 3, padding=1)
        self.mid = _middle(widths[0])
        self.conv_blocks = nn.ModuleList(
            Level(widths[k], widths[k + 1], blocks + 1, attends=k == 0) for k in range(len(multipliers))
        )
        for k in range(len(multipliers) - 1):
            self.conv_blocks[k].upsample = Upsample(widths[k + 1])
        self.norm_out = GroupNorm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, [self.conv_in, *self.mid, *self.conv_blocks])


class Codebook(nn.Module):
    """Unit vectors; the nearest one to a latent is that of the largest cosine."""

    def __init__(self, codes: int, channels: int):
        super().__init__()
        # nn.Embedding's own normal numbers cost seconds of imports on the meta device.
        self.embedding = nn.Embedding.from_pretrained(torch.empty(codes, channels).uniform_(-1, 1), freeze=False)
        self.register_buffer("codebook_used", torch.zeros(65536))  # a record of training, in every published file

    def vectors(self) -> Tensor:
        """All codes on the unit sphere, (codes, K)."""
        return functional.normalize(self.embedding.weight, dim=-1)

    def lookup(self, codes: Tensor) -> Tensor:
        """Vectors (..., K) of codes (...)."""
        return self.vectors()[codes]

    def nearest(self, latents: Tensor) -> Tensor:
        """Codes (...), int64, of latents (..., K) of any length."""
        return (functional.normalize(latents, dim=-1) @ self.vectors().T).argmax(-1)


class LlamaGenVQ(nn.Module):
    """The tokenizer. The defaults are the published VQ-16.

    Args:
        width: channels at full resolution, a multiple of 32; `multipliers` scale it level by level.
        blocks: residual blocks a level of the encoder.
        latent: channels between the networks and the codebook's projections.
    """

    def __init__(
        self,
        codebook_size: int = 16384,
        code_channels: int = 8,
        width: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        latent: int = 256,
    ):
        super().__init__()
        self.codebook_size = codebook_size
        self.patch = 2 ** (len(multipliers) - 1)  # pixels along a token
        self.encoder = Encoder(width, multipliers, blocks, latent)
        self.decoder = Decoder(width, multipliers, blocks, latent)
        self.quantize = Codebook(codebook_size, code_channels)
        self.quant_conv = nn.Conv2d(latent, code_channels, 1)
        self.post_quant_conv = nn.Conv2d(code_channels, latent, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] to codes, int64 (B, h, w)."""
        latents = self.quant_conv(self.encoder(images * 2 - 1))  # (B, K, h, w); the network's pixels are in [-1, 1]
        return self.quantize.nearest(latents.movedim(1, -1))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) to pictures, float32 (B, 3, H, W) in [0, 1]."""
        latents = self.post_quant_conv(self.quantize.lookup(codes).movedim(-1, 1))  # (B, latent, h, w)
        return (self.decoder(latents).float() * 0.5 + 0.5).clamp(0, 1)


def vq_from(state: Mapping[str, Tensor]) -> LlamaGenVQ:
    """The frozen tokenizer of a published state dict, float32, in eval mode.

    Raises KeyError or RuntimeError (of the strict load) for weights that are not of this network.
    """
    width = len(state["encoder.conv_in.weight"])
    codebook_size, code_channels = state["quantize.embedding.weight"].shape
    places = {tuple(name.split(".")[2:5]) for name in state if name.startswith("encoder.conv_blocks.")}
    levels = {level for level, *_ in places}
    firsts = [state[f"encoder.conv_blocks.{level}.res.0.conv1.weight"] for level in range(len(levels))]
    with torch.device("meta"):
        network = LlamaGenVQ(
            codebook_size=codebook_size,
            code_channels=code_channels,
            width=width,
            multipliers=[len(first) // width for first in firsts],
            blocks=sum(level == "0" and kind == "res" for level, kind, _ in places),
            latent=state["quant_conv.weight"].shape[1],
        )
    network.load_state_dict({name: value.float().clone() for name, value in state.items()}, strict=True, assign=True)
    return network.eval().requires_grad_(False)
