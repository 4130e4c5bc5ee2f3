"""Rewards with published weights: tiny random networks in the published layouts, against the libraries' own code."""

import doctest
import json
import math
import pickle
import socket
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import randomize
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torchvision import transforms

import speedrl_lab.rewards
from speedrl_lab.rewards import build_rewards, clip_family, describe_rewards, image_reward, scoring
from speedrl_lab.rewards.files import identify, read_state
from speedrl_lab.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocess

open_clip = pytest.importorskip("open_clip")
MODEL = "tiny-reward"
PROMPTS = ["a dog", "two cats on a red background", "a dog"]
ROUNDING = 2.0 / 255 / min(CLIP_STD)
"""PIL rounds to 8 bits after either pass of a resize."""


@pytest.fixture(autouse=True)
def unplugged(monkeypatch, tmp_path_factory):
    """No test may open a connection, and the hub's cache is empty."""

    def refuse(*args, **kwargs):
        raise AssertionError("a reward reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture(scope="module", autouse=True)
def tiny_model(tmp_path_factory) -> None:
    """A CLIP of two blocks that open_clip knows by name."""
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    path = tmp_path_factory.mktemp("models") / f"{MODEL}.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)


def random_clip(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return randomize(open_clip.create_model(MODEL), seed, std=0.1).eval()


def pictures(count: int = 3, height: int = 48, width: int = 48) -> Tensor:
    """Smooth pictures in 8 bits with a sharp edge where they are not tall, (B, 3, H, W) in [0, 1]."""
    rng = torch.Generator().manual_seed(0)
    images = functional.interpolate(torch.rand(count, 3, 6, 6, generator=rng), (height, width), mode="bilinear")
    if height <= width:  # else versions of PIL differ in what they clip
        images[:, :, height // 3 : height // 2, width // 4 : width // 2] = 1.0
    return (images * 255).round() / 255


def pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())


# Preprocessing


@pytest.mark.parametrize("shape", [(48, 48), (20, 20), (32, 32), (40, 64), (64, 40)])
@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_preprocessing_is_open_clips(shape, resize, interpolation):
    images = pictures(2, *shape)
    theirs = open_clip.image_transform(
        32, is_train=False, mean=CLIP_MEAN, std=CLIP_STD, resize_mode=resize, interpolation=interpolation
    )
    expected = torch.stack([theirs(pil(image)) for image in images])
    ours = Preprocess(32, resize=resize, interpolation=interpolation)(images)
    assert ours.dtype == torch.float32 and ours.shape == (2, 3, 32, 32)
    assert float((ours - expected).abs().max()) <= ROUNDING


@pytest.mark.parametrize("shape", [(48, 48), (40, 64), (51, 32)])
def test_preprocessing_is_transformers(shape):
    transformers = pytest.importorskip("transformers")
    images = pictures(2, *shape)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    expected = processor([pil(image) for image in images], return_tensors="pt")["pixel_values"]
    assert float((Preprocess(32, crop="floor")(images) - expected).abs().max()) <= ROUNDING


@pytest.mark.parametrize("shape", [(48, 48), (40, 64), (71, 33)])
def test_preprocessing_of_hps_resizes_floats_and_pads(shape):
    """As published: to floats, the longest side resized, black borders, then mean and std."""
    images = pictures(2, *shape)
    scale = 32 / max(shape)
    small = transforms.Resize([round(side * scale) for side in shape], transforms.InterpolationMode.BICUBIC)(images)
    black = torch.zeros(2, 3, 32, 32)
    top, left = ((32 - side) // 2 for side in small.shape[-2:])
    black[:, :, top : top + small.shape[2], left : left + small.shape[3]] = small
    expected = transforms.Normalize(CLIP_MEAN, CLIP_STD)(black)
    ours = Preprocess(32, resize="longest", saturate=False)(images)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    if shape != (71, 33):  # no sharp edge that overshoots
        assert float((ours - Preprocess(32, resize="longest")(images)).abs().max()) > 0.05


def test_preprocessing_takes_any_float():
    images = pictures()
    torch.testing.assert_close(Preprocess(32)(images.bfloat16()), Preprocess(32)(images), atol=0.05, rtol=0)
    assert "shortest side to 32 px, centre crop, bicubic" in str(Preprocess(32))


# open_clip and HPSv2.1


def cosines(network: nn.Module, pixels: Tensor, prompts: list[str]) -> Tensor:
    """The library's own scores, one picture at a time."""
    tokens = open_clip.get_tokenizer(MODEL)(prompts)
    with torch.no_grad():
        rows = zip(pixels, tokens, strict=True)
        pairs = [network(image[None], text[None]) for image, text in rows]
    return torch.cat([(image * text).sum(1) for image, text, *_ in pairs])


@pytest.mark.parametrize("ending", ["pt", "safetensors", "bin"])
def test_open_clip_scores_are_the_librarys(tmp_path, ending):
    network, path, images = random_clip(), tmp_path / f"weights.{ending}", pictures()
    if ending == "safetensors":
        save_file({name: value.contiguous() for name, value in network.state_dict().items()}, path)
    else:
        torch.save(network.state_dict(), path)
    name = f"open_clip:{MODEL}:{path}"
    reward = build_rewards([name])[name]
    scores = reward(images, PROMPTS, None)
    assert scores.shape == (3,) and scores.dtype == torch.float32 and not scores.requires_grad
    torch.testing.assert_close(scores, cosines(network, Preprocess(32)(images), PROMPTS), atol=1e-5, rtol=0)
    theirs = open_clip.image_transform(32, is_train=False, mean=CLIP_MEAN, std=CLIP_STD)
    expected = cosines(network, torch.stack([theirs(pil(image)) for image in images]), PROMPTS)
    torch.testing.assert_close(scores, expected, atol=5e-3, rtol=0)
    assert float(scores[0] - scores[2]) != 0 and float((scores - expected.flip(0)).abs().max()) > 0.01
    assert describe_rewards({name: reward})[name].startswith(f"open_clip {MODEL}, {identify(path)}; shortest side")


def save_hps(network: nn.Module, path: Path) -> Path:
    torch.save({"epoch": 1, "name": "hps", "state_dict": network.state_dict()}, path)
    return path


def test_hps_reads_the_published_layout(tmp_path):
    network, images = random_clip(1), pictures(3, 40, 64)
    path = save_hps(network, tmp_path / clip_family.HPS_FILE)
    reward = clip_family.hps_reward(str(tmp_path), model=MODEL)  # a folder will do
    pixels = Preprocess(32, resize="longest", saturate=False)(images)
    torch.testing.assert_close(reward(images, PROMPTS, None), cosines(network, pixels, PROMPTS), atol=1e-5, rtol=0)
    assert identify(path) in reward.record and "longest side to 32 px" in reward.record


def test_hps_refuses_what_does_not_fit(tmp_path):
    network = random_clip().state_dict()
    del network["text_projection"]
    torch.save({"state_dict": network}, tmp_path / "part.pt")
    with pytest.raises(ValueError, match="does not fit open_clip's tiny-reward"):
        clip_family.hps_reward(str(tmp_path / "part.pt"), model=MODEL)


class Unsafe:
    def __reduce__(self):
        return print, ("code from a pickle",)


def test_pickled_code_is_refused(tmp_path, capsys):
    path = tmp_path / "unsafe.pt"
    path.write_bytes(pickle.dumps({"state_dict": Unsafe()}, protocol=2))
    torch.save({"state_dict": {"x": torch.ones(1)}, "hook": Unsafe()}, tmp_path / "zip.pt")
    for file in (path, tmp_path / "zip.pt"):
        with pytest.raises(ValueError, match="code in pickles is never run"):
            read_state(file)
        with pytest.raises(ValueError, match="code in pickles is never run"):
            clip_family.hps_reward(str(file), model=MODEL)
    assert "code from a pickle" not in capsys.readouterr().out


def test_weights_are_found_in_the_hubs_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--xswu--HPSv2"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    path = save_hps(random_clip(1), folder / "snapshots" / "abc" / clip_family.HPS_FILE)
    assert identify(path) in clip_family.hps_reward(model=MODEL).record
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False  # closed only while a model is built


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("open_clip", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
        ("open_clip:ViT-L-14:openai", "timm/vit_large_patch14_clip_224.openai"),
        ("hpsv2.1", "xswu/HPSv2"),
        ("pickscore", "yuvalkirstain/PickScore_v1"),
        ("imagereward", "THUDM/ImageReward"),
        ("aesthetic", "github.com/christophschuhmann/improved-aesthetic-predictor"),
        ("hpsv2.1:nowhere.pt", "xswu/HPSv2"),
        ("pickscore:nowhere@cpu", "yuvalkirstain/PickScore_v1"),
    ],
)
def test_missing_weights_say_what_and_where(name, repository):
    with pytest.raises(FileNotFoundError) as caught:
        build_rewards([name])
    message = str(caught.value)
    assert repository in message and "wanted: " in message and "\n" not in message
    assert name.split(":")[0].split("@")[0] in message and "nothing is fetched" in message


def test_names_that_do_not_exist():
    with pytest.raises(ValueError, match="unknown reward 'hpsv2:x.pt'; nearest: 'hpsv2.1'"):
        build_rewards(["clip", "hpsv2:x.pt"])
    with pytest.raises(ValueError, match="unknown reward 'clip:x'; nearest: 'clip'"):
        build_rewards(["clip:x"])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device='cuda:1' cannot be used"):
            build_rewards(["hpsv2.1@cuda:1"])
    with pytest.raises(ValueError, match="unknown open_clip model 'ViT-B-33'; nearest: 'ViT-B-3"):
        build_rewards(["open_clip:ViT-B-33:openai"])
    with pytest.raises(FileNotFoundError, match="no file or tag 'laion9b'; expected a weights file or one of"):
        build_rewards(["open_clip:ViT-B-32:laion9b"])


def test_the_tag_settles_activation_and_preprocessing(tmp_path, monkeypatch):
    """OpenAI's weights need QuickGELU; SigLIP's squash and centre at .5."""
    assert open_clip.get_pretrained_cfg("ViT-B-32", "openai")["quick_gelu"]
    seen = {}

    def record(model, **settings):
        seen.update(settings)
        raise RuntimeError("enough")

    monkeypatch.setattr(open_clip, "create_model", record)
    for model, tag, quick in (("ViT-B-32", "openai", True), ("ViT-B-32", "laion2b_s34b_b79k", False)):
        with pytest.raises(ValueError, match="enough"):
            clip_family.load_open_clip(model, tmp_path / "x.pt", tag)
        assert seen["force_quick_gelu"] is quick and seen["force_preprocess_cfg"]["mean"] == CLIP_MEAN
    with pytest.raises(ValueError, match="enough"):
        clip_family.load_open_clip("ViT-B-16-SigLIP", tmp_path / "x.safetensors")
    assert seen["force_preprocess_cfg"]["mean"] == (0.5, 0.5, 0.5)
    assert seen["force_preprocess_cfg"]["resize_mode"] == "squash"


# Aesthetics


def test_aesthetic_head_on_unit_clip_features(tmp_path):
    network, head = random_clip(2), randomize(scoring.ScoreHead(24), 3)
    torch.save(head.state_dict(), tmp_path / "head.pth")
    torch.save(network.state_dict(), tmp_path / "clip.pt")
    assert list(head.state_dict())[::2] == [f"layers.{layer}.weight" for layer in (0, 2, 4, 6, 7)]
    reward = clip_family.aesthetic_reward(str(tmp_path / "head.pth"), str(tmp_path / "clip.pt"), model=MODEL)
    images = pictures()
    with torch.no_grad():
        features = network.encode_image(Preprocess(32)(images))
        x = features / features.norm(dim=1, keepdim=True)
        for layer in (0, 2, 4, 6, 7):
            x = x @ head.state_dict()[f"layers.{layer}.weight"].T + head.state_dict()[f"layers.{layer}.bias"]
    torch.testing.assert_close(reward(images, PROMPTS, None), x[:, 0], atol=1e-3, rtol=1e-4)
    torch.save({"layers.0.weight": torch.zeros(1024, 24)}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match="does not fit"):
        clip_family.aesthetic_reward(str(tmp_path / "part.pth"), str(tmp_path / "clip.pt"), model=MODEL)


# PickScore


@pytest.fixture(scope="module")
def pickscore(tmp_path_factory) -> Path:
    """A tiny CLIPModel saved by transformers, with the files of the published folder."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("pickscore")
    bpe = open_clip.tokenizer.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(word, word): index for word, index in bpe.encoder.items()}
    merges = [" ".join(pair) for pair in bpe.bpe_ranks]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    tokenizer.save_pretrained(str(folder))
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(str(folder))  # fmt: skip
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 49408, "eos_token_id": 49407},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    with torch.random.fork_rng(devices=[]):
        model = randomize(transformers.CLIPModel(config), 4, std=0.2)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(50.0))
    model.save_pretrained(str(folder))
    return folder


def test_pickscore_is_the_librarys_logit(pickscore):
    transformers = pytest.importorskip("transformers")
    reward, images = build_rewards([f"pickscore:{pickscore}@cpu"]).popitem()[1], pictures()
    model = transformers.CLIPModel.from_pretrained(str(pickscore), local_files_only=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(pickscore), local_files_only=True)
    texts = tokenizer(PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    assert texts["input_ids"][:, 0].tolist() == [49406] * 3
    with torch.no_grad():
        logits = model(pixel_values=Preprocess(32)(images), **texts).logits_per_image
    torch.testing.assert_close(reward(images, PROMPTS, None), logits.diagonal(), atol=1e-3, rtol=1e-4)
    assert float(logits.diagonal().abs().max()) > 1  # 50 times a cosine
    assert identify(pickscore / "model.safetensors") in reward.record


def test_pickscore_refuses_half_a_network(pickscore, tmp_path):
    pytest.importorskip("transformers")
    from safetensors.torch import load_file

    for path in pickscore.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="does not fit CLIPModel in 1 tensors, such as visual_projection.weight"):
        clip_family.pickscore_reward(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="lacks tokenizer.json"):
        clip_family.pickscore_reward(str(tmp_path))


# ImageReward


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "two", "cats", "on", "red", "background"]
VISION, TEXT, HEADS, DEPTH = 128, 64, {128: 2, 64: 1}, 2


def published_image_reward(seed: int = 5) -> dict[str, Tensor]:
    """Random tensors under ImageReward.pt's names; pictures of 32 px in patches of 16."""
    rng = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def tensor(name: str, *shape: int) -> None:
        state[name] = torch.randn(shape, generator=rng) * 0.2

    def linear(name: str, inputs: int, outputs: int) -> None:
        tensor(name + ".weight", outputs, inputs)
        tensor(name + ".bias", outputs)

    def norm(name: str, width: int) -> None:
        state[name + ".weight"] = 1 + torch.randn(width, generator=rng) * 0.2
        tensor(name + ".bias", width)

    v, t = "blip.visual_encoder.", "blip.text_encoder."
    tensor(v + "cls_token", 1, 1, VISION)
    tensor(v + "pos_embed", 1, 5, VISION)
    tensor(v + "patch_embed.proj.weight", VISION, 3, 16, 16)
    tensor(v + "patch_embed.proj.bias", VISION)
    norm(v + "norm", VISION)
    for block in range(DEPTH):
        b = f"{v}blocks.{block}."
        norm(b + "norm1", VISION)
        norm(b + "norm2", VISION)
        linear(b + "attn.qkv", VISION, 3 * VISION)
        linear(b + "attn.proj", VISION, VISION)
        linear(b + "mlp.fc1", VISION, 4 * VISION)
        linear(b + "mlp.fc2", 4 * VISION, VISION)
    state[t + "embeddings.position_ids"] = torch.arange(40)[None]
    tensor(t + "embeddings.word_embeddings.weight", len(WORDS), TEXT)
    tensor(t + "embeddings.position_embeddings.weight", 40, TEXT)
    norm(t + "embeddings.LayerNorm", TEXT)
    for layer in range(DEPTH):
        b = f"{t}encoder.layer.{layer}."
        for kind, source in (("attention", TEXT), ("crossattention", VISION)):
            linear(b + kind + ".self.query", TEXT, TEXT)
            linear(b + kind + ".self.key", source, TEXT)
            linear(b + kind + ".self.value", source, TEXT)
            linear(b + kind + ".output.dense", TEXT, TEXT)
            norm(b + kind + ".output.LayerNorm", TEXT)
        linear(b + "intermediate.dense", TEXT, 4 * TEXT)
        linear(b + "output.dense", 4 * TEXT, TEXT)
        norm(b + "output.LayerNorm", TEXT)
    linear("blip.vision_proj", VISION, 8)
    linear("blip.text_proj", TEXT, 8)
    for layer, (inputs, outputs) in {0: (TEXT, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}.items():
        linear(f"mlp.layers.{layer}", inputs, outputs)
        state[f"mlp.layers.{layer}.weight"] *= 0.3
    return state


@pytest.fixture
def blip_folder(tmp_path) -> Path:
    torch.save(published_image_reward(), tmp_path / image_reward.FILE)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return tmp_path


def slow_image_reward(state: dict[str, Tensor], pixels: Tensor, words: list[int]) -> float:
    """The published maths on one picture (3, 32, 32) and its word ids without padding, in numpy and float64."""
    p = {name: value.double().numpy() for name, value in state.items() if value.is_floating_point()}

    def linear(x, name):
        return x @ p[name + ".weight"].T + p[name + ".bias"]

    def norm(x, name, epsilon):
        centered = x - x.mean(-1, keepdims=True)
        return (
            centered / np.sqrt((centered**2).mean(-1, keepdims=True) + epsilon) * p[name + ".weight"]
            + p[name + ".bias"]
        )

    def gelu(x):
        return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2

    def attend(query, key, value):
        heads = []
        for start in range(0, query.shape[1], 64):
            part = slice(start, start + 64)
            scores = np.exp(query[:, part] @ key[:, part].T / 8)
            heads.append(scores / scores.sum(1, keepdims=True) @ value[:, part])
        return np.concatenate(heads, 1)

    v, t = "blip.visual_encoder.", "blip.text_encoder."
    image, kernel = pixels.double().numpy(), p[v + "patch_embed.proj.weight"]
    patches = [
        [(kernel * image[:, top : top + 16, left : left + 16]).sum((1, 2, 3)) + p[v + "patch_embed.proj.bias"]]
        for top in (0, 16) for left in (0, 16)
    ]  # fmt: skip
    x = np.concatenate([p[v + "cls_token"][0], *patches]) + p[v + "pos_embed"][0]  # (5, D)
    for block in range(DEPTH):
        b = f"{v}blocks.{block}."
        query, key, value = np.split(linear(norm(x, b + "norm1", 1e-6), b + "attn.qkv"), 3, axis=1)
        x = x + linear(attend(query, key, value), b + "attn.proj")
        x = x + linear(gelu(linear(norm(x, b + "norm2", 1e-6), b + "mlp.fc1")), b + "mlp.fc2")
    seen = norm(x, v + "norm", 1e-6)
    y = p[t + "embeddings.word_embeddings.weight"][words] + p[t + "embeddings.position_embeddings.weight"][: len(words)]
    y = norm(y, t + "embeddings.LayerNorm", 1e-12)
    for layer in range(DEPTH):
        b = f"{t}encoder.layer.{layer}."
        for kind, source in (("attention", None), ("crossattention", seen)):
            a, source = b + kind, y if source is None else source
            parts = attend(
                linear(y, a + ".self.query"), linear(source, a + ".self.key"), linear(source, a + ".self.value")
            )
            y = norm(linear(parts, a + ".output.dense") + y, a + ".output.LayerNorm", 1e-12)
        up = gelu(linear(y, b + "intermediate.dense"))
        y = norm(linear(up, b + "output.dense") + y, b + "output.LayerNorm", 1e-12)
    z = y[0]
    for layer in (0, 2, 4, 6, 7):
        z = linear(z, f"mlp.layers.{layer}")
    return (float(z[0]) - 0.16717362830052426) / 1.0333394966054072


def test_image_reward_is_the_published_maths(blip_folder):
    pytest.importorskip("transformers")
    name, images = f"imagereward:{blip_folder}", pictures()
    reward = build_rewards([name])[name]
    scores = reward(images, PROMPTS, None)
    words = {
        prompt: [2, *(WORDS.index(word) for word in prompt.split()), 3] for prompt in PROMPTS
    }  # fmt: skip
    pixels = Preprocess(32)(images)
    state = published_image_reward()
    expected = [slow_image_reward(state, image, words[prompt]) for image, prompt in zip(pixels, PROMPTS, strict=True)]
    assert scores.tolist() == pytest.approx(expected, rel=0, abs=2e-6)  # layer norms' epsilon matters in 1e-5
    assert max(expected) - min(expected) > 0.01 and scores.dtype == torch.float32
    long = " ".join(["a dog"] * 40)  # cut to 35 tokens, [CLS] and [SEP] among them
    cut = [2, *[5, 6] * 16, 5, 3]
    assert len(cut) == 35
    assert float(reward(images[:1], [long], None)) == pytest.approx(slow_image_reward(state, pixels[0], cut), abs=2e-6)
    assert identify(blip_folder / image_reward.FILE) in reward.record and "float32" in reward.record


def test_image_reward_has_the_published_sizes():
    """All tensors of ImageReward-v1.0's towers: ViT-L/16 at 224 px and BERT base with cross-attention."""
    pytest.importorskip("transformers")
    vision = {
        "hidden_size": 1024, "patch_size": 16, "image_size": 224, "intermediate_size": 4096,
        "num_hidden_layers": 24, "num_attention_heads": 16,
    }  # fmt: skip
    text = {
        "vocab_size": 30524, "hidden_size": 768, "encoder_hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 512,
    }  # fmt: skip
    with torch.device("meta"):
        network = image_reward.ImageReward({"vision": vision, "text": text})
    state = network.state_dict()
    assert image_reward.sizes_of(state, Path("x")) == {"vision": vision, "text": text}
    count = {part: sum(v.numel() for n, v in state.items() if n.startswith(part)) for part in ("vision", "text", "mlp")}
    vit = 24 * (12 * 1024**2 + 13 * 1024) + 1024 * (3 * 256 + 1) + 1024 * (197 + 1 + 2)
    layer = 4 * 768**2 + 2 * 768**2 + 2 * 768 * 1024 + 2 * 768 * 3072 + 8 * 768 + 3072 + 768 + 6 * 768
    assert count["vision"] == vit and count["text"] == 12 * layer + (30524 + 512 + 2) * 768
    assert count["mlp"] == 768 * 1024 + 1024 * 128 + 128 * 64 + 64 * 16 + 16 + 1024 + 128 + 64 + 16 + 1


def test_image_reward_refuses_other_layouts(blip_folder):
    pytest.importorskip("transformers")
    file = blip_folder / image_reward.FILE
    state = published_image_reward()
    for change, message in (
        (lambda s: s.pop("blip.visual_encoder.blocks.1.attn.qkv.weight"), "does not fit the network in 1 of"),
        (lambda s: s.pop("mlp.layers.7.bias"), "mlp.layers.7.bias"),
        (lambda s: s.update({"blip.visual_encoder.adapter.weight": torch.ones(1)}), "unknown tensor"),
        (lambda s: s.update({"module.x": torch.ones(1)}), "unknown tensor module.x"),
        (lambda s: s.pop("blip.text_encoder.embeddings.word_embeddings.weight"), "lacks the tensor text.embeddings"),
    ):
        changed = dict(state)
        change(changed)
        torch.save(changed, file)
        with pytest.raises(ValueError, match=message):
            image_reward.load_image_reward(file)
    torch.save(state, file)
    (blip_folder / "vocab.txt").unlink()
    with pytest.raises(FileNotFoundError, match="vocab.txt of repository google-bert/bert-base-uncased"):
        image_reward.image_reward(str(file))


# What all share


@pytest.fixture
def tiny_hps(tmp_path) -> Callable[..., Tensor]:
    return clip_family.hps_reward(str(save_hps(random_clip(), tmp_path / "hps.pt")), model=MODEL)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_around_a_reward_changes_little(tiny_hps, dtype):
    images = pictures()
    scores = tiny_hps(images, PROMPTS, None)
    halved = tiny_hps(images.to(dtype), PROMPTS, None)
    assert halved.dtype == torch.float32
    torch.testing.assert_close(halved, scores, atol=5e-3, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):  # a training's autocast stays outside
        assert torch.equal(tiny_hps(images, PROMPTS, None), scores)


def test_micro_batches_change_nothing(tiny_hps, monkeypatch):
    images, prompts = pictures(7), [*PROMPTS, *PROMPTS, "a cat"]
    scores = tiny_hps(images, prompts, None)
    monkeypatch.setattr(scoring, "MICRO_BATCH", 3)
    torch.testing.assert_close(tiny_hps(images, prompts, None), scores, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="got 2 prompts for 7 images"):
        tiny_hps(images, prompts[:2], None)


def test_every_text_is_encoded_once():
    asked = []

    def encode(texts):
        asked.append(list(texts))
        return torch.tensor([[float(len(text))] for text in texts])

    rows = scoring.once_a_prompt(encode)
    assert rows(PROMPTS).tolist() == [[5.0], [28.0], [5.0]]
    assert rows(["a cat", "a dog"]).tolist() == [[5.0], [5.0]]
    assert asked == [["a dog", "two cats on a red background"], ["a cat"]]


def test_rewards_of_the_package_are_described():
    rewards = build_rewards(["clip", "speed", "geneval"])
    facts = describe_rewards({**rewards, "own": lambda images, prompts, trajectory: images.mean((1, 2, 3))})
    assert "clip.safetensors (sha256 " in facts["clip"] and "speed_reward" in facts["speed"]
    assert "detector.safetensors (sha256 " in facts["geneval"] and "lambda" in facts["own"]
    assert all("\n" not in fact for fact in facts.values())


def test_the_example_of_the_package_runs():
    assert doctest.testmod(speedrl_lab.rewards).failed == 0
