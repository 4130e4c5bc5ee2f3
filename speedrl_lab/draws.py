"""What a sampling loop draws and plans, as pure functions: codes, choices of positions, orders, counts, starts."""

import torch
from torch import Tensor
from torch.nn import functional

from speedrl_lab import noise
from speedrl_lab.config import VARYING, SamplerConfig
from speedrl_lab.generator import MaskedGenerator
from speedrl_lab.schedules import halton_order, reveal_counts, shifted_orders


def inverse_cdf(log_probs: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one code a row: int64 (R,) from log-probabilities (R, V) and numbers (R,) in (0, 1)."""
    cumulative = log_probs.exp().cumsum(-1)  # (R, V)
    target = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target).squeeze(1).clamp(max=log_probs.shape[1] - 1)


def plackett_luce(scores: Tensor, picks: Tensor) -> Tensor:
    """Log-probability (B,) of drawing the indices `picks` (B, k) in this order, without replacement.

    Each draw is a softmax over the scores (B, M) still there; adding Gumbel noise to the scores and taking
    the k largest, in order, draws from it (Plackett-Luce; Kool et al., arXiv 1903.06059).
    """
    chosen = scores.gather(1, picks)  # (B, k)
    rest = scores.scatter(1, picks, -torch.inf).logsumexp(1, keepdim=True)  # (B, 1), never drawn
    left = torch.cat([chosen, rest], 1).flip(1).logcumsumexp(1).flip(1)  # (B, k + 1), there at each draw
    return (chosen - left[:, :-1]).sum(1)


def choice_level(sampler: SamplerConfig, step: int) -> float:
    """Scale of the Gumbel noise on the confidences at a step; 0 at the last one, where all are kept."""
    return sampler.choice_temperature * (1 - (step + 1) / sampler.steps)


def fixed_orders(generator: MaskedGenerator, sampler: SamplerConfig, keys: Tensor) -> Tensor:
    """Positions in the order of revealing, int64 (B, N): Halton shifted and flipped a row, or random."""
    grid, num_tokens = generator.spec.grid, generator.spec.num_tokens
    if sampler.order == "random":
        return noise.uniforms(keys, noise.ORDER, 0, num_tokens).argsort(1)
    uniforms = noise.uniforms(keys, noise.ORDER, 0, 4)
    return shifted_orders(halton_order(*grid).to(keys.device), grid, uniforms)


def planned_counts(num_tokens: int, sampler: SamplerConfig) -> Tensor:
    """How many positions each step of the schedule reveals, int64 (T,) on the host; where it varies, the power one."""
    kind = "power" if sampler.schedule in VARYING else sampler.schedule
    return reveal_counts(num_tokens, sampler.steps, kind, sampler.power)


def fixed_counts(num_tokens: int, sampler: SamplerConfig, keys: Tensor) -> Tensor:
    """How many positions each step reveals as far as it does not depend on the model, int64 (B, T).

    For a random budget each row has its own number of steps, zeros after it. Raises ValueError for
    steps > N.
    """
    if sampler.schedule != "random_budget":
        return planned_counts(num_tokens, sampler).to(keys.device).expand(len(keys), -1)
    budgets = range(1, sampler.steps + 1)
    counts = [reveal_counts(num_tokens, budget, "power", sampler.power) for budget in budgets]
    table = [functional.pad(count, (0, sampler.steps - len(count))) for count in counts]
    drawn = (noise.uniforms(keys, noise.BUDGET, 0, 1)[:, 0] * sampler.steps).long()  # (B,)
    return torch.stack(table).to(keys.device)[drawn]


def start_tokens(num_tokens: int, codebook_size: int, mask_id: int, share: float, keys: Tensor) -> Tensor:
    """What the first step sees, int64 (B, N): masks, and random codes at round(share * N) positions."""
    shown = torch.full((len(keys), num_tokens), mask_id, device=keys.device)
    if share == 0:
        return shown
    rank = noise.uniforms(keys, noise.START, 0, num_tokens).argsort(1).argsort(1)  # (B, N)
    codes = (noise.uniforms(keys, noise.START, 1, num_tokens) * codebook_size).long()
    return torch.where(rank < round(share * num_tokens), codes, shown)
