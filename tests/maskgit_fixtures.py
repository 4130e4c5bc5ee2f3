"""Tiny random MaskGIT files in the published layout; names and shapes are written here, not read from the package.

Sources: the transformer of valeoai/Halton-MaskGIT and the tokenizer of FoundationVision/LlamaGen.
"""

import math
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

TINY = {"side": 8, "width": 32, "depth": 2, "heads": 2, "codes": 64}
TINY_VQ = {"codes": 64, "channels": 8, "width": 32, "multipliers": (1, 1, 2), "latent": 32}


def transformer_shapes(side: int, width: int, depth: int, heads: int, codes: int = 16384) -> Shapes:
    """Names and shapes of a published transformer."""
    inner, hidden = heads * (width // heads), math.ceil(int(2 * 4 * width / 3) / 256) * 256
    shapes: Shapes = {
        "cls_emb.weight": (1001, width),
        "tok_emb.weight": (codes + 1, width),
        "pos_emb.weight": (side * side, width),
        "reg_tokens.weight": (1, width),
        "last_norm.norm_final.weight": (width,),
        "last_norm.norm_final.bias": (width,),
        "last_norm.mlp.1.weight": (2 * width, width),
        "last_norm.mlp.1.bias": (2 * width,),
        "head.weight": (codes + 1, width),
        "head.bias": (codes + 1,),
    }
    for layer in range(depth):
        block = {
            "mlp.1.weight": (6 * width, width), "mlp.1.bias": (6 * width,), "ln1.weight": (width,),
            "ln2.weight": (width,), "attn.wq.weight": (inner, width), "attn.wk.weight": (inner, width),
            "attn.wv.weight": (inner, width), "attn.wo.weight": (width, inner), "ff.w1.weight": (hidden, width),
            "ff.w2.weight": (width, hidden), "ff.w3.weight": (hidden, width),
        }  # fmt: skip
        shapes |= {f"transformer.layers.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


def _layer(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _residual(name: str, inputs: int, outputs: int) -> Shapes:
    shapes = _layer(f"{name}.norm1", inputs) | _layer(f"{name}.conv1", outputs, inputs, 3, 3)
    shapes |= _layer(f"{name}.norm2", outputs) | _layer(f"{name}.conv2", outputs, outputs, 3, 3)
    return shapes | (_layer(f"{name}.nin_shortcut", outputs, inputs, 1, 1) if inputs != outputs else {})


def _attention(name: str, width: int) -> Shapes:
    shapes = _layer(f"{name}.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        shapes |= _layer(f"{name}.{part}", width, width, 1, 1)
    return shapes


def vq_shapes(
    codes: int = 16384,
    channels: int = 8,
    width: int = 128,
    multipliers: Iterable[int] = (1, 1, 2, 2, 4),
    latent: int = 256,
) -> Shapes:
    """Names and shapes of a published VQ tokenizer, the buffer `quantize.codebook_used` among them."""
    down = [width, *(width * m for m in multipliers)]
    up = [down[-1], *reversed(down[1:])]
    last = len(down) - 2
    shapes = {"quantize.embedding.weight": (codes, channels), "quantize.codebook_used": (65536,)}
    shapes |= _layer("quant_conv", channels, latent, 1, 1) | _layer("post_quant_conv", latent, channels, 1, 1)
    for side, widths, blocks, lowest, resample in (
        ("encoder", down, 2, last, "downsample"),
        ("decoder", up, 3, 0, "upsample"),
    ):
        for level in range(last + 1):
            name = f"{side}.conv_blocks.{level}"
            for k in range(blocks):
                shapes |= _residual(f"{name}.res.{k}", widths[level + (k > 0)], widths[level + 1])
                shapes |= _attention(f"{name}.attn.{k}", widths[level + 1]) if level == lowest else {}
            if level != last:
                shapes |= _layer(f"{name}.{resample}.conv", widths[level + 1], widths[level + 1], 3, 3)
        shapes |= _residual(f"{side}.mid.0", down[-1], down[-1]) | _residual(f"{side}.mid.2", down[-1], down[-1])
        shapes |= _attention(f"{side}.mid.1", down[-1]) | _layer(f"{side}.norm_out", widths[-1])
    shapes |= _layer("encoder.conv_in", width, 3, 3, 3) | _layer("encoder.conv_out", latent, down[-1], 3, 3)
    return shapes | _layer("decoder.conv_in", down[-1], latent, 3, 3) | _layer("decoder.conv_out", 3, width, 3, 3)


def filled(shapes: Shapes) -> dict[str, Tensor]:
    """Random weights, each tensor from a seed of its name; norm scales are near 1, the head is the embedding."""
    state = {}
    for name, shape in shapes.items():
        rng = torch.Generator().manual_seed(zlib.crc32(name.replace("head.weight", "tok_emb.weight").encode()))
        drawn = torch.randn(shape, generator=rng)
        if len(shape) == 1:
            state[name] = 1 + 0.1 * drawn if name.endswith(".weight") else 0.1 * drawn
        else:
            state[name] = drawn / math.sqrt(math.prod(shape[1:]))
    if "head.weight" in state:
        state["head.weight"] = state["tok_emb.weight"]
    return state


def tiny_state() -> dict[str, Tensor]:
    """The tiny transformer: 8x8 tokens of 64 codes."""
    return filled(transformer_shapes(**TINY))


def tiny_vq_state() -> dict[str, Tensor]:
    """The tiny tokenizer: 4x4 pixels a token."""
    return filled(vq_shapes(**TINY_VQ))


def build_tiny_maskgit(folder: Path) -> Path:
    """Write both files as the published ones are; returns the path of the transformer's."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "ImageNet_32_test.pth"
    checkpoint = {"iter": 3, "global_epoch": 1, "optimizer_state_dict": None, "config": {"heads": TINY["heads"]}}
    # As a compiled network in DistributedDataParallel is saved.
    checkpoint["model_state_dict"] = {f"module._orig_mod.{name}": value for name, value in tiny_state().items()}
    torch.save(checkpoint, file)
    torch.save({"model": tiny_vq_state()}, folder / "vq_ds16_c2i.pt")
    return file
