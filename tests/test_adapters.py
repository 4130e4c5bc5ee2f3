"""LoRA adapters: a policy that starts as it was, is its own reference, and merges to plain weights."""

import sys
from copy import deepcopy

import pytest
import torch
from conftest import randomize, tiny_emoji
from test_contract import STEP, half_masked
from torch import Tensor

from speedrl_lab.adapters import adapter_off, add_lora, has_adapter, merged
from speedrl_lab.generators import load_generator
from speedrl_lab.networks import MaskedTransformer

PROMPTS = ["a dog", "two cats on a red background", "a star left of a pig"]

RANK = 4


def logits(generator) -> Tensor:
    """Logits of three half-masked states, without gradient."""
    with torch.no_grad():
        return generator.logits(half_masked(generator), generator.encode(PROMPTS), STEP)


def train_a_little(generator, steps: int = 3) -> None:
    """A few optimizer steps that change what the policy computes."""
    trainable = [parameter for parameter in generator.policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        generator.logits(half_masked(generator), generator.encode(PROMPTS), STEP)[..., :50].mean().neg().backward()
        optimizer.step()


def adapters(policy) -> dict[str, Tensor]:
    """The adapter's tensors by name."""
    return {name: value for name, value in policy.state_dict().items() if ".lora_" in name}


@pytest.fixture
def adapted(emoji):
    """A generator with an adapter that has been trained."""
    add_lora(emoji, RANK, seed=1)
    train_a_little(emoji)
    return emoji


def test_the_start_is_unchanged_and_the_policy_keeps_its_place(emoji):
    before, policy, training = logits(emoji), emoji.policy, emoji.policy.training
    add_lora(emoji, RANK, alpha=16)
    assert emoji.policy is policy and type(policy) is MaskedTransformer and policy.training == training
    assert torch.allclose(logits(emoji), before, atol=1e-6)
    assert emoji.device == torch.device("cpu") and has_adapter(policy)


def test_only_the_adapter_is_trained(emoji):
    plain = sum(parameter.numel() for parameter in emoji.policy.parameters())
    add_lora(emoji, RANK)
    frozen = {name: value.clone() for name, value in emoji.policy.state_dict().items() if ".lora_" not in name}
    assert sum(value.numel() for value in frozen.values()) == plain
    train_a_little(emoji)
    for name, parameter in emoji.policy.named_parameters():
        assert parameter.requires_grad == (".lora_" in name) == (parameter.grad is not None), name
    state = emoji.policy.state_dict()
    assert all(torch.equal(state[name], value) for name, value in frozen.items())
    # One block: qkv, out, up and down, each with A and B of width 32.
    assert len(adapters(emoji.policy)) == 8
    assert sum(value.numel() for value in adapters(emoji.policy).values()) == RANK * 32 * (4 + 2 + 5 + 5)


def test_alpha_scales_the_adapter(tokenizer):
    """W x + alpha / rank * B A x, spelt out at one layer."""
    for alpha, factor in ((None, 1.0), (8.0, 2.0)):
        generator = tiny_emoji(tokenizer)
        base = generator.policy.blocks[0].up.weight.detach().clone()
        add_lora(generator, RANK, alpha)
        layer = randomize(generator.policy.blocks[0].up, 3)
        with torch.no_grad():
            layer.base_layer.weight.copy_(base)
        low_rank = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(layer(x), x @ (base + factor * low_rank).T, atol=1e-5)


def test_the_start_depends_on_the_seed_alone(tokenizer):
    def start(seed: int) -> dict[str, Tensor]:
        generator = tiny_emoji(tokenizer)
        state = torch.get_rng_state()
        add_lora(generator, RANK, seed=seed)
        assert torch.equal(state, torch.get_rng_state())
        return adapters(generator.policy)

    torch.manual_seed(1)
    first = start(0)
    torch.manual_seed(2)
    again, other = start(0), start(1)
    for name, value in first.items():
        assert torch.equal(value, again[name])
        if "lora_B" in name:
            assert not value.any()
        else:
            assert not torch.equal(value, other[name])
            bound = value.shape[1] ** -0.5
            assert 0.8 * bound < float(value.abs().max()) <= bound


def test_without_its_adapter_the_policy_is_the_base_exactly(emoji):
    before = logits(emoji)
    add_lora(emoji, RANK)
    train_a_little(emoji)
    tuned = logits(emoji)
    assert not torch.allclose(tuned, before, atol=1e-2)
    with adapter_off(emoji.policy):
        assert torch.equal(logits(emoji), before)
        with adapter_off(emoji.policy):
            assert torch.equal(logits(emoji), before)
        assert torch.equal(logits(emoji), before)
    assert torch.equal(logits(emoji), tuned)
    with pytest.raises(RuntimeError, match="inside"), adapter_off(emoji.policy):
        raise RuntimeError("inside")
    assert torch.equal(logits(emoji), tuned)


def test_switching_off_changes_neither_gradients_nor_what_is_trainable(adapted):
    def gradients(switch: bool) -> list[Tensor]:
        adapted.policy.zero_grad()
        loss = adapted.logits(half_masked(adapted), adapted.encode(PROMPTS), STEP).square().mean()
        if switch:
            with adapter_off(adapted.policy):
                logits(adapted)
        loss.backward()
        return [p.grad.clone() for p in adapted.policy.parameters() if p.requires_grad]

    plain, switched = gradients(False), gradients(True)
    assert len(plain) == len(switched) == 8 and any(gradient.any() for gradient in plain)
    assert all(torch.equal(left, right) for left, right in zip(plain, switched, strict=True))
    adapted.policy.requires_grad_(False)
    with adapter_off(adapted.policy):
        pass
    assert not any(parameter.requires_grad for parameter in adapted.policy.parameters())


def test_merged_weights_compute_the_same_and_leave_the_original(adapted):
    before, names = logits(adapted), set(adapted.policy.state_dict())
    plain = merged(adapted.policy)
    assert set(adapted.policy.state_dict()) == names and torch.equal(logits(adapted), before)
    assert set(plain.state_dict()) == set(MaskedTransformer(width=32, depth=1).state_dict())
    assert not has_adapter(plain) and all(parameter.requires_grad for parameter in plain.parameters())
    adapted.policy = plain
    assert torch.allclose(logits(adapted), before, atol=1e-5)
    add_lora(adapted, RANK)  # and can start again from there
    assert torch.allclose(logits(adapted), before, atol=1e-5)


def test_merging_a_plain_policy_copies_it(emoji):
    plain = merged(emoji.policy)
    assert plain is not emoji.policy
    for name, value in emoji.policy.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value)


def test_saved_policies_are_ordinary_weights(adapted, tmp_path):
    path = tmp_path / "policy.safetensors"
    adapted.save_policy(path, origin="a test")
    loaded = load_generator("emoji", device="cpu", policy=path)
    assert not has_adapter(loaded.policy)
    tuned, error = logits(adapted), (logits(loaded) - logits(adapted)).abs().max()
    with adapter_off(adapted.policy):
        moved = (logits(adapted) - tuned).abs().max()
    # Half-precision storage, against what the adapter does.
    assert error < 0.01 * tuned.abs().max() and error < 0.1 * moved


def test_states_load_into_a_fresh_adapter(adapted, tokenizer, tmp_path):
    torch.save(adapters(adapted.policy), tmp_path / "adapter.pt")
    fresh = tiny_emoji(tokenizer)
    add_lora(fresh, RANK, seed=7)
    missing, unexpected = fresh.policy.load_state_dict(
        torch.load(tmp_path / "adapter.pt", weights_only=True), strict=False
    )
    assert not unexpected and not any(".lora_" in name for name in missing)
    assert torch.equal(logits(fresh), logits(adapted))


@pytest.mark.parametrize("how", ["copy", "deepcopy"])
def test_copies_are_independent(adapted, how):
    before = logits(adapted)
    other = adapted.copy() if how == "copy" else deepcopy(adapted)
    assert torch.equal(logits(other), before)
    with adapter_off(other.policy):
        assert torch.equal(logits(adapted), before) and not torch.equal(logits(other), before)
    train_a_little(other)
    assert torch.equal(logits(adapted), before) and not torch.equal(logits(other), before)


def test_wrong_input_is_one_clear_line(emoji, monkeypatch):
    for rank, alpha, words in ((0, None, "LoRA rank=0: expected at least 1"), (2, 0.0, "LoRA alpha=0.0: expected a")):
        with pytest.raises(ValueError, match=words):
            add_lora(emoji, rank, alpha)
    with pytest.raises(ValueError, match="no LoRA adapter to switch off"), adapter_off(emoji.policy):
        pass
    with monkeypatch.context() as patch:
        patch.setattr(type(emoji), "lora_targets", ())
        with pytest.raises(ValueError, match="'emoji' names no lora_targets"):
            add_lora(emoji, RANK)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        with pytest.raises(ImportError, match=r"pip install 'speedrl_lab\[lora\]'"):
            add_lora(emoji, RANK)
    assert not has_adapter(emoji.policy) and all(p.requires_grad for p in emoji.policy.parameters())
    add_lora(emoji, RANK)
    with pytest.raises(ValueError, match="has a LoRA adapter already"):
        add_lora(emoji, RANK)
