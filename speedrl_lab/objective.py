"""Pure functions: the clipped surrogate and the KL penalties. Inputs are log-probabilities."""

import torch
from torch import Tensor

KL_ESTIMATORS = ("cross_entropy", "exact", "k1", "k2", "k3")
SAMPLED = ("k1", "k2", "k3")
"""Those that look at the drawn codes alone."""
LEAST_LOG_PROB = -1e5
"""Stands for log 0: its exponential is 0 and its square is finite, in float32."""
MOST_LOG_RATIO = 20.0
"""Above this no log ratio is exponentiated: exp(20) is 5e8."""


def clipped_surrogate(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip_range: float
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's per-token objective (to be maximized), the ratio, and where the clip acts; all (R,).

    min(r A, clip(r, 1 - e, 1 + e) A) with r = exp(log_prob - old_log_prob) (arXiv 1707.06347, eq. 7).
    """
    ratio = (log_prob - old_log_prob).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    value = torch.minimum(ratio * advantage, clipped * advantage)
    return value, ratio, (clipped * advantage < ratio * advantage)


def forward_kl(policy: Tensor, reference: Tensor) -> Tensor:
    """KL(reference, policy) of log-probabilities (R, V): float32 (R,).

    Its gradient is that of the cross-entropy - sum reference log policy over the full vocabulary, which
    has no sampling noise: our reading of the paper's low-variance cross-entropy estimator. The
    reference's entropy is subtracted so that the value is 0 at the start.
    """
    policy, reference = _finite(policy), _finite(reference)
    return (reference.exp() * (reference - policy)).sum(-1)


def reverse_kl(policy: Tensor, reference: Tensor) -> Tensor:
    """KL(policy, reference) of log-probabilities (R, V), over the full vocabulary: float32 (R,)."""
    policy, reference = _finite(policy), _finite(reference)
    return (policy.exp() * (policy - reference)).sum(-1)


def kl_penalty(policy: Tensor, reference: Tensor, codes: Tensor, estimator: str) -> Tensor:
    """Each token's penalty (R,) for leaving the reference; whoever sums or averages it says so.

    From log-probabilities (R, V) of both; k1, k2 and k3 look only at the codes int64 (R,), which are
    taken to be draws from `policy`, and take the reference's at the codes alone, (R,), as well. Over those
    draws (Schulman, "Approximating KL divergence", 2020):

    | estimator     | value                  | expected value | expected gradient |
    |---------------|------------------------|----------------|-------------------|
    | cross_entropy | full vocabulary        | forward KL     | forward KL's      |
    | exact         | full vocabulary        | reverse KL     | reverse KL's      |
    | k1            | x = log policy / ref   | reverse KL     | reverse KL's      |
    | k2            | x**2 / 2               | neither        | reverse KL's      |
    | k3            | exp(-x) - 1 + x        | reverse KL     | forward KL's      |

    k1 as a plain loss would do nothing: its gradient is that of log policy, which is 0 in expectation.
    Ours has the value of k1 and the score-function gradient x * d log policy (x a constant), which is
    also the gradient of k2. Minimizing k3 is minimizing the forward KL, whatever its value estimates.
    No input overflows: probabilities of 0 count as exp(LEAST_LOG_PROB), and k3 is flat (no gradient)
    where the reference is more than exp(MOST_LOG_RATIO) times likelier than the policy.
    Raises ValueError for an unknown estimator.
    """
    match estimator:
        case "cross_entropy":
            return forward_kl(policy, reference)
        case "exact":
            return reverse_kl(policy, reference)
        case "k1" | "k2" | "k3":
            anchor = _finite(reference) if reference.ndim == 1 else _chosen(reference, codes)
            return _sampled_kl(_chosen(policy, codes), anchor, estimator)
        case _:
            raise ValueError(f"kl_estimator={estimator!r}: expected one of {', '.join(KL_ESTIMATORS)}")


def _sampled_kl(log_prob: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """k1, k2 or k3 from the log-probabilities (R,) of drawn tokens."""
    log_ratio = log_prob - reference
    match estimator:
        case "k1":
            constant = log_ratio.detach()
            return constant + constant * (log_prob - log_prob.detach())  # the value of k1, another gradient
        case "k2":
            return log_ratio.square() / 2
        case _:
            minus = (-log_ratio).clamp(max=MOST_LOG_RATIO)
            return minus.expm1() - minus


def _chosen(log_probs: Tensor, codes: Tensor) -> Tensor:
    """The entries of (R, V) at codes (R,)."""
    return _finite(log_probs.gather(1, codes[:, None]).squeeze(1))


def _finite(log_probs: Tensor) -> Tensor:
    """Without -inf, which times a probability of 0 would be NaN; no gradient reaches what is raised."""
    return log_probs.clamp(min=LEAST_LOG_PROB)


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy in nats of log-probabilities (R, V): (R,)."""
    log_probs = _finite(log_probs)
    return -(log_probs.exp() * log_probs).sum(-1)
