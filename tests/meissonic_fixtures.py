"""A tiny Meissonic whose weights depend on the names of its tensors alone, as a network and as a published folder."""

import json
import math
import zlib
from pathlib import Path

import torch
from published_fixtures import save_codec, save_index, save_scheduler, save_text_encoder, save_tokenizer
from torch import nn

TINY = {
    "patch_size": 1, "in_channels": 64, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 32, "axes_dims_rope": [4, 6, 6],
    "vocab_size": 40, "codebook_size": 32, "guidance_embeds": False, "downsample": True, "upsample": True,
    "sample_size": 8,
}  # fmt: skip


def fill(network: nn.Module) -> nn.Module:
    """Fill a network, strictly, with normal numbers from the crc32 of each key, scales of norms around 1."""
    state = {}
    for key, value in network.state_dict().items():
        drawn = torch.randn(value.shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
        if value.ndim > 1:
            state[key] = drawn / math.sqrt(value.numel() // value.shape[0])
        else:
            state[key] = 1 + 0.1 * drawn if key.endswith(".weight") else 0.1 * drawn
    network.load_state_dict(state, strict=True)
    return network.eval()


def build_tiny_meissonic(folder: Path | str, layout_1024: bool = True, seed: int = 0) -> Path:
    """A Meissonic of 8x8 tokens, 32 codes and 32x32 pixels; `layout_1024` halves the grid, as at 1024 pixels."""
    from speedrl_lab.generators.meissonic_transformer import MeissonicTransformer

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):  # constructors draw from the global generator
        network = MeissonicTransformer(**TINY | {"downsample": layout_1024, "upsample": layout_1024})
        fill(network).save_pretrained(folder / "transformer")
        save_codec(folder / "vqvae", TINY["codebook_size"], seed + 1)
        save_text_encoder(folder / "text_encoder", TINY["joint_attention_dim"], TINY["pooled_projection_dim"], seed + 2)
    change_config(folder, _class_name="Transformer2DModel", _diffusers_version="0.30.2")  # as published
    save_tokenizer(folder / "tokenizer")
    save_scheduler(folder / "scheduler", TINY["vocab_size"] - 1)
    save_index(folder, "Pipeline", ("transformer", "Transformer2DModel"))
    return folder


def change_config(folder: Path, **changes: object) -> None:
    """Replace keys of the network's config file; None takes a key away."""
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
