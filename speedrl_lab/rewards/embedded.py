"""Rewards of EmojiScenes: small CLIP, coherence under the base, referee, novelty, variety, balance, exact detector."""

from collections.abc import Sequence
from functools import lru_cache
from zlib import crc32

import torch
from torch import Tensor

from speedrl_lab import judges, scenes
from speedrl_lab.generators.emoji import WEIGHTS, EmojiGenerator, load_emoji
from speedrl_lab.networks import Detector, SmallClip
from speedrl_lab.rewards import Reward
from speedrl_lab.trajectory import Trajectory
from speedrl_lab.weights import load_weights

WORST_TOKEN = -6.0
"""Log-probabilities below this count as this much: one absurd token is one mistake."""
REAL_SCENES = 32
"""Real scenes of each caption that `balance` compares with."""


@lru_cache(maxsize=2)
def load_clip(device: torch.device | str = "cpu") -> SmallClip:
    """The committed small CLIP."""
    return load_weights(WEIGHTS / "clip.safetensors", "SmallClip").to(device)


@lru_cache(maxsize=2)
def load_detector(device: torch.device | str = "cpu") -> Detector:
    """The committed detector; a judge, trained on nothing but real scenes."""
    return load_weights(WEIGHTS / "detector.safetensors", "Detector").to(device)


def clip_reward(device: torch.device | str = "cpu") -> Reward:
    """Cosine of picture and caption under the small CLIP, in [-1, 1]; real scenes reach about 0.8."""
    clip = load_clip(device)

    @torch.no_grad()
    def reward(images: Tensor, prompts: Sequence[str], trajectory: Trajectory) -> Tensor:
        words = scenes.encode_captions(prompts).to(images.device)
        return (clip.encode_image(images) * clip.encode_text(words)).sum(1)

    return reward


def detector_reward(device: torch.device | str = "cpu") -> Reward:
    """1.0 where the counts of all objects are exactly right, else 0.0."""
    detector = load_detector(device)

    @torch.no_grad()
    def reward(images: Tensor, prompts: Sequence[str], trajectory: Trajectory) -> Tensor:
        wanted = scenes.wanted_counts(prompts).to(images.device)
        return (detector(images)[0].argmax(-1) == wanted).all(1).float()

    return reward


@lru_cache(maxsize=2)
def load_referee(device: torch.device | str = "cpu") -> Detector:
    """The committed referee: a detector that rewards, so that those that judge stay apart."""
    return load_weights(WEIGHTS / "referee.safetensors", "Detector").to(device)


def verified_reward(device: torch.device | str = "cpu") -> Reward:
    """1.0 where the referee reads what the caption asks for: all counts, the relation, the named background.

    Pictures that are right all get the same, so that nothing is gained by being right in one typical way.
    """
    referee = load_referee(device)

    def reward(images: Tensor, prompts: Sequence[str], trajectory: Trajectory) -> Tensor:
        return _right(referee, images, prompts).float()

    return reward


def novelty_reward(device: torch.device | str = "cpu") -> Reward:
    """Mean distance in CLIP features to the other samples of the same prompt in the batch."""
    clip = load_clip(device)

    @torch.no_grad()
    def reward(images: Tensor, prompts: Sequence[str], trajectory: Trajectory) -> Tensor:
        return distance_to_others(clip.image_tower(images), prompts)

    return reward


def variety_reward(device: torch.device | str = "cpu") -> Reward:
    """Mean distance of a right picture to the other right ones of its prompt: style, size, place, background.

    Every picture stands for its nearest valid scene, painted anew, so that noise, blur and wrong objects earn
    nothing; distances are in features of the referee. NaN, no say, for pictures that the referee calls wrong and
    where no second one is right: being right is for other rewards, this one chooses among those that are.
    Nothing says when it is enough: samples part towards the extremes of the features (`balance`).
    """
    referee = load_referee(device)

    @torch.no_grad()
    def reward(images: Tensor, prompts: Sequence[str], trajectory: Trajectory) -> Tensor:
        features = _scene_features(referee, images, prompts)
        return distance_to_others(features, prompts, _right(referee, images, prompts))

    return reward


def balance_reward(device: torch.device | str = "cpu") -> Reward:
    """`variety` less the mean distance to real scenes of the caption: as many of each style, size, place as in reality.

    It is the slope of the energy distance between samples and real scenes (Szekely and Rizzo 2013): a sample earns by
    standing where real scenes are dense and the other samples of its prompt are not, and nothing is to be gained once
    they are distributed alike. NaN as in `variety`.
    """
    referee = load_referee(device)

    @lru_cache(maxsize=4096)
    def real(prompt: str) -> Tensor:
        rng = torch.Generator().manual_seed(crc32(prompt.encode()))  # others for each caption: errors average out
        return referee.features(scenes.real_pictures([prompt] * REAL_SCENES, rng).to(device))  # (REAL_SCENES, F)

    @torch.no_grad()
    def reward(images: Tensor, prompts: Sequence[str], trajectory: Trajectory) -> Tensor:
        features = _scene_features(referee, images, prompts)
        to_real = [torch.cdist(row[None], real(prompt)).mean() for row, prompt in zip(features, prompts, strict=True)]
        return distance_to_others(features, prompts, _right(referee, images, prompts)) - torch.stack(to_real)

    return reward


def _right(referee: Detector, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Whether the referee reads all that the captions ask for, bool (B,) on the pictures' device."""
    return torch.stack(list(judges.verdict(referee, images, prompts).values())).all(0).to(images.device)


def _scene_features(referee: Detector, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The referee's features (B, F) of each picture's nearest valid scene."""
    return referee.features(judges.nearest_scene(images, prompts).paint(prompts).to(images.device))


def distance_to_others(features: Tensor, prompts: Sequence[str], counted: Tensor | None = None) -> Tensor:
    """Mean distance (B,) of features (B, D) to those of the other samples of the same prompt.

    With `counted` bool (B,) only these have a distance and are others; NaN for the rest and where none is left.
    """
    ids = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
    group = torch.tensor([ids[prompt] for prompt in prompts], device=features.device)
    same = (group[:, None] == group).float().fill_diagonal_(0)  # (B, B)
    if counted is not None:
        same = same * counted[:, None] * counted
    total, others = (torch.cdist(features, features) * same).sum(1), same.sum(1)
    return total / others if counted is not None else total / others.clamp(min=1)


def pseudo_log_likelihood(generator: EmojiGenerator, tokens: Tensor, prompts: Sequence[str]) -> Tensor:
    """Mean log-probability a token under a generator that sees the other half of a checkerboard, (B,).

    Two forward passes: each half is predicted from the other (Besag's pseudo-likelihood, in blocks).
    Each token counts at least WORST_TOKEN.
    """
    rows, columns = generator.spec.grid
    index = torch.arange(rows * columns, device=tokens.device)
    dark = (index // columns + index % columns) % 2 == 0
    words = generator.encode(prompts).tensors["words"]
    total = torch.zeros(len(tokens), device=tokens.device)
    for half in (dark, ~dark):
        shown = torch.where(half, generator.spec.mask_id, tokens)
        where = half.expand_as(tokens).flatten().nonzero().flatten()
        log_probs = generator.policy(shown, words, where).log_softmax(-1)
        chosen = log_probs.gather(1, tokens.flatten()[where][:, None]).clamp(min=WORST_TOKEN)
        total = total + chosen.view(len(tokens), -1).sum(1)
    return total / (rows * columns)


def coherence_reward(device: torch.device | str = "cpu") -> Reward:
    """How well a sample's tokens fit each other, judged by the frozen base generator; at most 0.

    The pseudo-log-likelihood in nats a token, capped at the lower quartile of real training scenes and
    shifted so that the cap is 0: a picture that is as coherent as real ones has nothing more to gain,
    so the reward does not press towards the most typical picture. Confetti backgrounds and smeared
    sprites, which CLIP hardly minds, cost much.
    """
    base = load_emoji(torch.device(device))
    drawn, _, images = scenes.draw_batch(256, "train", seed=0)
    captions = [scene.caption for scene in drawn]
    with torch.no_grad():
        cap = pseudo_log_likelihood(base, base.tokenize(images), captions).quantile(0.25)

    @torch.no_grad()
    def reward(images: Tensor, prompts: Sequence[str], trajectory: Trajectory) -> Tensor:
        return (pseudo_log_likelihood(base, trajectory.tokens, prompts) - cap).clamp(max=0)

    return reward
