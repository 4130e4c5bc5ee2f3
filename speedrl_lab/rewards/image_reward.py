"""ImageReward-v1.0 (Xu et al., arXiv 2304.05977): its published BLIP weights on transformers' BLIP classes."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from speedrl_lab.generators.folder import fill
from speedrl_lab.rewards import Reward
from speedrl_lab.rewards.files import cached_file, find_file, how_to_fetch, identify, offline, read_state, why
from speedrl_lab.rewards.preprocess import Preprocess
from speedrl_lab.rewards.scoring import ScoreHead, make_reward, once_a_prompt

REPOSITORY, FILE = "THUDM/ImageReward", "ImageReward.pt"
TOKENIZER_REPOSITORIES, TOKENIZER_FILES = ("google-bert/bert-base-uncased", "bert-base-uncased"), (
    "tokenizer.json", "vocab.txt",
)  # fmt: skip
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw score over the authors' data; the reward is z-scored by them."""
MAX_WORDS = 35
"""Longer prompts are cut off, as published."""
HEAD_WIDTH = 64
"""Features of an attention head in every published BLIP."""
VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)
"""Published names of the picture tower, and transformers' names for them; those of the text tower agree."""


class ImageReward(nn.Module):
    """BLIP's text encoder reads the prompt while it looks at the picture; a linear head scores its first token."""

    def __init__(self, sizes: dict[str, dict[str, Any]]):
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        self.vision = BlipVisionModel(BlipVisionConfig(**sizes["vision"], layer_norm_eps=1e-6))
        self.text = BlipTextModel(BlipTextConfig(**sizes["text"], layer_norm_eps=1e-12), add_pooling_layer=False)
        self.mlp = ScoreHead(sizes["text"]["hidden_size"])

    def forward(self, pixels: Tensor, words: Tensor) -> Tensor:
        """Scores (B,) of preprocessed pictures and word ids (B, MAX_WORDS), 0 where there is no word."""
        seen = self.vision(pixels).last_hidden_state  # (B, patches + 1, D)
        read = self.text(
            words, attention_mask=(words != 0).long(), encoder_hidden_states=seen, is_decoder=False
        ).last_hidden_state  # (B, L, D)
        return (self.mlp(read[:, 0]) - MEAN) / STD


def image_reward(path: str = "", device: torch.device | str = "cpu") -> Reward:
    """ImageReward-v1.0: how much people like the picture for its prompt, about -2 to 2, often below 0.

    `path` is ImageReward.pt or its folder; the tokenizer of bert-base-uncased lies beside it or in the
    hub's local cache. Float32 everywhere, as published.
    """
    file = find_file(path, "imagereward", REPOSITORY, FILE)
    tokenizer = load_tokenizer(file.parent)
    network = load_image_reward(file).to(device)
    preprocess = Preprocess(network.vision.config.image_size)

    def encode(prompts: Sequence[str]) -> Tensor:
        texts = tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_WORDS, return_tensors="pt"
        )
        return texts["input_ids"].to(device)

    words = once_a_prompt(encode)

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return network(preprocess(images), words(prompts))

    return make_reward(score, device, f"ImageReward-v1.0, {identify(file)}; {preprocess}", half=False)


def load_image_reward(file: Path) -> ImageReward:
    """The network of a published file; sizes are read off its tensors. ValueError in one line where it does not fit."""
    state = translate(read_state(file), file)
    with torch.random.fork_rng(devices=[]):  # constructors draw from the global generator
        network = ImageReward(sizes_of(state, file))
    fill(network, state, file)
    return network.eval()


def translate(published: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Published names to those of `ImageReward`; ValueError for a name of the scoring towers that nobody knows.

    BLIP's projections for contrastive training (`vision_proj`, `text_proj`) take no part in the score.
    """
    state = {}
    for name, value in published.items():
        if name.startswith("blip.visual_encoder."):
            inner = name.removeprefix("blip.visual_encoder.")
            matches = [re.sub(pattern, new, inner) for pattern, new in VISION_NAMES if re.match(pattern, inner)]
            if not matches:
                raise ValueError(f"{file} has an unknown tensor {name}; expected ImageReward-v1.0's published names")
            state["vision." + matches[0]] = value
        elif name.startswith("blip.text_encoder."):
            if not name.endswith("embeddings.position_ids"):  # 0, 1, 2, ...
                state["text." + name.removeprefix("blip.text_encoder.")] = value
        elif name.startswith("mlp."):
            state[name] = value
        elif not name.startswith("blip."):
            raise ValueError(f"{file} has an unknown tensor {name}; expected names that begin with blip. or mlp.")
    return state


def sizes_of(state: dict[str, Tensor], file: Path) -> dict[str, dict[str, Any]]:
    """Constructor arguments of both towers, from the shapes of their tensors; ValueError where one is missing."""
    try:
        patches = state["vision.embeddings.patch_embedding.weight"]  # (D, 3, p, p)
        positions = state["vision.embeddings.position_embedding"].shape[1] - 1
        vision_up = state["vision.encoder.layers.0.mlp.fc1.weight"]
        words = state["text.embeddings.word_embeddings.weight"]
        places = state["text.embeddings.position_embeddings.weight"]
        text_up = state["text.encoder.layer.0.intermediate.dense.weight"]
    except KeyError as error:
        raise ValueError(f"{file} lacks the tensor {error.args[0]}; expected ImageReward-v1.0's layout") from None
    vision = {
        "hidden_size": patches.shape[0],
        "patch_size": patches.shape[2],
        "image_size": round(positions**0.5) * patches.shape[2],
        "intermediate_size": vision_up.shape[0],
        "num_hidden_layers": _depth(state, r"vision\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": patches.shape[0] // HEAD_WIDTH,
    }
    text = {
        "vocab_size": words.shape[0],
        "hidden_size": words.shape[1],
        "encoder_hidden_size": patches.shape[0],
        "intermediate_size": text_up.shape[0],
        "num_hidden_layers": _depth(state, r"text\.encoder\.layer\.(\d+)\."),
        "num_attention_heads": words.shape[1] // HEAD_WIDTH,
        "max_position_embeddings": places.shape[0],
    }
    return {"vision": vision, "text": text}


def _depth(state: dict[str, Tensor], pattern: str) -> int:
    return 1 + max(int(match[1]) for match in map(re.compile(pattern).match, state) if match)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of bert-base-uncased, from a folder or the hub's local cache; FileNotFoundError in one line."""
    from transformers import BertTokenizerFast

    places = [folder / name for name in TOKENIZER_FILES]
    places += [cached_file(repository, name) for repository in TOKENIZER_REPOSITORIES for name in TOKENIZER_FILES]
    found = next((place for place in places if place and place.is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"reward 'imagereward': no tokenizer in {folder} or the hub's local cache; wanted: "
            f"{' or '.join(TOKENIZER_FILES)} of repository {TOKENIZER_REPOSITORIES[0]} "
            f"({how_to_fetch(TOKENIZER_REPOSITORIES[0], TOKENIZER_FILES[:1])}); nothing is fetched by a run"
        )
    try:
        with offline():
            return BertTokenizerFast.from_pretrained(str(found.parent), local_files_only=True)
    except Exception as error:
        raise ValueError(f"{found} cannot be read as a BERT tokenizer: {why(error)}") from None
