"""What the distillation methods share: an optimizer step, soft-label losses, random numbers of an iteration."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from speedrl_lab import noise
from speedrl_lab.objective import forward_kl, reverse_kl

MAX_NORM = 1.0


def iteration_keys(seed: int, iteration: int, count: int, device: torch.device) -> Tensor:
    """One key a sample of an iteration, int64 (B,)."""
    key = noise.fold(noise.fold(torch.tensor([seed], device=device), iteration), 1)
    return noise.fold(key, torch.arange(count, device=device))


def chosen_prompts(prompts: Sequence[str], seed: int, iteration: int, count: int) -> list[int]:
    """Indices of `count` prompts, drawn with replacement from (seed, iteration) alone."""
    rng = torch.Generator().manual_seed(seed * 1_000_003 + iteration)
    return torch.randint(len(prompts), (count,), generator=rng).tolist()


def optimizer_step(network: nn.Module, optimizer: Optimizer, learning_rate: float) -> float:
    """Clip the gradient, step, clear; returns the norm before the clip."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    norm = nn.utils.clip_grad_norm_(network.parameters(), MAX_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


def mixed_kl(student: Tensor, teacher: Tensor, reverse_share: float) -> Tensor:
    """(1 - b) KL(teacher, student) + b KL(student, teacher) of log-probabilities (R, V): float32 (R,)."""
    value = (1 - reverse_share) * forward_kl(student, teacher)
    return value + reverse_share * reverse_kl(student, teacher) if reverse_share else value
