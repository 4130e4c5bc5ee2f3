"""Log-probability of a trajectory: exact replay, and the cheaper estimators of the field beside it.

log pi = sum over steps of log P(pace) + log P(choice of positions) + sum over tokens of log p(token | state).
With a model-independent order (Halton, random) the choice is a constant, left out. Where steps revise, every token
that a step drew counts, those that were drawn anew later as well. In confidence order every
masked position proposes a token and an ordered Plackett-Luce draw keeps some of them, so that the proposals
that were thrown away belong to the probability as well.

Every estimator is a set of states with tokens to score in each (`scored_states`); the sum of weight times
log-probability is the estimate. Only `replay` is exact. Left out: gradient through a threshold schedule's
decision to stop, which is a step function of the policy.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from speedrl_lab import noise
from speedrl_lab.config import SamplerConfig, nearest
from speedrl_lab.generator import Cond, MaskedGenerator, StepInfo
from speedrl_lab.pace import pace_features
from speedrl_lab.sampler import choice_level, plackett_luce, policy_logits, steered_log_probs
from speedrl_lab.trajectory import Trajectory

ESTIMATORS = ("replay", "random_mask", "one_step", "coupled", "critical")
CRITICAL_SHARE = 0.5
"""Share of its steps, at least one, at which `critical` scores a sample."""


@dataclass(frozen=True)
class Visit:
    """One batch of states at one step, and the tokens to score there.

    `samples` int64 (S,), `tokens` int64 (S, N) with masks, `rows` int64 (R,) flat indices into S*N of
    the positions scored; `owners`, `positions`, `codes` int64 (R,) are sample, position and token of each.
    `stored` float32 (R,) is their log-probability when they were drawn, None where it was never computed;
    `weight` multiplies all of them. `picks` int64 (S, k): which of a sample's M scored tokens were kept,
    in order, with noise of scale `level`; None where the choice has no factor. `pace` int64 (S,): the action
    each sample took there; None where the state was never visited, or has no head.
    """

    step: int
    samples: Tensor
    tokens: Tensor
    rows: Tensor
    owners: Tensor
    positions: Tensor
    codes: Tensor
    stored: Tensor | None
    weight: float = 1.0
    picks: Tensor | None = None
    level: float = 0.0
    pace: Tensor | None = None


def visits(trajectory: Trajectory, batch_size: int) -> Iterator[Visit]:
    """All states of a trajectory with the tokens fixed there, in batches of at most `batch_size`, step by step."""
    every = torch.ones(len(trajectory), int(trajectory.steps.max()), dtype=torch.bool, device=trajectory.tokens.device)
    yield from _replayed(trajectory, every, batch_size)


def _replayed(trajectory: Trajectory, wanted: Tensor, batch_size: int) -> Iterator[Visit]:
    """The visits where `wanted` bool (B, T) holds."""
    for step in range(wanted.shape[1]):
        alive = (wanted[:, step] & (trajectory.steps > step)).nonzero().flatten()
        for samples in alive.split(batch_size) if len(alive) else ():
            scored, codes, stored = trajectory.drawn(step)
            visit = _visit(step, samples, trajectory.state(step)[samples], scored[samples], codes, stored)
            yield visit if trajectory.pace is None else replace(visit, pace=trajectory.pace[samples, step])


def _visit(
    step: int,
    samples: Tensor,
    tokens: Tensor,
    scored: Tensor,
    codes: Tensor,
    stored: Tensor | None,
    weight: float = 1.0,
) -> Visit:
    """Score `codes` (B, N) of all samples at `scored` bool (S, N) in the states `tokens` (S, N)."""
    row, position = scored.nonzero(as_tuple=True)
    owners = samples[row]
    return Visit(
        step=step,
        samples=samples,
        tokens=tokens,
        rows=row * tokens.shape[1] + position,
        owners=owners,
        positions=position,
        codes=codes[owners, position],
        stored=None if stored is None else stored[owners, position],
        weight=weight,
    )


def _proposed(trajectory: Trajectory, batch_size: int) -> Iterator[Visit]:
    """Confidence order: all proposals of every step, and which of them were kept in which order."""
    num_tokens = trajectory.tokens.shape[1]
    for step in range(trajectory.sampler.steps):
        known = int((trajectory.reveal_step[0] < step).sum())  # equal in every row
        count = int((trajectory.reveal_step[0] == step).sum())
        for samples in torch.arange(len(trajectory), device=trajectory.tokens.device).split(batch_size):
            proposals = trajectory.proposals[samples, step]  # (S, N)
            row, position = (proposals >= 0).nonzero(as_tuple=True)
            rank = (proposals >= 0).cumsum(1) - 1  # of each position among the masked ones
            level = choice_level(trajectory.sampler, step)
            kept = trajectory.order[samples, known : known + count]
            yield Visit(
                step=step,
                samples=samples,
                tokens=trajectory.state(step)[samples],
                rows=row * num_tokens + position,
                owners=samples[row],
                positions=position,
                codes=proposals[row, position],
                stored=trajectory.proposal_log_prob[samples[row], step, position],
                picks=rank.gather(1, kept) if level > 0 else None,
                level=level,
            )


def _remasked(trajectory: Trajectory, estimator: str, seed: int, batch_size: int, first: int) -> Iterator[Visit]:
    """States made from final tokens by a fresh random mask; one share of masks for all samples.

    `one_step`: everything masked (d1, arXiv 2504.12216). `random_mask`: m of N masked, m uniform, weighted by
    N/m, so that it is unbiased for the mean log-probability over all orders of one token a step (LLaDA,
    arXiv 2502.09992). `coupled`: a mask and its complement, so that each token is scored once (DiffuCoder,
    arXiv 2506.20639).
    """
    count, num_tokens = trajectory.tokens.shape
    device = trajectory.tokens.device
    keys = noise.fold(torch.full((count,), seed, device=device), torch.arange(first, first + count, device=device))
    rank = noise.uniforms(keys, noise.MASK, 0, num_tokens).argsort(1).argsort(1)  # (B, N)
    share = float(noise.uniforms(torch.tensor([seed]), noise.MASK, 1, 1))
    match estimator:
        case "one_step":
            masks, weight = [rank >= 0], 1.0
        case "random_mask":
            num_masked = 1 + int(share * num_tokens)  # 1 ... N
            masks, weight = [rank < num_masked], num_tokens / num_masked
        case "coupled":
            num_masked = 1 + int(share * (num_tokens - 1))  # 1 ... N-1
            masks, weight = [rank < num_masked, rank >= num_masked], 1.0
    most = trajectory.sampler.steps if trajectory.sampler else int(trajectory.steps.max())
    for masked in masks:
        step = int((1 - float(masked[0].float().mean())) * most)  # what a network with a time input is told
        for samples in torch.arange(count, device=device).split(batch_size):
            shown = torch.where(masked, trajectory.mask_id, trajectory.tokens)[samples]
            yield _visit(min(step, most - 1), samples, shown, masked[samples], trajectory.tokens, None, weight)


def _critical(trajectory: Trajectory) -> Tensor:
    """Which steps of each sample were the least predictable, bool (B, T): our reading of MaskFocus
    (arXiv 2512.18766), which ranks steps by how much the picture changes."""
    steps = torch.arange(int(trajectory.steps.max()), device=trajectory.tokens.device)
    here = trajectory.reveal_step[:, :, None] == steps  # (B, N, T)
    surprise = -(trajectory.log_prob[:, :, None] * here).sum(1)  # (B, T)
    surprise = surprise.masked_fill(steps >= trajectory.steps[:, None], -torch.inf)
    rank = surprise.argsort(1, descending=True).argsort(1)
    return rank < (trajectory.steps * CRITICAL_SHARE).ceil()[:, None]


def scored_states(
    trajectory: Trajectory,
    estimator: str = "replay",
    order_factor: str = "exact",
    seed: int = 0,
    batch_size: int = 64,
    first: int = 0,
) -> Iterator[Visit]:
    """The states an estimator looks at and what it scores there.

    The masks that some make depend on `seed` and the number of a sample, counted from `first`.

    Raises ValueError for an unknown estimator, for states of an adaptive schedule in which it never acted, and
    for `replay` of a confidence order without noise, whose probability is 0 or 1.
    """
    check_likelihood(trajectory.sampler, estimator, order_factor)
    confident = trajectory.proposals is not None
    if estimator == "replay" and confident and order_factor == "exact":
        yield from _proposed(trajectory, batch_size)
    elif estimator == "replay":
        yield from visits(trajectory, batch_size)
    elif estimator == "critical":
        yield from _replayed(trajectory, _critical(trajectory), batch_size)
    else:
        yield from _remasked(trajectory, estimator, seed, batch_size, first)


def check_likelihood(sampler: SamplerConfig | None, estimator: str, order_factor: str) -> None:
    """Raise ValueError in one line for a likelihood that does not exist."""
    for name, value, known in (
        ("estimator", estimator, list(ESTIMATORS)),
        ("order_factor", order_factor, ["exact", "token_only"]),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} is not known; nearest: {nearest(value, known)!r}")
    if sampler is not None and sampler.schedule == "adaptive" and estimator not in ("replay", "critical"):
        raise ValueError(
            f"estimator={estimator!r} makes states in which schedule='adaptive' chose no temperature and guidance; "
            "take 'replay' or 'critical'"
        )
    if sampler is not None and sampler.revise and estimator != "replay":
        raise ValueError(f"estimator={estimator!r} knows nothing of drafts that were revised; take 'replay'")
    deterministic = sampler is not None and sampler.order == "confidence" and sampler.choice_temperature == 0
    if deterministic and estimator == "replay" and order_factor == "exact" and sampler.steps > 1:
        raise ValueError(
            "choice_temperature=0.0: the confidence order is deterministic and its probability has no gradient; "
            "draw with choice_temperature=1.0, or take order='halton', or order_factor='token_only' (biased)"
        )


def visit_logits(generator: MaskedGenerator, visit: Visit, cond: Cond, sampler: SamplerConfig) -> Tensor:
    """Log-probabilities of all codes at the positions scored in a visit, float32 (R, V); adaptive schedules at
    the temperature and guidance that were taken there."""
    info = StepInfo(visit.step, sampler.steps)
    logits = policy_logits(generator, visit.tokens, cond.index(visit.samples), sampler, info, visit.rows)
    log_probs = logits.log_softmax(-1)
    if sampler.schedule != "adaptive":
        return log_probs
    _, temperatures, scales = generator.pace.decode(visit.pace, visit.tokens.shape[1])
    return steered_log_probs(generator, log_probs, visit.tokens, info, visit.rows, temperatures, scales)


def visit_choice(visit: Visit, chosen: Tensor) -> Tensor:
    """Log-probability (S,) of the ordered choice in a visit, from those of its proposals (R,); differentiable."""
    return plackett_luce(chosen.unflatten(0, (len(visit.samples), -1)) / visit.level, visit.picks)


def trajectory_log_prob(
    generator: MaskedGenerator,
    prompts: Sequence[str],
    trajectory: Trajectory,
    sampler: SamplerConfig | None = None,
    estimator: str = "replay",
    order_factor: str = "exact",
    seed: int = 0,
    batch_size: int = 64,
) -> Tensor:
    """Log-probability of each trajectory given its order, float32 (B,); differentiable.

    `replay` is exact: with Halton and random orders up to the order's constant, with confidence order
    including the choices (`order_factor="token_only"` leaves them out, and is biased). The other estimators
    are those of `scored_states`. The pace factor is computed anew as well, with its gradient through what
    the head reads. Raises ValueError for settings other than those the trajectory was drawn with, or when
    the number of prompts and samples differ.
    """
    sampler = require_same(trajectory, sampler)
    check_likelihood(sampler, estimator, order_factor)
    if len(prompts) != len(trajectory):
        raise ValueError(f"{len(prompts)} prompts for {len(trajectory)} samples; expected one each")
    cond = generator.encode(prompts)
    total = torch.zeros(len(trajectory), device=generator.device)
    for visit in scored_states(trajectory, estimator, order_factor, seed, batch_size):
        log_probs = visit_logits(generator, visit, cond, sampler)
        chosen = log_probs.gather(1, visit.codes[:, None]).squeeze(1)
        total = total.index_add(0, visit.owners, visit.weight * chosen)
        if visit.picks is not None:
            total = total.index_add(0, visit.samples, visit_choice(visit, chosen))
    if trajectory.pace is not None and not sampler.greedy_pace:  # a greedy pace is no draw
        for visit in visits(trajectory, batch_size):
            features = visit_pace_features(generator, visit, cond, trajectory, sampler)
            chosen = generator.pace(features).gather(1, visit.pace.clamp(min=0)[:, None]).squeeze(1)
            total = total.index_add(0, visit.samples, chosen * (visit.pace >= 0))
    return total


def require_same(trajectory: Trajectory, sampler: SamplerConfig | None) -> SamplerConfig:
    """The settings a trajectory was drawn with; raises ValueError where others are given."""
    drawn = trajectory.sampler
    if sampler is None and drawn is None:
        raise ValueError("the trajectory does not say how it was drawn; give its sampler")
    if sampler is None or drawn is None:
        return sampler or drawn
    for name, value in vars(drawn).items():
        if getattr(sampler, name) != value:
            raise ValueError(
                f"the trajectory was drawn with {name}={value!r}, the likelihood was asked for with "
                f"{getattr(sampler, name)!r}; give the sampler it was drawn with"
            )
    return drawn


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
