"""SDTT-like multi-step matching: one step of the student does the work of two of the teacher.

After Deschenaux and Gulcehre (arXiv 2410.21035): from a partly masked sample the teacher unmasks in two
small steps; at every masked position the student must predict, at once, what the teacher predicted when
it unmasked that position, or last, where it did not. Guidance is folded in: the teacher's predictions are
guided, the student's are not. After each round the student becomes the teacher and its steps twice as
long. Ours: the states are made from samples of the teacher, so that prompts are all it takes, and follow
the sampler's order and power schedule, because these are the states that sampling will meet.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from speedrl_lab import noise
from speedrl_lab.config import DistillConfig, SamplerConfig
from speedrl_lab.draws import fixed_orders, inverse_cdf
from speedrl_lab.generator import Cond, MaskedGenerator, StepInfo, guided_logits
from speedrl_lab.student import Pool, iteration_keys, mixed_kl, optimizer_step


class MultiStepMatching:
    """The student, its teacher of the present round, and the pool of teacher samples."""

    def __init__(
        self,
        generator: MaskedGenerator,
        prompts: Sequence[str],
        config: DistillConfig,
        sampler: SamplerConfig,
        seed: int,
    ):
        self.student, self.teacher = generator, generator.copy()
        self.config, self.sampler, self.seed = config, sampler, seed
        self.pool = Pool(prompts, config.pool_size, seed)
        self.optimizer = torch.optim.Adam(generator.policy.parameters())
        self.round = 0

    def update(self, iteration: int, rate: float) -> dict[str, float]:
        """One optimizer step on fresh states; `rate` scales the learning rate."""
        config = self.config
        guided = replace(
            self.sampler, steps=config.teacher_steps, schedule="cosine", guidance_scale=config.teacher_guidance,
            temperature=1.0, first_temperature=1.0, start_noise=0.0, revise=False,
        )  # fmt: skip
        forwards = self.pool.fill(self.teacher, guided)
        due = iteration * config.rounds // config.distill_iterations
        if due > self.round:
            self.teacher, self.round = self.student.copy(), due
        tokens, prompts = self.pool.batch(iteration, config.distill_batch_size)
        cond = self.student.encode(prompts)
        keys = iteration_keys(self.seed, iteration, len(tokens), tokens.device)
        state, target, rows, cost = self._targets(tokens, cond, keys)
        logits = self.student.logits(state, cond, StepInfo(0, 1), rows)  # (R, V)
        loss = mixed_kl(logits.log_softmax(-1), target, config.reverse_share).mean()
        loss.backward()
        norm = optimizer_step(self.student.policy, self.optimizer, config.distill_learning_rate * rate)
        count = len(tokens)
        return {
            "loss": float(loss.detach()),
            "round": self.round + 1,
            "gradient_norm": norm,
            "forwards": forwards + cost + count,
            "backwards": count,
        }

    @torch.no_grad()
    def _targets(self, tokens: Tensor, cond: Cond, keys: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """States (B, N), the teacher's log-probabilities (R, V) at the flat rows (R,) masked there, passes."""
        count, num_tokens = tokens.shape
        scale = self.config.teacher_guidance if self.round == 0 else 1.0  # later teachers have it folded in
        rank = fixed_orders(self.student, self.sampler, keys).argsort(1)  # of each position in the order
        small = 2**self.round / self.config.teacher_steps
        # Stratified over the batch: every stage of the unmasking appears in every iteration.
        jitter = noise.uniforms(keys, noise.BUDGET, 0, 1)[:, 0]
        began = (torch.arange(count, device=keys.device) + jitter) / count * (1 - 2 * small)
        known, after = ((num_tokens * (began + step * small) ** self.sampler.power) for step in range(2))
        known = known.floor().long()
        first = torch.maximum(after.round().long(), known + 1)  # known after the teacher's first step
        state = torch.where(rank < known[:, None], tokens, self.student.spec.mask_id)
        rows = (rank >= known[:, None]).flatten().nonzero().flatten()
        early = self._predict(state, cond, scale, rows)  # (R, V)
        drawn = inverse_cdf(early, noise.uniforms(keys, noise.TOKEN, 0, num_tokens).flatten()[rows])
        guess = state.flatten().index_put((rows,), drawn).view_as(state)
        later_state = torch.where(rank < first[:, None], guess, self.student.spec.mask_id)
        left = rank.flatten()[rows] >= first.repeat_interleave(num_tokens)[rows]  # still masked after the first
        target = early.clone()
        target[left] = self._predict(later_state, cond, scale, rows[left])
        return state, target, rows, 2 * count * (1 if scale == 1.0 else 2)

    def _predict(self, state: Tensor, cond: Cond, scale: float, rows: Tensor) -> Tensor:
        return guided_logits(self.teacher, state, cond, scale, StepInfo(0, 1), rows).log_softmax(-1)

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint needs; random numbers depend on the iteration alone."""
        return {
            "student": self.student.policy.state_dict(),
            "teacher": self.teacher.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "round": self.round,
            "pool": self.pool.tokens,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint made by `state`."""
        self.student.policy.load_state_dict(state["student"])
        self.teacher.policy.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.round, self.pool.tokens = state["round"], state["pool"]
