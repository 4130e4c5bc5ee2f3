"""Every trajectory of a small generator with its exact probability: what estimators are measured against.

The tree of decisions (order, budget, pace, proposals, choices, tokens) is expanded breadth-first, all of it.
Nothing is drawn and nothing is replayed, so that this is independent of the sampling loop and of the
likelihood: the three agree or one of them is wrong.
"""

import itertools
import math
from collections import Counter
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional

from speedrl_lab.config import SamplerConfig
from speedrl_lab.generator import Cond, MaskedGenerator, StepInfo
from speedrl_lab.pace import FEATURES, pace_counts, pace_features
from speedrl_lab.sampler import policy_logits
from speedrl_lab.schedules import halton_order, reveal_counts, shifted_orders
from speedrl_lab.trajectory import Trajectory

LIMIT = 200_000
"""Trajectories that are still enumerated."""


@dataclass(frozen=True)
class Outcomes:
    """All M trajectories of one prompt, one a row, each a different sequence of decisions."""

    trajectory: Trajectory
    """As a sampler would have recorded them."""
    log_prob: Tensor
    """Exact log-probability of each, float64 (M,); differentiable in the policy and the pace head."""
    constant: Tensor
    """The part of it that no weight changes, float64 (M,): the order's and the budget's."""

    def __len__(self) -> int:
        return len(self.log_prob)


def expected(outcomes: Outcomes, values: Tensor) -> Tensor:
    """The exact mean of values (M,), one a trajectory: a float64 scalar whose gradient is the policy gradient."""
    return (outcomes.log_prob.exp() * values).sum()


def enumerate_trajectories(
    generator: MaskedGenerator, prompt: str, sampler: SamplerConfig, through_features: bool = True
) -> Outcomes:
    """All trajectories of a prompt; their probabilities sum to 1.

    Args:
        through_features: differentiate the pace also through the entropies it reads; training takes them
            as constants (False).

    Raises ValueError for more than LIMIT trajectories, steps > N, a paced schedule without a pace head, or an
    adaptive one.
    """
    if sampler.schedule == "adaptive":
        raise ValueError("schedule='adaptive' is not enumerated; take schedule='paced'")
    if sampler.revise:
        raise ValueError("revise=True is not enumerated: every step draws everything anew; take revise=False")
    if sampler.schedule == "paced" and generator.pace is None:
        raise ValueError(f"schedule='paced' needs a pace head and generator {generator.spec.name!r} has none")
    count = count_trajectories(generator, sampler)
    if count > LIMIT:
        raise ValueError(
            f"about 10^{math.log10(count):.1f} trajectories, at most {LIMIT} can be enumerated; "
            "take fewer steps, order='halton', or generator 'tiny'"
        )
    cond, branches, finished = generator.encode([prompt]), _roots(generator, sampler), []
    for step in range(sampler.steps):
        log_probs = _log_probs(generator, cond, sampler, branches.trajectory.tokens, step)
        if sampler.order == "confidence":
            branches = _keep_confident(branches, log_probs, step)
        else:
            branches, log_probs, counts = _decide_counts(generator, branches, log_probs, step, through_features)
            branches = _reveal(branches, log_probs, counts, step)
        done = (branches.trajectory.tokens != branches.trajectory.mask_id).all(1)
        finished.append(branches.select(done))
        branches = branches.select(~done)
        if not len(branches.plan):
            break
    leaves = _join(finished)
    return Outcomes(leaves.trajectory, leaves.log_prob, leaves.constant)


def count_trajectories(generator: MaskedGenerator, sampler: SamplerConfig) -> int:
    """How many trajectories there are, at most; raises ValueError for steps > N."""
    num_tokens, num_codes = generator.spec.num_tokens, generator.spec.codebook_size
    counts = reveal_counts(num_tokens, sampler.steps, _kind(sampler), sampler.power).tolist()
    if sampler.order == "confidence":
        masked = [num_tokens - known for known in itertools.accumulate([0, *counts[:-1]])]
        noisy = [_level(sampler, step) > 0 for step in range(sampler.steps)]
        steps = zip(masked, counts, noisy, strict=True)
        return math.prod(num_codes**m * (math.perm(m, count) if random else 1) for m, count, random in steps)
    halton = sampler.order == "halton"
    orders = len(_halton_orders(generator)[0]) if halton else math.factorial(num_tokens)
    plans = {"paced": _paced_plans(num_tokens, sampler.steps), "random_budget": sampler.steps}
    return orders * plans.get(sampler.schedule, 1) * num_codes**num_tokens


def _paced_plans(num_tokens: int, steps: int) -> int:
    """Sequences of pace actions that end with everything revealed."""
    plans, complete = Counter({0: 1}), 0  # tokens known -> sequences that led there
    for _ in range(steps - 1):
        grown: Counter[int] = Counter()
        for known, ways in plans.items():
            for count in pace_counts(num_tokens).tolist():
                grown[min(num_tokens, known + count)] += ways
        complete += grown.pop(num_tokens, 0)
        plans = grown
    return complete + plans.total()


def _kind(sampler: SamplerConfig) -> str:
    """The schedule of fixed counts behind a schedule."""
    return sampler.schedule if sampler.schedule in ("cosine", "linear", "arccos") else "power"


def _level(sampler: SamplerConfig, step: int) -> float:
    """Scale of the Gumbel noise on confidences; 0 at the last step."""
    return sampler.choice_temperature * (1 - (step + 1) / sampler.steps)


@dataclass(frozen=True)
class _Branches:
    """Trajectories under way. `select` copies, so that what it returns may be filled in."""

    trajectory: Trajectory
    log_prob: Tensor
    constant: Tensor
    plan: Tensor
    """How many tokens each step reveals where the policy has no say, int64 (M, T)."""

    def select(self, rows: Tensor) -> "_Branches":
        return _Branches(self.trajectory.select(rows), self.log_prob[rows], self.constant[rows], self.plan[rows])

    def known(self) -> Tensor:
        """How many tokens are revealed, int64 (M,)."""
        return (self.trajectory.tokens != self.trajectory.mask_id).sum(1)

    def grown(self, log_prob: Tensor) -> "_Branches":
        """After one more decision of log-probability (M,)."""
        return replace(self, log_prob=self.log_prob + log_prob)


def _join(parts: list[_Branches]) -> _Branches:
    """The rows of all parts."""

    def cat(owners: list, name: str) -> Tensor:
        return torch.cat([getattr(owner, name) for owner in owners])

    tables = [part.trajectory for part in parts]
    tensors = [f.name for f in fields(Trajectory) if isinstance(getattr(tables[0], f.name), Tensor)]
    trajectory = replace(tables[0], **{name: cat(tables, name) for name in tensors})
    return _Branches(trajectory, cat(parts, "log_prob"), cat(parts, "constant"), cat(parts, "plan"))


def _halton_orders(generator: MaskedGenerator) -> tuple[Tensor, Tensor]:
    """The different shifted and flipped Halton orders (K, N), and the probability of each, float64 (K,)."""
    grid = generator.spec.grid
    cells = [(torch.arange(size) + 0.5) / size for size in (*grid, 2, 2)]  # the middle of each cell of uniforms
    orders = shifted_orders(halton_order(*grid), grid, torch.cartesian_prod(*cells))
    different, times = orders.unique(dim=0, return_counts=True)
    return different, times.double() / len(orders)


def _roots(generator: MaskedGenerator, sampler: SamplerConfig) -> _Branches:
    """Nothing revealed yet: one branch for every order and every budget."""
    num_tokens, steps = generator.spec.num_tokens, sampler.steps
    match sampler.order:
        case "confidence":  # written as it is made
            orders, chances = torch.zeros(1, num_tokens, dtype=torch.int64), torch.ones(1, dtype=torch.float64)
        case "random":
            orders = torch.tensor(list(itertools.permutations(range(num_tokens))))
            chances = torch.full((len(orders),), 1 / len(orders), dtype=torch.float64)
        case "halton":
            orders, chances = _halton_orders(generator)
    budgets = range(1, steps + 1) if sampler.schedule == "random_budget" else [steps]
    counts = [reveal_counts(num_tokens, budget, _kind(sampler), sampler.power) for budget in budgets]
    plan = torch.stack([functional.pad(count, (0, steps - len(count))) for count in counts])
    constant = (chances[:, None] / len(plan)).log().expand(-1, len(plan)).flatten()  # (orders * budgets,)
    orders, plan = orders.repeat_interleave(len(plan), 0), plan.repeat(len(orders), 1)
    device, rows = generator.device, len(orders)
    confident, paced = sampler.order == "confidence", sampler.schedule == "paced"
    zeros = torch.zeros(rows, steps, num_tokens, device=device)
    trajectory = Trajectory(
        tokens=torch.full((rows, num_tokens), generator.spec.mask_id, device=device),
        reveal_step=torch.full((rows, num_tokens), -1, dtype=torch.int16, device=device),
        steps=torch.zeros(rows, dtype=torch.int64, device=device),
        forwards=torch.zeros(rows, dtype=torch.int64, device=device),
        log_prob=torch.zeros(rows, num_tokens, device=device),
        mask_id=generator.spec.mask_id,
        sampler=sampler,
        order=orders.to(device),
        proposals=zeros.long() - 1 if confident else None,
        proposal_log_prob=zeros if confident else None,
        choice_log_prob=zeros[..., 0] if confident else None,
        pace=zeros[..., 0].long() - 1 if paced else None,
        pace_features=torch.zeros(rows, steps, FEATURES, device=device) if paced else None,
        pace_log_prob=zeros[..., 0] if paced else None,
    )
    constant = constant.to(device)
    return _Branches(trajectory, constant, constant, plan.to(device))


def _log_probs(generator: MaskedGenerator, cond: Cond, sampler: SamplerConfig, tokens: Tensor, step: int) -> Tensor:
    """Log-probabilities float64 (M, N, V) in the states (M, N); equal states are computed once."""
    states, which = tokens.unique(dim=0, return_inverse=True)
    same = cond.index(torch.zeros(len(states), dtype=torch.int64, device=tokens.device))
    logits = policy_logits(generator, states, same, sampler, StepInfo(step, sampler.steps))
    return logits.double().log_softmax(-1)[which]


def _decide_counts(
    generator: MaskedGenerator, branches: _Branches, log_probs: Tensor, step: int, through_features: bool
) -> tuple[_Branches, Tensor, Tensor]:
    """How many tokens each branch reveals now, int64 (M,); a paced branch splits into its K choices."""
    sampler, order = branches.trajectory.sampler, branches.trajectory.order
    num_tokens = order.shape[1]
    known = branches.known()
    remaining = num_tokens - known
    if sampler.schedule not in ("paced", "threshold"):
        return branches, log_probs, branches.plan[:, step]
    if step == sampler.steps - 1:
        return branches, log_probs, remaining
    if sampler.schedule == "threshold":
        masked = branches.trajectory.tokens == branches.trajectory.mask_id
        confidence = (log_probs.exp().amax(-1) * masked).sum(1) / remaining
        return branches, log_probs, branches.plan[:, step].where(confidence < sampler.stop_confidence, remaining)
    ahead = (known[:, None] + torch.arange(num_tokens, device=order.device)).clamp(max=num_tokens - 1)
    entropies = -(log_probs.exp() * log_probs).sum(-1).float().gather(1, order.gather(1, ahead))  # (M, N)
    features = pace_features(entropies if through_features else entropies.detach(), remaining)
    choices = generator.pace(features)  # (M, K)
    possible = torch.ones_like(choices, dtype=torch.bool)
    if sampler.greedy_pace:
        possible = functional.one_hot(choices.argmax(1), choices.shape[1]).bool()
    parents, taken = possible.nonzero(as_tuple=True)
    chosen = choices[parents, taken]
    split = branches.select(parents).grown(torch.zeros_like(chosen) if sampler.greedy_pace else chosen)
    split.trajectory.pace[:, step] = taken
    split.trajectory.pace_features[:, step] = features.detach()[parents]
    split.trajectory.pace_log_prob[:, step] = chosen.detach()
    counts = pace_counts(num_tokens).to(taken.device)[taken]
    return split, log_probs[parents], counts.minimum(remaining[parents])


def _reveal(branches: _Branches, log_probs: Tensor, counts: Tensor, step: int) -> _Branches:
    """Every way to fill the next `counts` (M,) positions of each branch's order."""
    known, num_codes, parts = branches.known(), log_probs.shape[-1], []
    for count in counts.unique().tolist():
        rows = (counts == count).nonzero().flatten()
        codes = torch.tensor(list(itertools.product(range(num_codes), repeat=count)), device=rows.device)
        parents, codes = rows.repeat_interleave(len(codes)), codes.repeat(len(rows), 1)  # (P,), (P, count)
        index = known[parents][:, None] + torch.arange(count, device=rows.device)
        positions = branches.trajectory.order[parents].gather(1, index)
        chosen = log_probs[parents[:, None], positions, codes]  # (P, count)
        parts.append(branches.select(parents).grown(chosen.sum(1)))
        _fill(parts[-1].trajectory, positions, codes, chosen, step)
    return _join(parts)


def _fill(trajectory: Trajectory, positions: Tensor, codes: Tensor, log_prob: Tensor, step: int) -> None:
    """Write codes (P, k) at positions (P, k) as fixed at a step."""
    guided = trajectory.sampler.guidance_scale != 1.0
    trajectory.tokens.scatter_(1, positions, codes)
    trajectory.reveal_step.scatter_(1, positions, step)
    trajectory.log_prob.scatter_(1, positions, log_prob.detach().float())
    trajectory.steps[:] = step + 1
    trajectory.forwards[:] = (step + 1) * (2 if guided else 1)


def _keep_confident(branches: _Branches, log_probs: Tensor, step: int) -> _Branches:
    """Every way to propose a token at each masked position, times every ordered choice of those kept."""
    trajectory, num_codes = branches.trajectory, log_probs.shape[-1]
    count, known = int(branches.plan[0, step]), int(branches.known()[0])  # equal in every row
    level = _level(trajectory.sampler, step)
    positions = (trajectory.tokens == trajectory.mask_id).nonzero()[:, 1].unflatten(0, (len(branches.plan), -1))
    width = positions.shape[1]  # m masked positions
    rows = torch.arange(len(positions), device=positions.device)
    codes = torch.tensor(list(itertools.product(range(num_codes), repeat=width)), device=rows.device)
    parents, codes = rows.repeat_interleave(len(codes)), codes.repeat(len(rows), 1)  # (P,), (P, m)
    proposed = log_probs[parents[:, None], positions[parents], codes]  # (P, m)
    if level > 0:
        picks = torch.tensor(list(itertools.permutations(range(width), count)), device=rows.device)
        again = torch.arange(len(parents), device=rows.device).repeat_interleave(len(picks))
        picks = picks.repeat(len(parents), 1)  # (P, count)
        parents, codes, proposed = parents[again], codes[again], proposed[again]
        choice = _ordered_draw(proposed / level, picks)
    else:
        picks = proposed.detach().sort(1, descending=True).indices[:, :count]
        choice = torch.zeros(len(picks), dtype=proposed.dtype, device=rows.device)
    positions = positions[parents]
    grown = branches.select(parents).grown(proposed.sum(1) + choice)
    kept = positions.gather(1, picks)
    _fill(grown.trajectory, kept, codes.gather(1, picks), proposed.gather(1, picks), step)
    grown.trajectory.order[:, known : known + count] = kept
    grown.trajectory.proposals[:, step].scatter_(1, positions, codes)
    grown.trajectory.proposal_log_prob[:, step].scatter_(1, positions, proposed.detach().float())
    grown.trajectory.choice_log_prob[:, step] = choice.detach().float()
    return grown


def _ordered_draw(scores: Tensor, picks: Tensor) -> Tensor:
    """Log-probability (P,) of taking the items `picks` (P, k) one after the other, each in proportion to
    exp(score) among those left (Plackett-Luce)."""
    total = torch.zeros(len(picks), dtype=scores.dtype, device=scores.device)
    for item in picks.unbind(1):
        total = total + scores.log_softmax(1).gather(1, item[:, None]).squeeze(1)
        scores = scores.scatter(1, item[:, None], -torch.inf)
    return total
