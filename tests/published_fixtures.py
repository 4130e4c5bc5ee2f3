"""Tiny text-to-image models with random weights, saved in the published folder layout."""

import json
from pathlib import Path

import torch
from torch import nn

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
MERGES = ["d o", "do g</w>", "c a", "ca t</w>"]
SPECIAL = ["<|startoftext|>", "<|endoftext|>"]  # the last ids, as in CLIP


@torch.no_grad()
def fill(module: nn.Module, seed: int) -> nn.Module:
    """Random weights that keep the size of what passes through: norms near 1, the rest over sqrt(inputs)."""
    rng = torch.Generator().manual_seed(seed)
    for name, value in module.named_parameters():
        noise = torch.randn(value.shape, generator=rng)
        if value.ndim == 1:
            value.copy_(name.endswith("weight") + 0.1 * noise)
        else:
            value.copy_(noise / (value.numel() / value.shape[0]) ** 0.5)
    return module.eval()


def save_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer of letters, digits and the words `dog` and `cat`: vocab.json and merges.txt."""
    folder.mkdir(parents=True)
    words = [*LETTERS, *(letter + "</w>" for letter in LETTERS), *(pair.replace(" ", "") for pair in MERGES), *SPECIAL]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    tokens = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "unk_token": SPECIAL[1], "pad_token": SPECIAL[1]}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def save_text_encoder(folder: Path, width: int, projection: int, seed: int) -> None:
    """A CLIP text encoder of three layers for `save_tokenizer`'s ids."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=2 * len(LETTERS) + len(MERGES) + len(SPECIAL), hidden_size=width, intermediate_size=2 * width,
        projection_dim=projection, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=77,
        bos_token_id=0, eos_token_id=2,  # as published: "take the largest id"
    )  # fmt: skip
    fill(CLIPTextModelWithProjection(config), seed).save_pretrained(folder)


def save_codec(folder: Path, codes: int, seed: int) -> None:
    """A VQModel of 4x4 pixels a token."""
    from diffusers import VQModel

    codec = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16), layers_per_block=1, latent_channels=8, sample_size=32, num_vq_embeddings=codes,
        norm_num_groups=4, mid_block_add_attention=False, lookup_from_codebook=True, force_upcast=True,
    )  # fmt: skip
    fill(codec, seed).save_pretrained(folder)


def save_scheduler(folder: Path, mask_id: int) -> None:
    from diffusers import AmusedScheduler

    AmusedScheduler(mask_token_id=mask_id).save_pretrained(folder)


def save_index(folder: Path, pipeline: str, transformer: tuple[str, str]) -> None:
    """model_index.json: which class reads which part."""
    parts = {
        "transformer": transformer,
        "vqvae": ("diffusers", "VQModel"),
        "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "scheduler": ("diffusers", "AmusedScheduler"),
    }
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **parts}, indent=1))


def build_tiny_amused(folder: Path | str, resampling: bool = True, seed: int = 0) -> Path:
    """A random aMUSEd of 8x8 tokens, 32 codes and 32x32 pixels; `resampling` is the 512-pixel layout."""
    from diffusers import UVit2DModel

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):  # constructors draw from the global generator
        network = UVit2DModel(
            hidden_size=32, cond_embed_dim=24, micro_cond_encode_dim=8, micro_cond_embed_dim=40,
            encoder_hidden_size=16, vocab_size=40, codebook_size=32, in_channels=16, block_out_channels=16,
            num_res_blocks=1, downsample=resampling, upsample=resampling, block_num_heads=2, num_hidden_layers=2,
            num_attention_heads=2, intermediate_size=48, sample_size=8,
        )  # fmt: skip
        fill(network, seed).save_pretrained(folder / "transformer")
        save_codec(folder / "vqvae", 32, seed + 1)
        save_text_encoder(folder / "text_encoder", 16, 24, seed + 2)
    save_tokenizer(folder / "tokenizer")
    save_scheduler(folder / "scheduler", 39)
    save_index(folder, "AmusedPipeline", ("diffusers", "UVit2DModel"))
    return folder
