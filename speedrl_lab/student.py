"""What the distillation methods share: an optimizer step, losses, a teacher's samples, numbers of an iteration."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from speedrl_lab import noise
from speedrl_lab.config import SamplerConfig
from speedrl_lab.generator import MaskedGenerator
from speedrl_lab.objective import forward_kl, reverse_kl
from speedrl_lab.sampler import sample

MAX_NORM = 1.0
POOL_BATCH = 128


def iteration_keys(seed: int, iteration: int, count: int, device: torch.device) -> Tensor:
    """One key a sample of an iteration, int64 (B,)."""
    key = noise.fold(noise.fold(torch.tensor([seed], device=device), iteration), 1)
    return noise.fold(key, torch.arange(count, device=device))


def chosen_prompts(prompts: Sequence[str], seed: int, iteration: int, count: int) -> list[int]:
    """Indices of `count` prompts, drawn with replacement from (seed, iteration) alone."""
    rng = torch.Generator().manual_seed(seed * 1_000_003 + iteration)
    return torch.randint(len(prompts), (count,), generator=rng).tolist()


def pool_prompts(prompts: Sequence[str], seed: int, size: int, rows: Sequence[int]) -> list[str]:
    """The prompts of some rows of a pool of `size` samples."""
    chosen = chosen_prompts(prompts, seed, -1, size)
    return [prompts[chosen[row]] for row in rows]


def draw_pool(
    teacher: MaskedGenerator, prompts: Sequence[str], sampler: SamplerConfig, size: int, seed: int
) -> tuple[Tensor, int]:
    """Samples of a teacher for drawn prompts (`pool_prompts`), int64 (P, N), and the forward passes they cost."""
    chosen = pool_prompts(prompts, seed, size, range(size))
    parts, forwards = [], 0
    for start in tqdm(range(0, size, POOL_BATCH), desc="teacher samples", unit="batch"):
        # Another seed a batch: the sampler numbers the samples of a prompt inside its batch.
        batch_seed = int(noise.fold(torch.tensor([seed]), start))
        drawn = sample(teacher, chosen[start : start + POOL_BATCH], sampler, seed=batch_seed)
        parts.append(drawn.tokens)
        forwards += int(drawn.forwards.sum())
    return torch.cat(parts), forwards


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
