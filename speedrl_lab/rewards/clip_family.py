"""Rewards that compare a picture with its caption in CLIP's space: open_clip models, HPSv2.1, PickScore, aesthetics.

Radford et al., arXiv 2103.00020; HPSv2, 2306.09341; Pick-a-Pic, 2305.01569; the aesthetic predictor is LAION's.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from speedrl_lab.generators.folder import fill, read_json
from speedrl_lab.rewards import Reward
from speedrl_lab.rewards.files import cached_file, find_file, how_to_fetch, identify, offline, read_state, why
from speedrl_lab.rewards.preprocess import Preprocess
from speedrl_lab.rewards.scoring import ScoreHead, make_reward, once_a_prompt

DEFAULT_MODEL, DEFAULT_TAG = "ViT-B-32", "laion2b_s34b_b79k"
HPS_MODEL, HPS_REPOSITORY, HPS_FILE = "ViT-H-14", "xswu/HPSv2", "HPS_v2.1_compressed.pt"
PICKSCORE_REPOSITORY = "yuvalkirstain/PickScore_v1"
PICKSCORE_FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json")
AESTHETIC_MODEL = "ViT-L-14-quickgelu"
AESTHETIC_SOURCE = "github.com/christophschuhmann/improved-aesthetic-predictor"
AESTHETIC_FILE = "sac+logos+ava1-l14-linearMSE.pth"
WEIGHT_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
"""Names that open_clip's repositories give their weights, the best first."""


def open_clip_reward(model: str, weights: str, device: torch.device | str = "cpu") -> Reward:
    """Cosine of picture and caption under any open_clip model, in [-1, 1]; good pictures reach .2-.4.

    `weights` is a file, or a tag of the model that the hub's local cache holds.
    """
    check_model(model)
    path = find_weights(model, weights)
    network = load_open_clip(model, path, weights)
    return _cosine_reward(network, model, preprocess_of(network), f"open_clip {model}, {identify(path)}", device)


def hps_reward(file: str = "", device: torch.device | str = "cpu", model: str = HPS_MODEL) -> Reward:
    """HPSv2.1: cosine under a fine-tuned ViT-H-14, about .2-.33.

    Published preprocessing: the longest side is resized, as floats, and padded: the same as for other
    CLIPs where pictures are square.
    """
    path = find_file(file, "hpsv2.1", HPS_REPOSITORY, HPS_FILE)
    network = load_open_clip(model, path)
    preprocess = Preprocess(preprocess_of(network).size, resize="longest", saturate=False)
    return _cosine_reward(network, model, preprocess, f"HPSv2.1 on open_clip {model}, {identify(path)}", device)


def aesthetic_reward(
    file: str = "", clip: str = "openai", device: torch.device | str = "cpu", model: str = AESTHETIC_MODEL
) -> Reward:
    """LAION's improved aesthetic predictor on unit features of OpenAI's ViT-L-14, about 1-10; ignores captions.

    `file` holds the head alone (`layers.0.weight`, ...), `clip` is a file or tag as in `open_clip_reward`.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"reward 'aesthetic': {'no file ' + file if file else 'it names no file'}; wanted: {AESTHETIC_FILE} of "
            f"{AESTHETIC_SOURCE}, then name it 'aesthetic:<its path>'; nothing is fetched by a run"
        )
    clip_path = find_weights(model, clip)
    state = read_state(path)
    head = ScoreHead(state["layers.0.weight"].shape[1] if "layers.0.weight" in state else 768)
    fill(head, state, path)
    network = load_open_clip(model, clip_path, clip).to(device)
    head, preprocess = head.to(device).eval(), preprocess_of(network)

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return head(_unit(network.encode_image(preprocess(images))))

    files = f"{identify(path)} on open_clip {model}, {identify(clip_path)}"
    return make_reward(score, device, f"aesthetic predictor {files}; {preprocess}")


def pickscore_reward(folder: str = "", device: torch.device | str = "cpu") -> Reward:
    """PickScore: exp(logit scale) times the cosine, about 17-24; a fine-tuned ViT-H as transformers saves it."""
    path = _pickscore_folder(folder)
    weights = next(path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file())
    network, tokenizer = _load_pickscore(path)
    network.to(device)
    settings = read_json(path / "preprocessor_config.json")
    size = network.config.vision_config.image_size
    preprocess = Preprocess(size, tuple(settings["image_mean"]), tuple(settings["image_std"]), crop="floor")
    scale = float(network.logit_scale.detach().exp())

    def encode(prompts: Sequence[str]) -> Tensor:
        texts = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=77, return_tensors="pt")
        pooled = network.text_model(texts["input_ids"].to(device), texts["attention_mask"].to(device)).pooler_output
        return _unit(network.text_projection(pooled))

    texts = once_a_prompt(encode)

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        pooled = network.vision_model(preprocess(images)).pooler_output
        return scale * (_unit(network.visual_projection(pooled)) * texts(prompts)).sum(1)

    return make_reward(score, device, f"PickScore on transformers' CLIPModel, {identify(weights)}; {preprocess}")


def _pickscore_folder(folder: str) -> Path:
    """The folder of PickScore's files, the given one or the hub's cached one; FileNotFoundError in one line."""
    config = cached_file(PICKSCORE_REPOSITORY, "config.json")
    path = Path(folder).expanduser() if folder else config.parent if config else None
    stand_in = {"model.safetensors": "pytorch_model.bin"}
    missing = [
        name for name in PICKSCORE_FILES
        if path is None or not ((path / name).is_file() or (path / stand_in.get(name, name)).is_file())
    ]  # fmt: skip
    if missing:
        where = f"{path} lacks {', '.join(missing)}" if path else "not in the hub's local cache"
        raise FileNotFoundError(
            f"reward 'pickscore': {where}; wanted: {', '.join(PICKSCORE_FILES)} of repository {PICKSCORE_REPOSITORY} "
            f"({how_to_fetch(PICKSCORE_REPOSITORY, PICKSCORE_FILES)}, or name a folder of them "
            "'pickscore:<folder>'); nothing is fetched by a run"
        )
    return path


def _load_pickscore(path: Path) -> tuple[nn.Module, Any]:
    """Network, float32 and frozen, and tokenizer of a folder; ValueError in one line where they do not fit."""
    from transformers import AutoTokenizer, CLIPModel

    try:
        with offline(), torch.random.fork_rng(devices=[]):  # constructors draw from the global generator
            network, report = CLIPModel.from_pretrained(str(path), local_files_only=True, output_loading_info=True)
            tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a CLIPModel and its tokenizer: {why(error)}") from None
    wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if wrong:  # from_pretrained would only warn, and score with random weights
        raise ValueError(f"{path} does not fit CLIPModel in {len(wrong)} tensors, such as {wrong[0]}")
    return network.float().eval().requires_grad_(False), tokenizer


def check_model(model: str) -> None:
    """Raise ValueError that names the nearest model where open_clip has none of this name."""
    import open_clip

    from speedrl_lab.config import nearest

    known = open_clip.list_models()
    if model not in known:
        raise ValueError(f"unknown open_clip model {model!r}; nearest: {nearest(model, known)!r}")


def find_weights(model: str, weights: str) -> Path:
    """A file by path, or the cached file of a tag; FileNotFoundError in one line otherwise."""
    import open_clip

    if Path(weights).expanduser().is_file():
        return Path(weights).expanduser()
    tags = open_clip.list_pretrained_tags_by_model(model)
    if weights not in tags:
        raise FileNotFoundError(
            f"reward 'open_clip:{model}': no file or tag {weights!r}; expected a weights file"
            + (f" or one of the tags {', '.join(tags)}" if tags else "")
        )
    repository, _, filename = open_clip.get_pretrained_cfg(model, weights).get("hf_hub", "").rpartition("/")
    names = [filename] if filename else list(WEIGHT_NAMES)
    found = [path for path in (cached_file(repository, name) for name in names) if repository and path]
    if not found:
        source = f"{names[0]} of repository {repository}" if repository else f"the weights {weights!r} of open_clip"
        fetch = f" ({how_to_fetch(repository, names[:1])})" if repository else ""
        raise FileNotFoundError(
            f"reward 'open_clip:{model}:{weights}': not in the hub's local cache; wanted: {source}{fetch}, or a file "
            f"by path 'open_clip:{model}:<file>'; nothing is fetched by a run"
        )
    return found[0]


def load_open_clip(model: str, path: Path, tag: str = "") -> nn.Module:
    """An open_clip network with the weights of a file, float32, frozen; ValueError in one line where they do not fit.

    A tag of the model settles activation and preprocessing; a file takes what all of the model's tags agree on.
    """
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(model)
    settings = [open_clip.get_pretrained_cfg(model, name) for name in ([tag] if tag in tags else tags)]
    keys = ("mean", "std", "interpolation", "resize_mode")
    shared = {key: settings[0][key] for key in keys if settings and all(s[key] == settings[0][key] for s in settings)}
    quick = tag in tags and bool(settings[0].get("quick_gelu"))
    try:
        with offline(), torch.random.fork_rng(devices=[]):
            network = open_clip.create_model(model, pretrained_text=False, force_quick_gelu=quick,
                                             force_preprocess_cfg=shared)  # fmt: skip
            open_clip.load_checkpoint(network, str(path), strict=True, weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} does not fit open_clip's {model}: {why(error)}") from None
    return network.eval().requires_grad_(False)


def preprocess_of(network: nn.Module) -> Preprocess:
    """The preprocessing that open_clip keeps with a network; ValueError for pictures that are not square."""
    from open_clip import get_model_preprocess_cfg

    settings: dict[str, Any] = get_model_preprocess_cfg(network)
    size = settings["size"]
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"this open_clip model wants pictures of {size} px; expected square ones")
    return Preprocess(
        sides.pop(), tuple(settings["mean"]), tuple(settings["std"]),
        settings["resize_mode"], settings["interpolation"],
    )  # fmt: skip


def _cosine_reward(
    network: nn.Module, model: str, preprocess: Preprocess, what: str, device: torch.device | str
) -> Reward:
    texts = once_a_prompt(_text_encoder(network.to(device), model, device))

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (_unit(network.encode_image(preprocess(images))) * texts(prompts)).sum(1)

    return make_reward(score, device, f"{what}; {preprocess}")


def _text_encoder(network: nn.Module, model: str, device: torch.device | str) -> Callable[[Sequence[str]], Tensor]:
    import open_clip

    with offline():
        tokenizer = open_clip.get_tokenizer(model)
    return lambda prompts: _unit(network.encode_text(tokenizer(list(prompts)).to(device)))


def _unit(features: Tensor) -> Tensor:
    """Unit vectors, float32: half precision would round away differences between good pictures."""
    return functional.normalize(features.float(), dim=-1)
