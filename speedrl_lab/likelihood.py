"""Log-probability of a trajectory by exact replay of the states it went through.

log pi = sum over steps of log P(pace) + sum over the revealed tokens of log p(token | state). With a
model-independent order (Halton, random) the order factor is a constant, left out; so this is exact up
to that constant, and its gradient is the policy gradient.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from speedrl_lab.config import SamplerConfig
from speedrl_lab.generator import Cond, MaskedGenerator, StepInfo
from speedrl_lab.pace import pace_features
from speedrl_lab.sampler import policy_logits
from speedrl_lab.trajectory import Trajectory


@dataclass(frozen=True)
class Visit:
    """One batch of visited states at one step, and what was revealed there.

    `samples` int64 (S,), `tokens` int64 (S, N) with masks, `rows` int64 (R,) flat indices into S*N of
    the revealed positions; `owners`, `positions`, `codes` int64 (R,) are sample, position and token of each.
    """

    step: int
    samples: Tensor
    tokens: Tensor
    rows: Tensor
    owners: Tensor
    positions: Tensor
    codes: Tensor


def visits(trajectory: Trajectory, batch_size: int) -> Iterator[Visit]:
    """All states of a trajectory in batches of at most `batch_size`, step by step."""
    num_tokens = trajectory.tokens.shape[1]
    for step in range(int(trajectory.steps.max())):
        alive = (trajectory.steps > step).nonzero().flatten()
        for samples in alive.split(batch_size):
            revealed = trajectory.revealed(step)[samples]  # (S, N)
            row, position = revealed.nonzero(as_tuple=True)
            yield Visit(
                step=step,
                samples=samples,
                tokens=trajectory.state(step)[samples],
                rows=row * num_tokens + position,
                owners=samples[row],
                positions=position,
                codes=trajectory.tokens[samples[row], position],
            )


def visit_logits(generator: MaskedGenerator, visit: Visit, cond: Cond, sampler: SamplerConfig) -> Tensor:
    """Log-probabilities of all codes at the positions revealed in a visit, float32 (R, V)."""
    info = StepInfo(visit.step, sampler.steps)
    logits = policy_logits(generator, visit.tokens, cond.index(visit.samples), sampler, info, visit.rows)
    return logits.log_softmax(-1)


def require_exact(sampler: SamplerConfig) -> None:
    """Raise ValueError where the order depends on the model, so that replay would be biased."""
    if sampler.order == "confidence":
        raise ValueError(
            "order='confidence': the choice of positions depends on the model, so replayed token "
            "probabilities are not the trajectory's; use order='halton' or 'random'"
        )


def trajectory_log_prob(
    generator: MaskedGenerator,
    prompts: Sequence[str],
    trajectory: Trajectory,
    sampler: SamplerConfig,
    batch_size: int = 64,
) -> Tensor:
    """Log-probability of each trajectory given its order, float32 (B,); differentiable.

    The pace factor is computed anew as well, with its gradient through what the head reads. Raises
    ValueError for the confidence order, or when the number of prompts and samples differ.
    """
    require_exact(sampler)
    if len(prompts) != len(trajectory):
        raise ValueError(f"{len(prompts)} prompts for {len(trajectory)} samples; expected one each")
    cond = generator.encode(prompts)
    total = torch.zeros(len(trajectory), device=generator.device)
    for visit in visits(trajectory, batch_size):
        log_probs = visit_logits(generator, visit, cond, sampler)
        chosen = log_probs.gather(1, visit.codes[:, None]).squeeze(1)
        total = total.index_add(0, visit.owners, chosen)
    if trajectory.pace is not None:
        for visit in visits(trajectory, batch_size):
            taken = trajectory.pace[visit.samples, visit.step]
            features = visit_pace_features(generator, visit, cond, trajectory, sampler)
            chosen = generator.pace(features).gather(1, taken.clamp(min=0)[:, None]).squeeze(1)
            total = total.index_add(0, visit.samples, chosen * (taken >= 0))
    return total


def visit_pace_features(
    generator: MaskedGenerator, visit: Visit, cond: Cond, trajectory: Trajectory, sampler: SamplerConfig
) -> Tensor:
    """What the pace head saw in a visit, float32 (S, F), computed anew; differentiable."""
    masked = trajectory.reveal_step[visit.samples] >= visit.step  # (S, N)
    num_tokens, remaining = masked.shape[1], masked.sum(1)
    offsets = torch.arange(num_tokens, device=masked.device)
    index = (num_tokens - remaining[:, None] + offsets).clamp(max=num_tokens - 1)
    positions = trajectory.order[visit.samples].gather(1, index)  # (S, N), masked ones first
    inside = offsets < remaining[:, None]
    starts = torch.arange(len(masked), device=masked.device)[:, None] * num_tokens
    rows = (starts + positions)[inside]
    info = StepInfo(visit.step, sampler.steps)
    logits = policy_logits(generator, visit.tokens, cond.index(visit.samples), sampler, info, rows)
    log_probs = logits.log_softmax(-1)
    entropies = torch.zeros(positions.shape, device=masked.device)
    entropies = entropies.masked_scatter(inside, -(log_probs.exp() * log_probs).sum(-1))
    return pace_features(entropies, remaining)
