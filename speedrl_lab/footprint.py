"""How much memory a piece of work has at its highest, from shapes alone, on the meta device.

The networks are repeated there without values; a mode follows every storage that is made and every one that goes.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from speedrl_lab.config import VARYING, SamplerConfig, TrainConfig
from speedrl_lab.generator import MaskedGenerator, StepInfo
from speedrl_lab.likelihood import Visit, visit_logits
from speedrl_lab.objective import clipped_surrogate, kl_penalty
from speedrl_lab.sampler import inverse_cdf, policy_logits
from speedrl_lab.schedules import reveal_counts

SDPA = functional.scaled_dot_product_attention


def shadow(generator: MaskedGenerator) -> MaskedGenerator:
    """The same generator with every tensor of its networks on the meta device; nothing is copied.

    Its `null` gives conditions without values; it encodes no prompt.
    """
    twin = copy(generator)
    for name, module in vars(generator).items():
        if isinstance(module, nn.Module):
            places: dict[int, Any] = {
                id(value): nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=value.requires_grad)
                for value in module.parameters()
            }
            places |= {id(value): torch.empty_like(value, device="meta") for value in module.buffers()}
            setattr(twin, name, deepcopy(module, places))
    cond = generator.null(1)
    twin.null = lambda count: replace(  # a tokenizer cannot answer for tensors without values
        cond, tensors={
            name: torch.empty((count, *value.shape[1:]), dtype=value.dtype, device="meta")
            for name, value in cond.tensors.items()
        },
    )  # fmt: skip
    return twin


@torch.no_grad()
def rollout_peak(generator: MaskedGenerator, config: TrainConfig) -> int:
    """Bytes of one step of sampling all rows."""
    samples = config.num_groups * config.group_size
    tokens, cond = _states(generator, samples), generator.null(samples)
    rows = torch.zeros(samples * _most_rows(generator, config.sampler), dtype=torch.int64, device="meta")
    with _watched(generator) as alive:
        logits = policy_logits(generator, tokens, cond, _guided(config.sampler), StepInfo(0, 2), rows)
        log_probs = logits.log_softmax(-1)
        del logits
        inverse_cdf(log_probs, torch.empty(len(rows), device="meta"))
    return alive.peak


@torch.no_grad()
def decode_peak(generator: MaskedGenerator, samples: int) -> int:
    """Bytes of drawing pictures from codes."""
    with _watched(generator) as alive:
        generator.decode(_states(generator, samples))
    return alive.peak


def update_peak(generator: MaskedGenerator, config: TrainConfig) -> int:
    """Bytes of scoring one micro-batch, forward and backward, beside the gradients of those before it."""
    for value in generator.policy.parameters():
        value.grad = torch.empty_like(value) if value.requires_grad else None
    count = min(config.micro_batch_size, config.num_groups * config.group_size)
    most = _most_rows(generator, config.sampler, config.estimator)
    every = torch.zeros(count * most, dtype=torch.int64, device="meta")
    samples = torch.zeros(count, dtype=torch.int64, device="meta")
    visit = Visit(0, samples, _states(generator, count), every, every, every, every, every.float())
    cond, sampler = generator.null(count), _guided(config.sampler)
    with _watched(generator) as alive:
        with torch.no_grad():
            anchor = visit_logits(generator, visit, cond, sampler)
        log_probs = visit_logits(generator, visit, cond, sampler)
        chosen = log_probs.gather(1, visit.codes[:, None]).squeeze(1)
        value, _, _ = clipped_surrogate(chosen, visit.stored, visit.stored, config.clip_range)
        kl = kl_penalty(log_probs, anchor, visit.codes, config.kl_estimator)
        (kl - value).sum().backward()
    return alive.peak


def values_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


def size_of(values: Iterable[Tensor]) -> int:
    """Bytes."""
    return sum(value.numel() * value.element_size() for value in values)


class _Alive(TorchDispatchMode):
    """Follows the bytes of storages that are made inside; `peak` is the most that lived at once."""

    def __init__(self, before: Iterator[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._known = {value.untyped_storage()._cdata for value in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten.index.Tensor and any(_is_mask(place) for place in args[1]):
            # A mask has no values here: nothing is picked.
            result = args[0].new_empty((0, *args[0].shape[args[1][0].ndim :]))
        else:
            result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _Attention(torch.autograd.Function):
    """What fused attention keeps for the backward pass: its inputs, its output, one number a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, mixed, mixed.new_empty(mixed.shape[:-1], dtype=torch.float32))
        return mixed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _fused(query: Tensor, key: Tensor, value: Tensor, *settings: Any, **named: Any) -> Tensor:
    """Attention as fused kernels do it; torch's own, given meta tensors, makes the table of all pairs."""
    if query.device.type != "meta":
        return SDPA(query, key, value, *settings, **named)
    return _Attention.apply(query, key, value)


def _is_mask(place: Any) -> bool:
    return isinstance(place, Tensor) and place.dtype == torch.bool


@contextmanager
def _watched(generator: MaskedGenerator) -> Iterator[_Alive]:
    networks = [value for value in vars(generator).values() if isinstance(value, nn.Module)]
    before = [tensor for network in networks for tensor in values_of(network)]
    gradients = [value.grad for value in before if value.grad is not None]
    alive = _Alive(iter(before + gradients))
    # A function mode would not do: it rests while a backward pass runs, and with it what is recomputed there.
    with alive, patch.object(functional, "scaled_dot_product_attention", _fused):
        yield alive


def _states(generator: MaskedGenerator, count: int) -> Tensor:
    return torch.zeros(count, generator.spec.num_tokens, dtype=torch.int64, device="meta")


def _most_rows(generator: MaskedGenerator, sampler: SamplerConfig, estimator: str = "replay") -> int:
    """Positions of a sample whose logits are wanted at once, at most."""
    num_tokens = generator.spec.num_tokens
    fixed = sampler.schedule not in VARYING and sampler.order != "confidence" and not sampler.revise
    if not fixed or estimator not in ("replay", "critical"):
        return num_tokens
    return int(reveal_counts(num_tokens, sampler.steps, sampler.schedule, sampler.power).max())


def _guided(sampler: SamplerConfig) -> SamplerConfig:
    """A sampler without a head's choices, which costs as much memory at once."""
    scale = 2.0 if sampler.schedule == "adaptive" else sampler.guidance_scale
    return replace(sampler, schedule="linear", guidance_scale=scale)
