"""The four pretraining loops, three iterations each: records, resuming, stopping."""

import math

import pytest
import torch
from conftest import randomize

from speedrl_lab import pretrain, scenes
from speedrl_lab.networks import Detector, MaskedTransformer, SmallClip, Tokenizer

CPU = torch.device("cpu")
NETWORKS = {
    "tokenizer": lambda: Tokenizer(width=16, blocks=1),
    "clip": lambda: SmallClip(widths=(8, 8, 16), text_width=16, features=8),
    "detector": lambda: Detector(widths=(8, 8, 16), features=16),
    "generator": lambda: MaskedTransformer(width=32, depth=1),
}


@pytest.fixture(autouse=True)
def single_precision(monkeypatch):
    """The precision is measured on the machine, so it could differ between two runs of a test."""
    monkeypatch.setattr(pretrain, "fastest_precision", lambda device: torch.float32)


def made(kind: str) -> torch.nn.Module:
    return randomize(NETWORKS[kind](), 0, std=0.1)


def loop(kind: str, network, checkpoint, tokenizer, iterations: int = 3):
    """The records of one loop; batches of 8 scenes."""
    if kind == "generator":
        return pretrain.train_generator(network, tokenizer, iterations, 8, checkpoint, CPU, 0)
    train = {
        "tokenizer": pretrain.train_tokenizer,
        "clip": pretrain.train_clip,
        "detector": pretrain.train_detector,
    }[kind]
    return train(network, iterations, 8, checkpoint, CPU, 0)


def flat(network) -> torch.Tensor:
    return torch.cat([value.flatten() for value in network.state_dict().values()])


@pytest.mark.parametrize("kind", NETWORKS)
def test_each_loop_yields_records_and_moves_the_weights(tmp_path, tokenizer, kind):
    network = made(kind)
    before = flat(network).clone()
    records = list(loop(kind, network, tmp_path / "checkpoint.pt", tokenizer))
    assert [record["iteration"] for record in records] == [1, 2, 3]
    assert all(math.isfinite(record["loss"]) and record["loss"] > 0 for record in records)
    extra = {"tokenizer": "psnr", "clip": "accuracy", "detector": "accuracy"}.get(kind)
    assert all(set(record) == {"iteration", "loss", "seconds"} | ({extra} - {None}) for record in records)
    assert not torch.equal(flat(network), before) and flat(network).isfinite().all()
    assert not network.training
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_fresh_generator_knows_nothing(tmp_path, tokenizer):
    policy = MaskedTransformer(width=32, depth=1)  # its heads are zero: 1000 codes almost equally likely
    record = next(loop("generator", policy, tmp_path / "checkpoint.pt", tokenizer))
    assert record["loss"] == pytest.approx(math.log(1000), abs=0.05)


def test_the_detector_learns(tmp_path):
    network = made("detector")
    losses = [r["loss"] for r in loop("detector", network, tmp_path / "checkpoint.pt", None, iterations=120)]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


@pytest.mark.parametrize("augment", [pretrain.degrade, pretrain.displace])
def test_augmentations_are_seeded_and_keep_the_scene(augment):
    images = scenes.draw_batch(64, "train", seed=0)[2]
    first, again, other = (augment(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == images.shape and first.min() >= 0 and first.max() <= 1
    change = (first - images).abs().mean((1, 2, 3))
    assert (change > 0.003).all() and (change < 0.25).all()


def test_displace_shifts_pixels_and_cuts_a_square():
    """On a ramp without colour jitter the shift can be read off; what is no shift is one square."""
    ramp = torch.linspace(0.2, 0.8, 32).expand(200, 3, 32, 32).clone()
    moved = pretrain.displace(ramp, torch.Generator().manual_seed(0))
    slopes = moved[:, 0, :, 1:] - moved[:, 0, :, :-1]
    outside = (slopes > 0.01) & (slopes < 0.03)  # jitter scales the ramp's .0194 by at most a tenth
    assert (outside.float().mean((1, 2)) > 0.6).all()
    sizes = torch.tensor([[2, 5], [11, 14]])
    marked = torch.zeros(300, 3, 32, 32)
    marked[:, :, sizes[0, 0] : sizes[0, 1], sizes[1, 0] : sizes[1, 1]] = 1.0
    bright = pretrain.displace(marked, torch.Generator().manual_seed(1))[:, 0] > 0.8
    columns = [row.any(0).nonzero().min().item() for row in bright if row.sum() == 9]
    assert set(columns) == {9, 10, 11, 12, 13}


def test_the_augmentation_of_the_detector_can_be_chosen(tmp_path):
    seen = []

    def watch(images, rng):
        seen.append(len(images))
        return images

    detector = made("detector")
    list(pretrain.train_detector(detector, 2, 8, tmp_path / "checkpoint.pt", CPU, 0, augment=watch))
    assert seen == [8, 8]


def interrupted_after(monkeypatch, draws: int) -> None:
    """Let the drawing of a batch raise KeyboardInterrupt after so many batches."""
    true, left = scenes.draw_batch, [draws]

    def draw(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return true(*arguments)

    monkeypatch.setattr(scenes, "draw_batch", draw)


@pytest.mark.parametrize("kind", NETWORKS)
def test_an_interrupted_loop_goes_on_bit_for_bit(tmp_path, tokenizer, monkeypatch, kind):
    whole = made(kind)
    list(loop(kind, whole, tmp_path / "whole.pt", tokenizer))
    with monkeypatch.context() as patch:
        interrupted_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            list(loop(kind, made(kind), tmp_path / "parts.pt", tokenizer))
    assert torch.load(tmp_path / "parts.pt", weights_only=True)["iteration"] == 2
    parts = made(kind)
    records = list(loop(kind, parts, tmp_path / "parts.pt", tokenizer))
    assert [record["iteration"] for record in records] == [3]
    assert torch.equal(flat(parts), flat(whole))


def test_a_finished_loop_has_nothing_left_to_do(tmp_path):
    first, second = made("detector"), made("detector")
    list(loop("detector", first, tmp_path / "checkpoint.pt", None))
    assert list(loop("detector", second, tmp_path / "checkpoint.pt", None)) == []
    assert torch.equal(flat(first), flat(second))


def test_another_length_is_refused(tmp_path):
    list(loop("detector", made("detector"), tmp_path / "checkpoint.pt", None))
    with pytest.raises(ValueError, match="was started for 3 iterations, now 5 are asked for"):
        list(loop("detector", made("detector"), tmp_path / "checkpoint.pt", None, iterations=5))


def test_the_global_generator_is_left_alone(tmp_path, tokenizer):
    networks = {kind: made(kind) for kind in NETWORKS}
    before = torch.get_rng_state()
    for kind, network in networks.items():
        list(loop(kind, network, tmp_path / f"{kind}.pt", tokenizer, iterations=1))
    assert torch.equal(before, torch.get_rng_state())
