"""Weights files describe themselves and are never half-written."""

import json
from pathlib import Path

import pytest
import torch
from conftest import randomize
from safetensors.torch import load_file, save_file

from speedrl_lab import weights
from speedrl_lab.generators import load_generator
from speedrl_lab.generators.emoji import WEIGHTS
from speedrl_lab.networks import Detector, MaskedTransformer, SmallClip, Tokenizer
from speedrl_lab.pace import FEATURES, PaceHead, head_for
from speedrl_lab.weights import load_pace, load_weights, read_metadata, save_weights

NETWORKS = {
    "Tokenizer": lambda: Tokenizer(levels=(4, 3), width=16, blocks=1),
    "MaskedTransformer": lambda: MaskedTransformer(width=32, depth=2, heads=2),
    "SmallClip": lambda: SmallClip(widths=(8, 8, 16), text_width=16, features=8),
    "Detector": lambda: Detector(widths=(8, 8, 16), features=8),
}


@pytest.fixture
def policy() -> MaskedTransformer:
    return randomize(MaskedTransformer(width=32, depth=1), 0)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_network_round_trips(tmp_path, name, dtype):
    network, path = randomize(NETWORKS[name](), 1), tmp_path / "deep" / "net.safetensors"
    save_weights(network, path, origin="python train.py", dtype=dtype)
    loaded = load_weights(path, name)
    assert type(loaded) is type(network) and loaded.config == network.config and not loaded.training
    for key, value in network.state_dict().items():
        assert loaded.state_dict()[key].dtype == value.dtype
        assert torch.equal(loaded.state_dict()[key], value.to(dtype).to(value.dtype)), key
    assert [file.name for file in path.parent.iterdir()] == ["net.safetensors"]
    assert load_pace(path) is None


def test_files_say_what_they_are(tmp_path, policy):
    save_weights(policy, tmp_path / "p.safetensors", origin="a command")
    metadata = read_metadata(tmp_path / "p.safetensors")
    assert metadata["module"] == "MaskedTransformer" and metadata["origin"] == "a command"
    assert json.loads(metadata["config"])["width"] == 32


def test_the_pace_head_travels_with_the_policy(tmp_path, policy):
    head = randomize(PaceHead(16), 2)
    save_weights(policy, tmp_path / "p.safetensors", pace=head)
    loaded = load_pace(tmp_path / "p.safetensors")
    assert loaded.config == {"width": 16}
    for left, right in zip(loaded.parameters(), head.parameters(), strict=True):
        assert torch.equal(left, right.half().float())
    assert load_weights(tmp_path / "p.safetensors", "MaskedTransformer").config == policy.config


def test_what_has_learned_to_revise_says_so_in_its_file(tmp_path):
    generator = load_generator("tiny", device="cpu")
    assert not generator.revises
    generator.revises = True
    assert generator.copy().revises
    generator.save_policy(tmp_path / "p.safetensors")
    assert load_generator("tiny", device="cpu", policy=tmp_path / "p.safetensors").revises
    assert not load_generator("tiny", device="cpu").revises


@pytest.mark.parametrize("name", ["tokenizer", "clip", "detector", "generator"])
def test_committed_weights_load(name):
    modules = {"tokenizer": "Tokenizer", "clip": "SmallClip", "detector": "Detector"}
    network = load_weights(WEIGHTS / f"{name}.safetensors", modules.get(name, "MaskedTransformer"))
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    assert read_metadata(WEIGHTS / f"{name}.safetensors")["origin"]


def broken(path: Path, policy: MaskedTransformer, damage: str) -> str:
    """Damage a weights file; returns the words the error must have."""
    save_weights(policy, path)
    whole, tensors = path.read_bytes(), load_file(path)
    metadata = read_metadata(path)
    match damage:
        case "truncated":
            path.write_bytes(whole[: len(whole) // 2])
            return "is truncated or not a safetensors file"
        case "text":
            path.write_text("hello, this is no tensor")
            return "is truncated or not a safetensors file"
        case "empty":
            path.write_bytes(b"")
            return "is truncated or not a safetensors file"
        case "foreign":
            save_file({"weight": torch.zeros(3)}, path)
            return "is not a speedrl_lab/1 weights file"
        case "missing tensor":
            save_file({k: v for k, v in tensors.items() if k != "norm.weight"}, path, metadata)
            return "does not fit its own description"
        case "other shape":
            save_file({**tensors, "norm.weight": torch.zeros(7)}, path, metadata)
            return "does not fit its own description"
    raise AssertionError(damage)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "foreign", "missing tensor", "other shape"])
def test_damaged_files_are_one_clear_line(tmp_path, policy, damage):
    path = tmp_path / "policy.safetensors"
    words = broken(path, policy, damage)
    with pytest.raises(ValueError, match=f"policy.safetensors {words}") as error:
        load_weights(path, "MaskedTransformer")
    assert "\n" not in str(error.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights at .*gone.safetensors; run notebook 00_pretrain"):
        load_weights(tmp_path / "gone.safetensors", "Detector")
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_weights(tmp_path, "Detector")


def test_another_module_is_refused(tmp_path, policy):
    save_weights(policy, tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match="holds a MaskedTransformer, expected a Detector"):
        load_weights(tmp_path / "p.safetensors", "Detector")


def test_a_failed_write_leaves_the_old_file(tmp_path, policy, monkeypatch):
    path = tmp_path / "p.safetensors"
    save_weights(policy, path)
    before = path.read_bytes()

    def disk_full(tensors, target, metadata):
        Path(target).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(weights, "save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_weights(randomize(policy, 5), path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("schedule", ["paced", "adaptive"])
def test_a_head_keeps_its_choices(tmp_path, policy, schedule):
    head = randomize(head_for(schedule, 0), 3)
    save_weights(policy, tmp_path / "p.safetensors", pace=head, dtype=torch.float32)
    loaded = load_pace(tmp_path / "p.safetensors")
    features = torch.randn(4, FEATURES, generator=torch.Generator().manual_seed(0))
    assert loaded.config == head.config and loaded.adaptive == (schedule == "adaptive")
    assert torch.equal(loaded(features), head(features))
    for found, expected in zip(loaded.decode(torch.arange(7), 64), head.decode(torch.arange(7), 64), strict=True):
        assert torch.equal(found, expected)


def test_a_head_alone_is_a_schedule_for_the_base(tmp_path):
    head = PaceHead().reset(3)
    save_weights(head, tmp_path / "head.safetensors", dtype=torch.float32)
    generator = load_generator("emoji", "cpu", policy=tmp_path / "head.safetensors")
    base = load_generator("emoji", "cpu")
    pairs = zip(generator.policy.parameters(), base.policy.parameters(), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs) and base.pace is None
    assert torch.equal(generator.pace.layers[0].weight, head.layers[0].weight)
