"""The published networks at full size without weights, on the meta device: to plan a run before a download.

Sizes are those of the published configs: amused/amused-256 and -512, MeissonFlow/Meissonic, and Halton-MaskGIT's
large network at 384 pixels with LlamaGen's VQ-16. Text encoders: CLIP's ViT-L-14 and ViT-H-14.
"""

from collections.abc import Sequence
from typing import Any

import torch

from speedrl_lab.config import nearest
from speedrl_lab.generator import Cond, GeneratorSpec, MaskedGenerator
from speedrl_lab.generators.folder import require_libraries

NAMES = ("amused-256", "amused-512", "meissonic", "maskgit")
AMUSED = {
    "hidden_size": 1024, "cond_embed_dim": 768, "micro_cond_encode_dim": 256, "micro_cond_embed_dim": 1280,
    "encoder_hidden_size": 768, "vocab_size": 8256, "codebook_size": 8192, "in_channels": 768,
    "block_out_channels": 768, "num_res_blocks": 3, "block_num_heads": 12, "num_hidden_layers": 22,
    "num_attention_heads": 16, "intermediate_size": 2816, "use_bias": False,
}  # fmt: skip
VQ = {
    "down_block_types": ("DownEncoderBlock2D",) * 5, "up_block_types": ("UpDecoderBlock2D",) * 5,
    "block_out_channels": (128, 256, 256, 512, 768), "layers_per_block": 2, "latent_channels": 64,
    "num_vq_embeddings": 8192, "mid_block_add_attention": False, "lookup_from_codebook": True, "force_upcast": True,
}  # fmt: skip
TEXT = {
    "amused": {"hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768, "num_hidden_layers": 12,
               "num_attention_heads": 12},
    "meissonic": {"hidden_size": 1024, "intermediate_size": 4096, "projection_dim": 1024, "num_hidden_layers": 24,
                  "num_attention_heads": 16},
}  # fmt: skip
WORDS = 77  # of a caption, padding among them


def blank_generator(name: str) -> MaskedGenerator:
    """A generator of the published size whose tensors have shapes and no values.

    Names are those of the presets: amused-256, amused-512, meissonic, maskgit. Its `null` gives conditions; there
    is no tokenizer, so that it encodes no prompt. Raises ValueError for another name, ImportError for a missing
    library.
    """
    if name not in NAMES:
        raise ValueError(f"no published size {name!r}; nearest: {nearest(name, list(NAMES))!r} (of {', '.join(NAMES)})")
    with torch.random.fork_rng(devices=[]), torch.device("meta"):  # constructors draw from the global generator
        return _maskgit() if name == "maskgit" else _text_to_image(name)


def _maskgit() -> MaskedGenerator:
    from speedrl_lab.generators.llamagen_vq import LlamaGenVQ
    from speedrl_lab.generators.maskgit import MaskGitGenerator
    from speedrl_lab.generators.maskgit_transformer import MaskGitTransformer

    return MaskGitGenerator(MaskGitTransformer().eval(), LlamaGenVQ().eval())


def _text_to_image(name: str) -> MaskedGenerator:
    family = name.partition("-")[0]
    require_libraries(family)
    from diffusers import UVit2DModel, VQModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    if family == "amused":
        from speedrl_lab.generators.amused import AmusedGenerator as Generator

        halved = name.endswith("512")
        side = 32 if halved else 16
        network = UVit2DModel(**AMUSED, downsample=halved, upsample=halved, sample_size=side)
    else:
        from speedrl_lab.generators.meissonic import MeissonicGenerator as Generator
        from speedrl_lab.generators.meissonic_transformer import MeissonicTransformer

        network = MeissonicTransformer()
        side = network.side
    codec, reader = VQModel(**VQ), CLIPTextModelWithProjection(CLIPTextConfig(**TEXT[family]))
    spec = GeneratorSpec(
        name=name,
        grid=(side, side),
        image_size=(16 * side, 16 * side),
        codebook_size=8192,
        mask_id=8255,
        conditioning="text",
        time_input="step_index" if family == "meissonic" else "none",
    )
    return _without_words(Generator)(spec, network, codec, None, reader)


def _without_words(kind: type) -> type:
    """The same generator, whose conditions have no values."""

    class Blank(kind):
        def encode(self, prompts: Sequence[str]) -> Cond:
            sizes: Any = self.text_encoder.config
            count, device = len(prompts), self.device
            return Cond({
                "text": torch.empty(count, WORDS, sizes.hidden_size, device=device),
                "pooled": torch.empty(count, sizes.projection_dim, device=device),
            })

    return Blank
