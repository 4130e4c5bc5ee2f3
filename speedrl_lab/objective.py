"""Pure functions: the clipped surrogate and the KL penalties. Inputs are log-probabilities."""

import torch
from torch import Tensor


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
    return (reference.exp() * (reference - policy)).sum(-1)


def reverse_kl(policy: Tensor, reference: Tensor) -> Tensor:
    """KL(policy, reference) of log-probabilities (R, V), over the full vocabulary: float32 (R,)."""
    return (policy.exp() * (policy - reference)).sum(-1)


def kl_penalty(policy: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """The penalty named `cross_entropy` (forward KL) or `exact` (reverse KL); (R,)."""
    match estimator:
        case "cross_entropy":
            return forward_kl(policy, reference)
        case "exact":
            return reverse_kl(policy, reference)
        case _:
            raise ValueError(f"kl_estimator={estimator!r}: expected 'cross_entropy' or 'exact'")


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy in nats of log-probabilities (R, V): (R,)."""
    return -(log_probs.exp() * log_probs).sum(-1)
