"""How far estimates of the log-probability and of the KL are from the truth, on a generator that can be enumerated.

Expectations over trajectories and over tokens are finite sums; only the masks that some estimators draw are
sampled, from a seed. A small generator has few outputs, so that the gradient of every single trajectory is a
row of coefficients times one Jacobian: that gives exact variances without a backward pass for each.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from speedrl_lab.config import VARYING, SamplerConfig
from speedrl_lab.enumeration import enumerate_trajectories, expected
from speedrl_lab.generator import MaskedGenerator
from speedrl_lab.likelihood import ESTIMATORS, scored_states, trajectory_log_prob, visits
from speedrl_lab.lookup import LookupCopies, Outputs, all_outputs
from speedrl_lab.objective import KL_ESTIMATORS, forward_kl, kl_penalty, reverse_kl
from speedrl_lab.trajectory import Trajectory

DRAWN = ("random_mask", "coupled")
"""Estimators that draw masks."""
NOTHING = 1e-5
"""A gradient of a smaller share of the true one has no direction."""


def likelihood_errors(
    generator: MaskedGenerator,
    prompt: str,
    sampler: SamplerConfig,
    reward: Callable[[Tensor], Tensor],
    masks: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """Every estimator of the log-probability against enumeration, one row each.

    `bias` is the mean error over trajectories in nats, given the order; `std` the spread over masks;
    `correlation` that of single estimates with the truth. The gradient is that of the mean of reward minus
    its mean (an endless group): `gradient_bias`, the distance of its mean from the exact one, and
    `gradient_std`, the square root of the trace of the covariance of one sample, are shares of the exact
    gradient's norm; `cosine` is between mean and exact. `passes` counts network evaluations a trajectory.

    Args:
        reward: from final tokens (M, N) to rewards (M,).
        masks: how many draws of masks stand for all of them.

    Raises ValueError for guidance, a temperature or steps that vary, and where enumeration does.
    """
    _require_plain(sampler)
    outcomes = enumerate_trajectories(generator, prompt, sampler)
    rewards = reward(outcomes.trajectory.tokens).double()
    exact = _flat(torch.autograd.grad(expected(outcomes, rewards), list(generator.policy.parameters())))
    chances = outcomes.log_prob.detach().exp()
    truth = (outcomes.log_prob - outcomes.constant).detach()
    advantage = rewards - (chances * rewards).sum()
    outputs = all_outputs(generator, prompt)
    rows = []
    for name, (estimator, order_factor) in _kinds(sampler).items():
        seeds = range(seed, seed + masks) if estimator in DRAWN else [seed]
        draws = _draws(outputs, outcomes.trajectory, chances, advantage, estimator, order_factor, seeds)
        visited = sum(len(visit.samples) for visit in scored_states(outcomes.trajectory, estimator, order_factor))
        row = {"order": sampler.order, "estimator": name, "passes": visited / len(outcomes)}
        rows.append(row | _log_prob_errors(draws, chances, truth) | _gradient_errors(draws, exact))
    return pd.DataFrame(rows)


def _kinds(sampler: SamplerConfig) -> dict[str, tuple[str, str]]:
    """Estimator and order factor of each row of the table."""
    if sampler.order == "confidence":
        return {"Plackett-Luce": ("replay", "exact"), "token only": ("replay", "token_only")}
    return {estimator: (estimator, "exact") for estimator in ESTIMATORS}


def kl_errors(policy: MaskedGenerator, reference: MaskedGenerator, prompt: str, sampler: SamplerConfig) -> pd.DataFrame:
    """Every estimator of the KL against the true ones, a token, at the states that `policy` visits.

    States are constants, as in training. `bias` is the mean value minus the reverse KL(policy, reference),
    `std` the spread of one drawn token's value in its state. `gradient_norm` (of the mean) and `gradient_std`
    (of one drawn token, in its state) are shares of the norm of the reverse KL's gradient; `bias_reverse` and
    `bias_forward` are relative distances of the mean gradient from the two true ones, `cosine_...` its cosines
    with them, NaN where it is 0. `k1 as a loss` is log policy - log reference, differentiated as it stands.

    Raises ValueError for guidance, a temperature, steps that vary, and a confidence order, in which tokens
    kept are no longer draws from the policy.
    """
    _require_plain(sampler)
    if sampler.order == "confidence":
        raise ValueError("order='confidence': tokens that are kept are no draws from the policy; take order='halton'")
    outputs, weights = all_outputs(policy, prompt), _visited(policy, prompt, sampler)
    log_refs = all_outputs(reference, prompt, jacobian=False).logits.log_softmax(-1)
    logits = outputs.logits.clone().requires_grad_()
    truths = [(weights * kl(logits.log_softmax(-1), log_refs)).sum() for kl in (reverse_kl, forward_kl)]
    reverse, forward = (torch.autograd.grad(kl, logits)[0].flatten() @ outputs.jacobian for kl in truths)
    chances, blocks = outputs.logits.softmax(-1), outputs.jacobian.unflatten(0, logits.shape)  # (K, V), (K, V, P)
    grams, rows = blocks @ blocks.mT, []  # (K, V, V)
    for name in (*KL_ESTIMATORS, "k1 as a loss"):
        values, gradients = _token_penalties(outputs.logits, log_refs, name)  # (K, V), (K, V, V)
        mean, spread = _split(values[..., None], chances)
        gradient, noise = _split(gradients, chances)  # (K, V), (K, V, V)
        moved = (weights[:, None] * gradient).flatten() @ outputs.jacobian
        traces = (noise @ grams * noise).sum(-1)  # (K, V)
        share = float(moved.norm() / reverse.norm())
        rows.append({
            "estimator": name,
            "value": float((weights * mean[:, 0]).sum()),
            "bias": float((weights * mean[:, 0]).sum() - truths[0].detach()),
            "std": _root((weights[:, None] * chances * spread[..., 0].square()).sum()),
            "gradient_norm": share,
            "gradient_std": _root((weights[:, None] * chances * traces).sum()) / float(reverse.norm()),
            "bias_reverse": float((moved - reverse).norm() / reverse.norm()),
            "bias_forward": float((moved - forward).norm() / forward.norm()),
            "cosine_reverse": _cosine(moved, reverse) if share > NOTHING else float("nan"),
            "cosine_forward": _cosine(moved, forward) if share > NOTHING else float("nan"),
        })  # fmt: skip
    return pd.DataFrame(rows)


def k3_overflow(gaps: list[float]) -> pd.DataFrame:
    """k3 where the reference is exp(gap) times likelier than the policy: as written in textbooks, and ours."""
    rows = []
    for gap in gaps:
        logits = torch.tensor([[-gap, 0.0]], requires_grad=True)
        policy, reference = logits.log_softmax(-1), torch.tensor([[0.0, -gap]]).log_softmax(-1)
        minus = (reference - policy)[:, 0]
        penalty = kl_penalty(policy, reference, torch.tensor([0]), "k3")
        textbook = minus.exp() - 1 - minus
        slopes = [torch.autograd.grad(value, logits, retain_graph=True)[0][0, 0] for value in (textbook, penalty)]
        rows.append({
            "gap": gap, "textbook": float(textbook.detach()), "textbook_gradient": float(slopes[0]),
            "ours": float(penalty.detach()), "ours_gradient": float(slopes[1]),
        })  # fmt: skip
    return pd.DataFrame(rows)


def equal_neighbors(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """A reward that no token earns alone: share of neighboring pairs with equal codes, (B, N) to (B,)."""
    cells = tokens.unflatten(1, grid)  # (B, rows, columns)
    pairs = [(cells[:, 1:] == cells[:, :-1]).flatten(1), (cells[:, :, 1:] == cells[:, :, :-1]).flatten(1)]
    return torch.cat(pairs, 1).double().mean(1)


@torch.no_grad()
def nudged(generator: MaskedGenerator, scale: float, seed: int = 0) -> MaskedGenerator:
    """A copy whose policy has normal noise of this scale on every weight: a step away from its reference."""
    copy, rng = generator.copy(), torch.Generator().manual_seed(seed)
    for parameter in copy.policy.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=rng) * scale)
    return copy


def _require_plain(sampler: SamplerConfig) -> None:
    """Raise ValueError for what a table of the network's outputs does not hold."""
    for name, usual in (("guidance_scale", 1.0), ("temperature", 1.0), ("first_temperature", 1.0)):
        if getattr(sampler, name) != usual:
            raise ValueError(f"{name}={getattr(sampler, name)!r}: estimators are compared with {usual!r}")
    if sampler.schedule in VARYING:
        raise ValueError(f"schedule={sampler.schedule!r}: expected a fixed number of steps; nearest: 'power'")


@dataclass(frozen=True)
class _Draws:
    """What an estimator gave, for all trajectories and masks."""

    estimates: Tensor
    """Log-probabilities, float64 (draws, M)."""
    gradient: Tensor
    """Mean policy gradient, float64 (P,)."""
    square: float
    """Mean squared norm of the gradient of one sample."""


def _draws(
    outputs: Outputs,
    trajectory: Trajectory,
    chances: Tensor,
    advantage: Tensor,
    estimator: str,
    order_factor: str,
    seeds: range | list[int],
) -> _Draws:
    """Estimates and gradients for every seed of masks."""
    prompts, copies = [""] * len(trajectory), LookupCopies(outputs, len(trajectory))
    estimates, mean, square = [], torch.zeros(len(outputs.gram), dtype=torch.float64), 0.0
    for seed in seeds:
        values = trajectory_log_prob(
            copies, prompts, trajectory, trajectory.sampler, estimator, order_factor, seed, batch_size=len(trajectory)
        )
        derivative = torch.autograd.grad(values.sum(), copies.table)[0].flatten(1)  # (M, K * V)
        norms = ((derivative @ outputs.gram) * derivative).sum(1).double()  # (M,)
        square += float((chances * advantage.square() * norms).sum()) / len(seeds)
        mean += (chances * advantage) @ derivative.double() / len(seeds)
        estimates.append(values.detach().double())
    return _Draws(torch.stack(estimates), mean @ outputs.jacobian.double(), square)


def _log_prob_errors(draws: _Draws, chances: Tensor, truth: Tensor) -> dict[str, float]:
    """Bias, spread over masks, and correlation over trajectories and masks."""
    mean = draws.estimates.mean(0)  # (M,)
    over_masks = float((chances * draws.estimates.var(0, correction=0)).sum())
    left, right = mean - (chances * mean).sum(), truth - (chances * truth).sum()
    between = float((chances * left.square()).sum())
    covariance = float((chances * left * right).sum())
    spread = ((between + over_masks) * float((chances * right.square()).sum())) ** 0.5
    return {
        "bias": float((chances * (mean - truth)).sum()),
        "std": over_masks**0.5,
        "correlation": covariance / spread,
    }


def _gradient_errors(draws: _Draws, exact: Tensor) -> dict[str, float]:
    """Relative bias and spread of the policy gradient, and the cosine of its mean."""
    norm = float(exact.norm())
    variance = max(0.0, draws.square - float(draws.gradient.square().sum()))
    return {
        "gradient_bias": float((draws.gradient - exact).norm()) / norm,
        "cosine": _cosine(draws.gradient, exact),
        "gradient_std": variance**0.5 / norm,
    }


def _visited(policy: MaskedGenerator, prompt: str, sampler: SamplerConfig) -> Tensor:
    """How often a token is drawn at each of the K outputs, as a share of all tokens drawn, float32 (K,)."""
    with torch.no_grad():
        outcomes = enumerate_trajectories(policy, prompt, sampler)
        outputs = all_outputs(policy, prompt, jacobian=False)
    weights = torch.zeros(len(outputs.logits), dtype=torch.float64)
    for visit in visits(outcomes.trajectory, len(outcomes)):
        places = outputs.find(visit.tokens).flatten()[visit.rows]
        weights.index_add_(0, places, outcomes.log_prob.exp()[visit.owners])
    return (weights / weights.sum()).float()


def _token_penalties(logits: Tensor, log_refs: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Penalty (K, V) for each code that may be drawn, and its derivative by the logits (K, V, V)."""
    count, num_codes = logits.shape
    copies = logits.repeat_interleave(num_codes, 0).requires_grad_()  # (K * V, V), one for each drawn code
    log_probs, repeated = copies.log_softmax(-1), log_refs.repeat_interleave(num_codes, 0)
    codes = torch.arange(num_codes).repeat(count)
    if name == "k1 as a loss":
        values = (log_probs - repeated).gather(1, codes[:, None]).squeeze(1)
    else:
        values = kl_penalty(log_probs, repeated, codes, name)
    gradients = torch.autograd.grad(values.sum(), copies)[0]
    return values.detach().unflatten(0, logits.shape), gradients.unflatten(0, logits.shape)


def _split(values: Tensor, chances: Tensor) -> tuple[Tensor, Tensor]:
    """Means over the drawn code of (K, V, D), (K, D), and the deviations from them (K, V, D)."""
    mean = (chances[..., None] * values).sum(1)
    return mean, values - mean[:, None]


def _flat(parts: tuple[Tensor, ...]) -> Tensor:
    """One float64 vector."""
    return torch.cat([part.flatten() for part in parts]).double()


def _cosine(left: Tensor, right: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(left, right, dim=0))


def _root(value: Tensor) -> float:
    return float(value.detach().clamp(min=0).sqrt())
