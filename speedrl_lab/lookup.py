"""Everything a small generator can say to one prompt, as a table: its logits in all states, and their Jacobian.

With it the gradient of a single trajectory costs a row of coefficients instead of a backward pass.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from speedrl_lab.generator import Cond, GeneratorSpec, MaskedGenerator, StepInfo


@dataclass(frozen=True)
class Outputs:
    """The logits of a generator at the K masked positions of all its states."""

    spec: GeneratorSpec
    logits: Tensor
    """float32 (K, V)."""
    jacobian: Tensor | None
    """Derivative by all P weights of the policy, float32 (K * V, P); None where it was not asked for."""
    place: Tensor
    """Which of the K a position of a state is, int64 (states, N); -1 where it is not masked."""

    def find(self, tokens: Tensor) -> Tensor:
        """Which of the K each position of states (B, N) is, int64 (B, N); -1 where it is not masked."""
        return self.place[_state_index(tokens, self.spec)]

    @cached_property
    def gram(self) -> Tensor:
        """Inner products of the gradients of all logits, float32 (K * V, K * V)."""
        return self.jacobian @ self.jacobian.T


def all_outputs(generator: MaskedGenerator, prompt: str, jacobian: bool = True) -> Outputs:
    """All (V + 1)**N states of a generator that is told no time, unguided."""
    spec = generator.spec
    digits = [*range(spec.codebook_size), spec.mask_id]
    states = torch.tensor(list(itertools.product(digits, repeat=spec.num_tokens)))
    masked = (states == spec.mask_id).flatten()  # (states * N,)
    cond, info = generator.encode([prompt]), StepInfo(0, 1)
    logits = generator.logits(states, cond.repeat_interleave(len(states)), info, masked.nonzero().flatten())  # (K, V)
    place = torch.empty_like(states)
    place[_state_index(states, spec)] = (masked.cumsum(0) - 1).where(masked, -1).unflatten(0, states.shape)
    slopes = torch.stack(list(_slopes(generator, states, cond, info))) if jacobian else None  # (K * V, P)
    return Outputs(spec, logits.detach(), slopes, place)


def _slopes(generator: MaskedGenerator, states: Tensor, cond: Cond, info: StepInfo) -> Iterator[Tensor]:
    """The gradient (P,) of each logit; state by state, since a logit depends on its own state alone."""
    weights = list(generator.policy.parameters())
    for state in states:
        rows = (state == generator.spec.mask_id).nonzero().flatten()
        for logit in generator.logits(state[None], cond, info, rows).flatten() if len(rows) else []:
            yield torch.cat([slope.flatten() for slope in torch.autograd.grad(logit, weights, retain_graph=True)])


def _state_index(tokens: Tensor, spec: GeneratorSpec) -> Tensor:
    """States (B, N) read as numbers in base V + 1, the mask as digit V."""
    digits = torch.where(tokens == spec.mask_id, spec.codebook_size, tokens)
    return (digits * (spec.codebook_size + 1) ** torch.arange(spec.num_tokens)).sum(1)


class LookupCopies:
    """A generator that looks its logits up, for each of M trajectories in a copy of its own.

    One backward pass from the sum of M estimates to `table` (M, K, V) then gives the derivative of each.
    """

    def __init__(self, outputs: Outputs, count: int):
        self.outputs, self.spec, self.device = outputs, outputs.spec, outputs.logits.device
        self.table = outputs.logits.repeat(count, 1, 1).requires_grad_()

    def encode(self, prompts: Sequence[str]) -> Cond:
        """Prompt i reads copy i, whatever it says."""
        return Cond({"copy": torch.arange(len(prompts))})

    def logits(self, tokens: Tensor, cond: Cond, step: StepInfo, rows: Tensor) -> Tensor:
        """Logits (R, V) at masked positions, flat indices `rows` (R,) into B*N."""
        copies = cond.tensors["copy"][rows // self.spec.num_tokens]
        return self.table[copies, self.outputs.find(tokens).flatten()[rows]]
