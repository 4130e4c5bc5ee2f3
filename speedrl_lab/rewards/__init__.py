"""Rewards by name: plain functions (images, prompts, trajectory) -> float32 (B,), in raw units.

Weights, z-scores and filters live in `advantage`, never here. A name may carry where its weights lie, after
a colon, and a device of its own, after an @:

| name                          | weights                                                    |
| ----------------------------- | ---------------------------------------------------------- |
| clip, coherence, novelty, variety, balance, verified, detector, speed | those of EmojiScenes, in the package |
| geneval[:<file>]              | the same detector; GenEval metadata of a prompt file       |
| open_clip[:<model>:<weights>] | any open_clip model; a file or a tag of the hub's cache    |
| hpsv2.1[:<file>]              | HPS_v2.1_compressed.pt                                     |
| pickscore[:<folder>]          | PickScore_v1 as transformers saves it                      |
| imagereward[:<file or folder>] | ImageReward.pt, the BERT tokenizer beside it              |
| aesthetic:<file>[:<clip>]     | the predictor's head; OpenAI's ViT-L-14, a file or cached  |

`hpsv2.1@cuda:1` scores on the second GPU, `pickscore:<folder>@cpu` beside a GPU that is full. A bare name looks
in the hub's local cache; nothing is ever fetched. A reward of one's own is any such function:

>>> import torch
>>> import speedrl_lab as lab
>>> def redness(images, prompts, trajectory):
...     red, green, blue = images.unbind(1)  # (B, H, W) each
...     return (red - (green + blue) / 2).mean((1, 2))  # (B,)
>>> rewards = {"redness": redness, **lab.build_rewards(["clip"])}
>>> sampler = lab.SamplerConfig(steps=2)
>>> config = lab.TrainConfig(
...     sampler=sampler, iterations=1, num_groups=1, group_size=4, speed_weight=0.0,
...     quality_weights={"redness": 1.0, "clip": 0.5},
... )
>>> records = list(lab.train(lab.load_generator("emoji", "cpu"), ["a heart"], rewards, config))
>>> sorted(records[0]["rewards"])
['clip', 'redness']
"""

import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from speedrl_lab.trajectory import Trajectory

Reward = Callable[[Tensor, Sequence[str], Trajectory], Tensor]
EMBEDDED = {
    "clip": "clip.safetensors",
    "coherence": "generator.safetensors",
    "novelty": "clip.safetensors",
    "variety": "referee.safetensors",
    "balance": "referee.safetensors",
    "verified": "referee.safetensors",
    "detector": "detector.safetensors",
    "speed": "",
}
"""Rewards of EmojiScenes that take no settings, and their weights in the package."""
NAMES = (*EMBEDDED, "geneval")
"""Rewards that are ready to use."""
MODEL_NAMES = ("open_clip", "hpsv2.1", "pickscore", "imagereward", "aesthetic")
"""Rewards that need published weights on this machine."""
_NAME = re.compile(r"(?P<kind>[^:@]*)(:(?P<settings>.*?))?(@(?P<device>cpu|mps|cuda(:\d+)?))?")


def build_rewards(names: Sequence[str], device: torch.device | str = "cpu") -> dict[str, Reward]:
    """The named rewards, each under its name as given.

    Raises ValueError for an unknown name, before any weights are read, and says the nearest one;
    FileNotFoundError in one line for missing weights: the repository, the files, where to put them.
    """
    for name in names:
        match = _NAME.fullmatch(name)
        kind = match["kind"] if match else name
        if not match or kind not in NAMES + MODEL_NAMES or (kind in EMBEDDED and name != kind):
            from speedrl_lab.config import nearest

            raise ValueError(f"unknown reward {name!r}; nearest: {nearest(kind, [*NAMES, *MODEL_NAMES])!r}")
    return {name: _embedded(name, device) if name in EMBEDDED else _from_files(name, device) for name in names}


def describe_rewards(rewards: Mapping[str, Reward]) -> dict[str, str]:
    """What each reward is, for run cards: model, file and SHA-256, preprocessing; of one's own, where it is defined."""
    return {
        name: getattr(reward, "record", None)
        or f"{getattr(reward, '__qualname__', type(reward).__name__)} of {reward.__module__}"
        for name, reward in rewards.items()
    }


def _embedded(name: str, device: torch.device | str) -> Reward:
    from speedrl_lab.rewards import embedded, files, speed

    match name:
        case "clip":
            reward = embedded.clip_reward(device)
        case "coherence":
            reward = embedded.coherence_reward(device)
        case "novelty":
            reward = embedded.novelty_reward(device)
        case "variety":
            reward = embedded.variety_reward(device)
        case "balance":
            reward = embedded.balance_reward(device)
        case "verified":
            reward = embedded.verified_reward(device)
        case "detector":
            reward = embedded.detector_reward(device)
        case "speed":
            return speed.speed_reward
    reward.record = f"EmojiScenes, {files.identify(embedded.WEIGHTS / EMBEDDED[name])}"
    return reward


def _from_files(name: str, device: torch.device | str) -> Reward:
    match = _NAME.fullmatch(name)
    settings = match["settings"] or ""
    if match["device"]:
        from speedrl_lab.generators import resolve_device

        device = resolve_device(match["device"])
    if match["kind"] in ("pickscore", "imagereward") and find_spec("transformers") is None:
        raise ImportError(f"reward {name!r} needs transformers, not installed: pip install 'speedrl_lab[real]'")
    if match["kind"] in ("open_clip", "hpsv2.1", "pickscore", "aesthetic"):
        from speedrl_lab.rewards import clip_family

    match match["kind"]:
        case "open_clip":
            model, _, weights = settings.partition(":")
            model, weights = model or clip_family.DEFAULT_MODEL, weights or ("" if model else clip_family.DEFAULT_TAG)
            return clip_family.open_clip_reward(model, weights, device)
        case "hpsv2.1":
            return clip_family.hps_reward(settings, device)
        case "pickscore":
            return clip_family.pickscore_reward(settings, device)
        case "aesthetic":
            file, _, clip = settings.partition(":")
            return clip_family.aesthetic_reward(file, clip or "openai", device)
        case "imagereward":
            from speedrl_lab.rewards import image_reward

            return image_reward.image_reward(settings, device)
        case "geneval":
            from speedrl_lab.rewards import geneval

            return geneval.geneval_reward(settings, device)
