"""What distillation methods share: an optimizer step, losses, a pool of a teacher's samples, an iteration's numbers."""

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


class Pool:
    """Samples of a teacher for drawn prompts, from which the states of a distillation are made."""

    def __init__(self, prompts: Sequence[str], size: int, seed: int):
        self.seed = seed
        self.prompts = [prompts[row] for row in chosen_prompts(prompts, seed, -1, size)]  # one a sample
        self.tokens: Tensor | None = None  # int64 (P, N), drawn before the first update

    def fill(self, teacher: MaskedGenerator, sampler: SamplerConfig) -> int:
        """Draw the samples, unless they are there; returns the forward passes that were spent."""
        if self.tokens is not None:
            return 0
        parts, forwards = [], 0
        for start in tqdm(range(0, len(self.prompts), POOL_BATCH), desc="teacher samples", unit="batch"):
            # Another seed a batch: the sampler numbers the samples of a prompt inside its batch.
            batch_seed = int(noise.fold(torch.tensor([self.seed]), start))
            drawn = sample(teacher, self.prompts[start : start + POOL_BATCH], sampler, seed=batch_seed)
            parts.append(drawn.tokens)
            forwards += int(drawn.forwards.sum())
        self.tokens = torch.cat(parts)
        return forwards

    def batch(self, iteration: int, count: int) -> tuple[Tensor, list[str]]:
        """Samples (B, N) of an iteration, drawn with replacement, and their prompts."""
        rows = chosen_prompts(self.prompts, self.seed, iteration, count)
        return self.tokens[torch.tensor(rows, device=self.tokens.device)], [self.prompts[row] for row in rows]


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
