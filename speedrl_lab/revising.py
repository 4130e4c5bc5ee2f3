"""Teach a masked generator to revise: to draw anew, and better, what it already drew.

A masked generator never looks back: tokens drawn side by side in one step contradict each other, and stay. Here it
learns from samples of its own many-step self. Some tokens of such a sample are shown as they are, further ones as
the student draws them side by side, and it must predict the sample everywhere, under what is shown as well as under
the masks. Then every step may draw anew what earlier ones drew (`SamplerConfig.revise`). Ours; related to the
correctors of discrete diffusion (GIDD, arXiv 2503.04482; ReMDM, arXiv 2503.00307), which noise with random codes.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from speedrl_lab import noise
from speedrl_lab.config import DistillConfig, SamplerConfig
from speedrl_lab.draws import fixed_orders, inverse_cdf
from speedrl_lab.generator import Cond, MaskedGenerator, StepInfo
from speedrl_lab.student import Pool, iteration_keys, optimizer_step

WHOLE = 0.1
"""Share of states that show a whole draft, without masks."""
MOST_WRONG = 0.5
"""Largest share of guesses among the tokens after the intact ones. Were most of a draft wrong, the best answer would
be to forget it and begin anew; what shall be learned is to keep to what most of it agrees on."""
INTACT = 0.25
"""Share of states in which nothing is wrong, so that what is right is left alone."""
ONE = StepInfo(0, 1)


class Revising:
    """The student, and the pool of many-step samples that it learns from."""

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

    def update(self, iteration: int, rate: float) -> dict[str, float]:
        """One optimizer step on fresh states; `rate` scales the learning rate."""
        config = self.config
        drawn_with = replace(
            self.sampler, steps=config.teacher_steps, guidance_scale=config.teacher_guidance,
            temperature=config.teacher_temperature, first_temperature=1.0, start_noise=0.0, revise=False,
        )  # fmt: skip
        forwards = self.pool.fill(self.teacher, drawn_with)
        tokens, prompts = self.pool.batch(iteration, config.distill_batch_size)
        cond = self.student.encode(prompts)
        keys = iteration_keys(self.seed, iteration, len(tokens), tokens.device)
        state = self._state(tokens, cond, keys)
        logits = self.student.logits(state, cond, ONE)  # (B, N, V)
        each = functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
        each.mean().backward()
        norm = optimizer_step(self.student.policy, self.optimizer, config.distill_learning_rate * rate)
        each, shown = each.detach(), state != self.student.spec.mask_id
        wrong = shown & (state != tokens)  # a tiny batch may hold none
        return {
            "loss": float(each.mean()),
            "masked_loss": float(each[~shown].sum() / (~shown).sum().clamp(min=1)),
            "wrong_loss": float(each[wrong].sum() / wrong.sum().clamp(min=1)),
            "gradient_norm": norm,
            "forwards": forwards + 2 * len(tokens),
            "backwards": len(tokens),
        }

    @torch.no_grad()
    def _state(self, tokens: Tensor, cond: Cond, keys: Tensor) -> Tensor:
        """Drafts (B, N) of samples (B, N): the first tokens of the order intact, some as the student draws them side
        by side, the rest masked."""
        count, num_tokens = tokens.shape
        rank = fixed_orders(self.student, self.sampler, keys).argsort(1)  # of each position in the order
        # Stratified over the batch: every stage of the unmasking appears in every iteration.
        jitter, stage, share, intact = noise.uniforms(keys, noise.BUDGET, 0, 4).unbind(1)
        place = (torch.arange(count, device=keys.device) + jitter) / count / (1 - WHOLE)
        shown = (num_tokens * place.clamp(max=1) ** self.sampler.power).round()  # (B,)
        right = (shown * stage).floor().clamp(min=1)
        mask_id = self.student.spec.mask_id
        start = torch.where(rank < right[:, None], tokens, mask_id)
        log_probs = self.student.logits(start, cond, ONE).log_softmax(-1)  # (B, N, V)
        uniforms = noise.uniforms(keys, noise.TOKEN, 0, num_tokens)
        guess = inverse_cdf(log_probs.flatten(0, 1), uniforms.flatten()).view_as(tokens)
        replaced = noise.uniforms(keys, noise.MASK, 0, num_tokens) < MOST_WRONG * share[:, None]
        replaced &= (rank >= right[:, None]) & (intact > INTACT)[:, None]
        draft = torch.where(replaced, guess, tokens)
        return torch.where(rank < shown[:, None], draft, mask_id)

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint needs; random numbers depend on the iteration alone."""
        return {
            "student": self.student.policy.state_dict(),
            "teacher": self.teacher.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pool": self.pool.tokens,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint made by `state`."""
        self.student.policy.load_state_dict(state["student"])
        self.teacher.policy.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.pool.tokens = state["pool"]
