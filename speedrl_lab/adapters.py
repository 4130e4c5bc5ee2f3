"""LoRA of a policy (Hu et al., arXiv 2106.09685): W x + alpha / rank * B A x with W frozen.

The layers are peft's, put inside the policy in place, so that it keeps its class, its attributes and
its place behind the generator contract. With its adapter switched off a policy is its own reference.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import nn

from speedrl_lab.generator import MaskedGenerator
from speedrl_lab.precision import is_half


def add_lora(generator: MaskedGenerator, rank: int, alpha: float | None = None, seed: int = 0) -> None:
    """Freeze the policy of `generator` and give its `lora_targets` trainable low-rank adapters.

    A is drawn from `seed`, uniform within 1 / sqrt(inputs); B is 0, so the policy computes what it did.

    Args:
        rank: rows of A and columns of B.
        alpha: strength of the adapter; None for `rank`, a factor of 1.

    Raises ImportError where peft is missing, ValueError for a rank or alpha that is not positive, for a
    policy that has an adapter already, and for a family without targets.
    """
    policy, targets = generator.policy, generator.lora_targets
    if rank < 1:
        raise ValueError(f"LoRA rank={rank}: expected at least 1; nearest: 1")
    if alpha is not None and not alpha > 0:
        raise ValueError(f"LoRA alpha={alpha}: expected a positive number or None for rank ({rank})")
    if has_adapter(policy):
        raise ValueError("the policy has a LoRA adapter already; merge it first, or load the generator afresh")
    if not targets:
        raise ValueError(f"generator {generator.spec.name!r} names no lora_targets; tune the whole policy instead")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError:
        raise ImportError("LoRA needs peft, which is not installed: pip install 'speedrl_lab[lora]'") from None
    config = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=list(targets))
    training, device = policy.training, generator.device
    policy.requires_grad_(False)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # peft draws from the global state
        inject_adapter_in_model(config, policy)
    policy.train(training)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in _lora_layers(policy):
            weight = layer.lora_A["default"].weight  # (rank, inputs)
            weight.copy_(nn.init.kaiming_uniform_(torch.empty(weight.shape), a=5**0.5, generator=rng))


def has_adapter(policy: nn.Module) -> bool:
    """Whether a policy has LoRA layers."""
    return any(True for _ in _lora_layers(policy))


def require_whole(policy: nn.Module) -> None:
    """Raise ValueError for a policy that was loaded in bfloat16 and is to be trained, or an adapter merged into it.

    Weights below an adapter that is there already were rounded by training itself, which has their originals.
    """
    if is_half(policy) and not has_adapter(policy):
        raise ValueError(
            "the policy is bfloat16, which rounds small steps away: load it with policy_dtype='float32'; the training "
            "knob policy_dtype='bfloat16' keeps the originals of what it rounds"
        )


@contextmanager
def adapter_off(policy: nn.Module) -> Iterator[None]:
    """Inside, the policy is what it was before its adapter; raises ValueError for a policy without one.

    Do not call `backward` inside: the adapter gets no gradient there.
    """
    if not has_adapter(policy):
        raise ValueError("the policy has no LoRA adapter to switch off; call add_lora first")
    layers = [layer for _, layer in _lora_layers(policy) if not layer.disable_adapters]
    trainable = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in trainable:  # peft would make a frozen adapter trainable
            parameter.requires_grad_(flag)


def merged(policy: nn.Module) -> nn.Module:
    """A plain, trainable copy of a policy, W + alpha / rank * B A in place of each adapted layer."""
    plain = deepcopy(policy)
    for name, layer in list(_lora_layers(plain)):
        layer.merge()
        plain.set_submodule(name, layer.get_base_layer())
    if hasattr(plain, "peft_config"):  # so that the copy can get an adapter of its own
        del plain.peft_config
    return plain.requires_grad_(True)


def _lora_layers(policy: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and peft layers; told by their parts, so that a policy without adapter needs no peft."""
    return ((name, module) for name, module in policy.named_modules() if hasattr(module, "lora_A"))
