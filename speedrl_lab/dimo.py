"""Di[M]O-like distillation: samples of few steps, matched with the teacher token by token.

After Zhu et al. (arXiv 2503.15457): the student draws whole pictures, and `matching` says what each token's
logits lack. Ours: the student may take a few steps instead of one; every token gets its gradient at the
step that drew it, which for one step is their method.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from speedrl_lab.config import DistillConfig, SamplerConfig
from speedrl_lab.generator import MaskedGenerator, StepInfo
from speedrl_lab.likelihood import visits
from speedrl_lab.matching import Matcher
from speedrl_lab.sampler import sample
from speedrl_lab.student import chosen_prompts, iteration_keys, optimizer_step


class TokenMatching:
    """The student, and the matcher that compares its samples with the teacher's."""

    def __init__(
        self,
        generator: MaskedGenerator,
        prompts: Sequence[str],
        config: DistillConfig,
        sampler: SamplerConfig,
        seed: int,
    ):
        self.student = generator
        self.prompts, self.config, self.sampler, self.seed = prompts, config, sampler, seed
        self.matcher = Matcher(
            generator.copy(), config.teacher_guidance, config.reverse_share, config.auxiliary_learning_rate
        )
        self.optimizer = torch.optim.Adam(generator.policy.parameters())

    def update(self, iteration: int, rate: float) -> dict[str, float]:
        """One optimizer step of the student, then one of the auxiliary model, on the same samples."""
        config = self.config
        chosen = chosen_prompts(self.prompts, self.seed, iteration, config.distill_batch_size)
        prompts = [self.prompts[row] for row in chosen]
        steps = config.student_steps[iteration % len(config.student_steps)]
        drawn_with = replace(
            self.sampler, steps=steps, schedule="power", guidance_scale=1.0, temperature=1.0, first_temperature=1.0,
            start_noise=self.sampler.start_noise if steps == 1 else 0.0, revise=False,
        )  # fmt: skip
        keys = iteration_keys(self.seed, iteration, len(prompts), self.student.device)
        trajectory = sample(self.student, prompts, drawn_with, seed=int(keys[0]))
        cond = self.student.encode(prompts)
        tokens, count = trajectory.tokens, len(prompts)
        gradient, divergence = self.matcher.pull(tokens, cond, keys)
        for visit in visits(trajectory, count):
            info = StepInfo(visit.step, steps)
            logits = self.student.logits(visit.tokens, cond.index(visit.samples), info, visit.rows)  # (R, V)
            (logits * gradient[visit.owners, visit.positions] / tokens.numel()).sum().backward()
        norm = optimizer_step(self.student.policy, self.optimizer, config.distill_learning_rate * rate)
        auxiliary_loss = self.matcher.learn(tokens, cond, keys, rate)
        return {
            "loss": divergence,
            "auxiliary_loss": auxiliary_loss,
            "gradient_norm": norm,
            "forwards": count * (2 * steps + self.matcher.forwards),
            "backwards": count * (steps + 1),
        }

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint needs; random numbers depend on the iteration alone."""
        return {
            "student": self.student.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "matcher": self.matcher.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint made by `state`."""
        self.student.policy.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.matcher.restore(state["matcher"])
