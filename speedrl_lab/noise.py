"""Random numbers that belong to a sample: a counter-based generator on int64 tensors.

A number depends on (seed, prompt, index, step, purpose, position) alone, never on the batch a sample
is in or on the device, and nothing is drawn from a global generator. The mixing function is the
finalizer of splitmix64 (Steele et al., 2014).
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)

ORDER, TOKEN, CHOICE, PACE, BUDGET, MASK, START = range(7)  # purposes: numbers for one never meet those for another


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical: int64 >> keeps the sign


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def fold(keys: Tensor, number: int | Tensor) -> Tensor:
    """New keys from keys and a number, or a tensor of numbers that broadcasts against them."""
    if isinstance(number, int):  # on the host, so that no number is copied to a device
        return _mix(keys * 3 + _wrapped((number + 1) * _GOLDEN))
    return _mix(keys * 3 + (number.to(keys.device, torch.int64) + 1) * _GOLDEN)


def _wrapped(number: int) -> int:
    """The int64 of the same last 64 bits."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def occurrences(prompts: Sequence[str]) -> list[int]:
    """How often each prompt appeared before in the list: the index of a sample of its prompt."""
    seen: dict[str, int] = {}
    indices = []
    for prompt in prompts:
        indices.append(seen.get(prompt, 0))
        seen[prompt] = indices[-1] + 1
    return indices


def row_keys(seed: int, prompts: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
    """One key a row, int64 (B,): from the seed, the prompt's text and its occurrence in the list."""
    digests = [int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big", signed=True) for prompt in prompts]
    keys = torch.tensor(digests, dtype=torch.int64, device=device)
    return fold(fold(keys, seed), torch.tensor(occurrences(prompts), device=device))


def uniforms(keys: Tensor, purpose: int, step: int, count: int) -> Tensor:
    """Numbers in (0, 1), float32 (B, count), one per position."""
    return uniforms_at(keys, purpose, step, torch.arange(count, device=keys.device))


def uniforms_at(keys: Tensor, purpose: int, step: int, positions: Tensor) -> Tensor:
    """Those of `uniforms` at some positions, float32 (B, M): from int64 (M,), or (B, M)."""
    bits = fold(fold(fold(keys, purpose), step)[:, None], positions)
    return _shift(bits, 41).float().add(0.5).mul(2.0**-23)  # 23 bits and a half: exact
