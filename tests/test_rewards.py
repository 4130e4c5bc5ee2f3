"""Rewards on pictures whose truth is known."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from speedrl_lab import compositor, scenes
from speedrl_lab.networks import Tokenizer
from speedrl_lab.rewards import NAMES, build_rewards
from speedrl_lab.rewards.embedded import REAL_SCENES, load_clip, load_referee
from speedrl_lab.rewards.speed import speed_reward
from speedrl_lab.trajectory import Trajectory

Real = tuple[list[str], list[str], Tensor]


@pytest.fixture(scope="module")
def real() -> Real:
    """256 unseen real scenes: right captions, captions wrong in one respect, pictures."""
    drawn, _, images = scenes.draw_batch(256, "test", seed=7)
    rng = torch.Generator().manual_seed(0)
    wrong = [scenes.alter(scene, rng).caption for scene in drawn]
    return [scene.caption for scene in drawn], wrong, images


def recorded(tokens: Tensor, steps: Tensor | None = None) -> Trajectory:
    steps = torch.ones(len(tokens), dtype=torch.int64) if steps is None else steps
    zeros = torch.zeros(tokens.shape)
    return Trajectory(tokens, zeros.short(), steps, steps, zeros, mask_id=1000)


NOTHING = recorded(torch.zeros(1, 64, dtype=torch.int64))


def test_clip_prefers_the_right_caption(real):
    right, wrong, images = real
    clip = build_rewards(["clip"])["clip"]
    scores, lower = clip(images, right, NOTHING), clip(images, wrong, NOTHING)
    assert scores.shape == (256,) and scores.dtype == torch.float32 and not scores.requires_grad
    assert float(lower.min()) >= -1 and float(scores.max()) <= 1 + 1e-6
    assert float((scores > lower).float().mean()) > 0.95
    assert float(scores.mean()) > 0.7
    assert float(clip(images, right[::-1], NOTHING).mean()) < 0.5 * float(scores.mean())


def test_the_detector_counts_exactly(real):
    right, wrong, images = real
    detector = build_rewards(["detector"])["detector"]
    scores = detector(images, right, NOTHING)
    assert scores.dtype == torch.float32 and set(scores.tolist()) <= {0.0, 1.0}
    assert float(scores.mean()) >= 0.97
    counts = scenes.wanted_counts(right), scenes.wanted_counts(wrong)
    differ = (counts[0] != counts[1]).any(1)  # a wrong background or side is not its business
    assert 50 < int(differ.sum()) < 256
    assert float(detector(images, wrong, NOTHING)[differ].mean()) <= 0.03


def test_novelty_is_the_mean_distance_to_the_rest_of_the_group(real):
    _, _, images = real
    novelty = build_rewards(["novelty"])["novelty"]
    prompts = ["a dog", "a cat", "a dog", "a dog", "a cat", "a key"]
    scores = novelty(images[:6], prompts, NOTHING)
    features = load_clip("cpu").image_tower(images[:6]).detach()
    for row, prompt in enumerate(prompts):
        others = [other for other in range(6) if other != row and prompts[other] == prompt]
        distances = [float((features[row] - features[other]).norm()) for other in others]
        expected = sum(distances) / len(distances) if distances else 0.0
        assert float(scores[row]) == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("count", [4, 60])
def test_novelty_of_identical_pictures_is_zero(real, count):
    _, _, images = real
    same = images[3:4].repeat(count, 1, 1, 1)
    scores = build_rewards(["novelty"])["novelty"](same, ["a dog"] * count, NOTHING)
    assert float(scores.abs().max()) == pytest.approx(0, abs=1e-4)


@pytest.fixture(scope="module")
def dogs() -> Tensor:
    """Real pictures of "a dog on a red background": three different ones, then one without a dog."""
    scene = scenes.parse_caption("a dog on a red background")
    rng = torch.Generator().manual_seed(1)
    wrong = scenes.parse_caption("a cat on a red background")
    return compositor.paint(scenes.draw_layouts([scene] * 3 + [wrong], rng))


def test_variety_is_the_mean_distance_of_the_right_to_the_other_right_pictures(dogs):
    variety = build_rewards(["variety"])["variety"]
    scores = variety(dogs, ["a dog on a red background"] * 4, NOTHING)
    features = load_referee("cpu").features(dogs).detach()  # real scenes are their own nearest scenes
    for row in range(3):
        expected = sum(float((features[row] - features[other]).norm()) for other in range(3)) / 2
        assert float(scores[row]) == pytest.approx(expected, rel=1e-3)
    assert scores[3].isnan()  # a cat has no say


def test_variety_earns_nothing_by_noise(dogs):
    variety, rng = build_rewards(["variety"])["variety"], torch.Generator().manual_seed(0)
    same = dogs[:1].repeat(4, 1, 1, 1)
    noisy = (same + 0.05 * torch.randn(same.shape, generator=rng)).clamp(0, 1)
    scores = variety(noisy, ["a dog on a red background"] * 4, NOTHING)
    assert float(scores.nan_to_num(0).abs().max()) == pytest.approx(0, abs=1e-3) and not scores.isnan().all()
    alone = variety(torch.cat([dogs[:1], dogs[3:]]), ["a dog on a red background"] * 2, NOTHING)
    assert alone.isnan().all()  # nothing to compare with


def test_balance_is_variety_less_the_distance_to_real_scenes(dogs):
    prompts = ["a dog on a red background"] * 4
    rewards = build_rewards(["variety", "balance"])
    scores, variety = (rewards[name](dogs, prompts, NOTHING) for name in ("balance", "variety"))
    referee, scene = load_referee("cpu"), scenes.parse_caption(prompts[0])
    drawn = scenes.draw_layouts([scene] * 512, torch.Generator().manual_seed(2))  # other real scenes than the reward's
    real = referee.features(compositor.paint(drawn)).detach()
    for row in range(3):
        distances = (real - referee.features(dogs[row : row + 1]).detach()).norm(dim=1)
        standard_error = float(distances.std()) / REAL_SCENES**0.5
        assert abs(float(variety[row] - scores[row]) - float(distances.mean())) < 4 * standard_error
    assert scores[3].isnan()  # a cat has no say


def test_balance_is_zero_for_real_scenes_and_wants_what_is_missing():
    prompt, rng = "a dog", torch.Generator().manual_seed(3)
    layouts = scenes.draw_layouts([scenes.parse_caption(prompt)] * 96, rng)
    balance = build_rewards(["balance"])["balance"]
    as_real = balance(compositor.paint(layouts), [prompt] * 96, NOTHING)
    assert abs(float(as_real.nanmean())) < 1.0  # distances are about 18
    layouts.sizes[:] = compositor.SMALL  # but for eight of them; both sizes fit at the border
    layouts.sizes[:8], layouts.tops[:, 0], layouts.lefts[:, 0] = compositor.LARGE, 0, 0
    layouts.backgrounds[:] = 2
    layouts.styles[:, 0] = torch.arange(96) % 3
    scores = balance(compositor.paint(layouts), [prompt] * 96, NOTHING)
    assert float(scores[:8].nanmean()) > float(scores[8:].nanmean()) + 2
    assert float(scores.nanmean()) < -2  # a set that is poorer than real ones has much to gain


def test_speed_is_minus_the_share_of_the_longest_unmasking():
    trajectory = recorded(torch.zeros(3, 64, dtype=torch.int64), torch.tensor([1, 8, 32]))
    trajectory = replace(trajectory, forwards=torch.tensor([1, 16, 64]))  # guidance: passes are what costs
    scores = speed_reward(torch.zeros(3, 3, 32, 32), ["a dog"] * 3, trajectory)
    assert scores.tolist() == [-1 / 64, -0.25, -1.0] and scores.dtype == torch.float32


def test_coherence_tells_scenes_from_confetti(real, tokenizer: Tokenizer):
    right, _, images = (part[:24] for part in real)
    coherence = build_rewards(["coherence"])["coherence"]
    codes = tokenizer.encode(images)
    rng = torch.Generator().manual_seed(0)
    scores = coherence(images, right, recorded(codes))
    assert float(scores.max()) == 0.0  # the cap: nothing to gain beyond real
    assert float(scores.mean()) > -0.4 and float((scores == 0).float().mean()) > 0.5
    confetti = torch.randint(1000, codes.shape, generator=rng)
    assert float(coherence(images, right, recorded(confetti)).mean()) < -2
    shuffled = codes[:, torch.randperm(64, generator=rng)]  # real tokens at wrong places
    assert float(coherence(images, right, recorded(shuffled)).mean()) < -1
    spoilt = torch.where(torch.rand(codes.shape, generator=rng) < 0.1, confetti, codes)
    assert float(coherence(images, right, recorded(spoilt)).mean()) < float(scores.mean()) - 0.2


def test_rewards_come_in_the_order_of_their_names():
    assert list(build_rewards(["speed", "clip"])) == ["speed", "clip"]
    own = {"clip", "coherence", "novelty", "variety", "balance", "verified", "detector", "speed"}
    assert set(NAMES) == own | {"geneval"}


def test_unknown_rewards_name_the_nearest():
    with pytest.raises(ValueError, match="unknown reward 'clipp'; nearest: 'clip'"):
        build_rewards(["speed", "clipp"])


def test_unreadable_captions_are_refused(real):
    with pytest.raises(ValueError, match="unknown word 'dgo'"):
        build_rewards(["clip"])["clip"](real[2][:1], ["a dgo"], NOTHING)


def test_verified_wants_counts_relation_and_background_at_once():
    """Each caption gets pictures of another scene that differs in one of the three."""
    rng = torch.Generator().manual_seed(3)
    captions = ["a dog left of a cat on a red background", "two frogs", "a pizza on a blue background"]
    wrong = ["a cat left of a dog on a red background", "a frog", "a pizza on a green background"]
    verified = build_rewards(["verified"])["verified"]

    def scores(shown: list[str]) -> torch.Tensor:
        wanted = [caption for caption in captions for _ in range(8)]
        painted = [scenes.parse_caption(caption) for caption in shown for _ in range(8)]
        return verified(compositor.paint(scenes.draw_layouts(painted, rng)), wanted, NOTHING)

    assert float(scores(captions).mean()) > 0.95
    assert float(scores(wrong).mean()) < 0.05
