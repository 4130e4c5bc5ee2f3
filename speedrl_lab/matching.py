"""Token-level distribution matching: where samples differ from what a teacher would have drawn.

After Di[M]O (Zhu et al., arXiv 2503.15457). An auxiliary model learns to predict masked tokens of the
samples, as the teacher once learned those of real pictures. Some tokens of a sample are masked again; where
the two predict differently there, the samples are not distributed as the teacher's are. The gradient of
their divergence is what a student's logits are given: it needs no gradient through the draw, knows all
codes instead of the one that was drawn, and punishes a missing mode as well as a wrong token.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from speedrl_lab import noise
from speedrl_lab.generator import Cond, MaskedGenerator, StepInfo, guided_logits
from speedrl_lab.student import optimizer_step

ONE = StepInfo(0, 1)


class Matcher:
    """A frozen teacher and the auxiliary model of the student's samples."""

    def __init__(self, teacher: MaskedGenerator, guidance_scale: float, reverse_share: float, learning_rate: float):
        self.teacher, self.auxiliary = teacher, teacher.copy()
        self.guidance_scale, self.reverse_share, self.learning_rate = guidance_scale, reverse_share, learning_rate
        self.optimizer = torch.optim.Adam(self.auxiliary.policy.parameters())

    @property
    def forwards(self) -> int:
        """Passes a sample that `pull` and `learn` make together."""
        return 3 if self.guidance_scale == 1.0 else 4

    def remask(self, tokens: Tensor, keys: Tensor, draw: int) -> tuple[Tensor, Tensor]:
        """Samples (B, N) with a random share of tokens masked again, and which are masked, bool (B, N).

        The share is arccos(r) / (pi / 2) for uniform r, stratified over the batch; `draw` numbers the draws
        that an iteration makes from the same keys (B,).
        """
        count, num_tokens = tokens.shape
        jitter = noise.uniforms(keys, noise.BUDGET, draw, 1)[:, 0]
        share = masked_share((torch.arange(count, device=keys.device) + jitter) / count)
        rank = noise.uniforms(keys, noise.MASK, draw, num_tokens).argsort(1).argsort(1)  # (B, N)
        masked = rank < (num_tokens * share).round().clamp(min=1)[:, None]
        return torch.where(masked, self.teacher.spec.mask_id, tokens), masked

    @torch.no_grad()
    def pull(self, tokens: Tensor, cond: Cond, keys: Tensor) -> tuple[Tensor, float]:
        """What to hand to the logits that drew the tokens (B, N): float32 (B, N, V), and the mean KL.

        With p of the auxiliary model and q of the teacher: p - q, the gradient of KL(q, p), and
        p (log p/q - KL(p, q)), that of KL(p, q), mixed by `reverse_share`; zero where no token was masked
        again, scaled so that the sum over a batch is a mean over masked tokens times B N.
        """
        state, masked = self.remask(tokens, keys, 0)
        rows = masked.flatten().nonzero().flatten()
        teacher = guided_logits(self.teacher, state, cond, self.guidance_scale, ONE, rows).log_softmax(-1)
        auxiliary = self.auxiliary.logits(state, cond, ONE, rows).log_softmax(-1)
        ratio = auxiliary - teacher
        divergence = (auxiliary.exp() * ratio).sum(-1, keepdim=True)
        reverse = auxiliary.exp() * (ratio - divergence)
        mixed = (1 - self.reverse_share) * (auxiliary.exp() - teacher.exp()) + self.reverse_share * reverse
        mixed = mixed * (masked.numel() / len(rows))
        gradient = mixed.new_zeros(state.numel(), mixed.shape[1]).index_copy(0, rows, mixed)
        return gradient.unflatten(0, state.shape), float(divergence.mean())

    def learn(self, tokens: Tensor, cond: Cond, keys: Tensor, rate: float) -> float:
        """One step of the auxiliary model on samples (B, N), masked anew; returns its cross-entropy in nats."""
        state, masked = self.remask(tokens, keys, 1)
        rows = masked.flatten().nonzero().flatten()
        loss = functional.cross_entropy(self.auxiliary.logits(state, cond, ONE, rows), tokens.flatten()[rows])
        loss.backward()
        optimizer_step(self.auxiliary.policy, self.optimizer, self.learning_rate * rate)
        return float(loss.detach())

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint needs."""
        return {
            "teacher": self.teacher.policy.state_dict(),
            "auxiliary": self.auxiliary.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint made by `state`."""
        self.teacher.policy.load_state_dict(state["teacher"])
        self.auxiliary.policy.load_state_dict(state["auxiliary"])
        self.optimizer.load_state_dict(state["optimizer"])


def masked_share(progress: Tensor) -> Tensor:
    """Share of tokens to mask, arccos(r) / (pi / 2), for r in (0, 1); between 0 and 1."""
    return progress.arccos() / (torch.pi / 2)
