"""The loss of one rollout: its gradient, in micro-batches, and what is measured on the way.

Of every state the head is computed only where a token is scored. What does not change between epochs is computed
once and kept: encoded prompts, the log-probabilities of the drawing policy, those of the reference where they fit.
The samples of a prompt all start from the same masks, so that their first state is one state.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from speedrl_lab import parallel
from speedrl_lab.config import SamplerConfig, TrainConfig
from speedrl_lab.generator import MaskedGenerator
from speedrl_lab.likelihood import Visit, scored_states, visit_choice, visit_logits
from speedrl_lab.objective import SAMPLED, clipped_surrogate, entropy, kl_penalty
from speedrl_lab.trajectory import Trajectory

REFERENCE_BYTES = 2**30
"""Most that the reference's log-probabilities may take to be kept for later epochs."""
FROM_MASKS = ("replay", "critical", "one_step")
"""Estimators whose first state holds masks alone."""


def kept_bytes(config: TrainConfig, rows: int, codebook_size: int) -> int:
    """Bytes of the reference's log-probabilities at `rows` tokens that later epochs use again.

    0 where the reference is asked anew in each epoch: there is one alone, or they take more than REFERENCE_BYTES.
    """
    size = 4 * rows * (1 if config.kl_estimator in SAMPLED else codebook_size)
    return size if config.inner_epochs > 1 and size <= REFERENCE_BYTES else 0


def scored_tokens(config: TrainConfig, num_tokens: int) -> int:
    """Tokens that one update scores, at most."""
    proposes = config.sampler.order == "confidence" and config.estimator == "replay" and config.order_factor == "exact"
    each = config.sampler.steps if proposes or config.sampler.revise else 1
    return config.num_groups * config.group_size * num_tokens * each


def merged_start(visit: Visit, prompt_of: Tensor) -> Visit:
    """A visit of states that hold masks alone, one state a prompt instead of one a sample.

    `prompt_of` int64 (B,) numbers the prompts of the samples.
    """
    asked = prompt_of[visit.samples]  # (S,)
    state = (asked[:, None] == asked).int().argmax(1)  # (S,), the first sample of the same prompt
    first, place = state.unique(return_inverse=True)  # (U,), (S,)
    num_tokens = visit.tokens.shape[1]
    rows = place[visit.rows // num_tokens] * num_tokens + visit.positions
    return replace(visit, samples=visit.samples[first], tokens=visit.tokens[first], rows=rows, pace=None)


class Tally:
    """Means over tokens, or actions, of all processes; the device is waited for once, at the end."""

    def __init__(self) -> None:
        self.count, self.sums, self.extremes = 0, {}, []

    def add(self, ratio: Tensor, **values: Tensor) -> None:
        """Take in ratios (R,) and what was measured beside them, each (R,)."""
        if not len(ratio):
            return
        self.count += len(ratio)
        for name, value in {"ratio": ratio, **values}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().sum(dtype=torch.float64)
        self.extremes.append(torch.stack([-ratio.detach().min(), ratio.detach().max()]))

    def means(self) -> dict[str, float]:
        """The means by name; `ratio_min` and `ratio_max` (1 is among the ratios), `ratio_deviation` from 1."""
        if not self.count:
            return {}
        sums = torch.stack([*self.sums.values(), torch.full_like(self.sums["ratio"], self.count)])
        *sums, count = parallel.total(sums).tolist()
        below, above = parallel.highest(torch.stack(self.extremes).amax(0)).tolist()
        lowest, highest = min(1.0, -below), max(1.0, above)
        return {
            **{name: value / count for name, value in zip(self.sums, sums, strict=True)},
            "ratio_min": lowest,
            "ratio_max": highest,
            "ratio_deviation": max(1 - lowest, highest - 1),
        }


class RolloutLoss:
    """Minus the objective of one rollout, averaged over its samples.

    Loss a sample = - sum over the scored tokens of (clipped surrogate - kl weight * KL) / N, and minus the surrogate
    of its choices of positions and of its pace actions. Samples that the filter dropped take no part.
    """

    def __init__(
        self,
        generator: MaskedGenerator,
        reference: Callable[[], AbstractContextManager[MaskedGenerator]],
        config: TrainConfig,
        prompts: list[str],
        trajectory: Trajectory,
        seed: int,
        micro_batch_size: int,
    ):
        """`reference` gives the starting point, without gradient; `seed` draws the masks of some estimators."""
        self.generator, self.reference, self.config, self.trajectory = generator, reference, config, trajectory
        self.sampler: SamplerConfig = trajectory.sampler or config.sampler
        self.cond = generator.encode(prompts)
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        prompt_of = torch.tensor([numbers[prompt] for prompt in prompts], device=trajectory.tokens.device)
        before = parallel.rank() * len(prompts)  # samples of other processes
        visits = list(
            scored_states(trajectory, config.estimator, config.order_factor, seed, micro_batch_size, before)
        )
        self.scored = sum(len(visit.samples) for visit in visits)
        self.visits = [merged_start(visit, prompt_of) if self._starts(visit) else visit for visit in visits]
        self.old = [visit.stored for visit in self.visits]  # (R,) each
        self.anchors: list[Tensor | None] = [None] * len(self.visits)
        rows = sum(len(visit.codes) for visit in visits)
        self.keeps_reference = kept_bytes(config, rows, generator.spec.codebook_size) > 0

    def _starts(self, visit: Visit) -> bool:
        """Whether a visit's states are those that every sample of a prompt starts from."""
        if self.config.estimator not in FROM_MASKS or visit.step or self.trajectory.start is not None:
            return False
        return visit.picks is None and self.sampler.schedule != "adaptive"

    def backward(self, advantage: Tensor, kept: Tensor, kl_weight: float) -> dict[str, float]:
        """Add to the gradients, with advantages (B,) of the samples that are `kept`, bool (B,); means over tokens."""
        tally = Tally()
        samples = self.trajectory.tokens.numel() * parallel.world_size()  # B * N
        for index, visit in enumerate(self.visits):
            anchor = self._anchor(index, visit)  # (R, V) or (R,)
            log_probs = visit_logits(self.generator, visit, self.cond, self.sampler)  # (R, V)
            chosen = log_probs.gather(1, visit.codes[:, None]).squeeze(1)  # (R,)
            old = self._old(index, chosen)
            value, ratio, clipped = clipped_surrogate(chosen, old, advantage[visit.owners], self.config.clip_range)
            kl = kl_penalty(log_probs, anchor, visit.codes, self.config.kl_estimator)
            loss = -((value - kl_weight * kl) * kept[visit.owners]).sum() * visit.weight
            if visit.picks is not None:
                loss = loss - self._choice_value(visit, chosen, advantage).sum()
            (loss / samples).backward()
            spread = entropy(log_probs.detach())
            tally.add(ratio, kl=kl, entropy=spread, clip_fraction=clipped, approx_kl=old - chosen.detach())
        measured = tally.means()
        if self.trajectory.pace is not None:
            acted = backward_pace(self.generator, self.trajectory, advantage, self.config.clip_range)
            measured["pace_entropy"] = acted.get("pace_entropy", 0.0)
        return measured

    def passes(self) -> int:
        """Forward passes of all epochs, a backward pass counted as two; as in `forwards` of a trajectory, a state
        that samples share counts for each of them."""
        states = self.scored * (1 if self.sampler.guidance_scale == 1.0 else 2)
        if self.sampler.schedule == "adaptive":  # some rows of a state are guided
            scales = [self.generator.pace.decode(visit.pace, 1)[2] for visit in self.visits]
            states += int(torch.cat(scales).ne(1).sum())
        epochs = self.config.inner_epochs
        return states * (3 * epochs + (1 if self.keeps_reference else epochs))

    def _anchor(self, index: int, visit: Visit) -> Tensor:
        """The reference's log-probabilities: of all codes (R, V), or where the KL needs no more of those drawn (R,)."""
        anchor = self.anchors[index]
        if anchor is not None:
            return anchor
        with self.reference() as reference:
            anchor = visit_logits(reference, visit, self.cond, self.sampler)
        if self.config.kl_estimator in SAMPLED:
            anchor = anchor.gather(1, visit.codes[:, None]).squeeze(1)
        if self.keeps_reference:
            self.anchors[index] = anchor
        return anchor

    def _old(self, index: int, chosen: Tensor) -> Tensor:
        """Log-probabilities (R,) that ratios compare with: when they were drawn, else those of the first epoch."""
        if self.old[index] is None:
            self.old[index] = chosen.detach()
        return self.old[index]

    def _choice_value(self, visit: Visit, chosen: Tensor, advantage: Tensor) -> Tensor:
        """Surrogate (S,) of the confidence order's choice in a visit: one action a step."""
        old = self.trajectory.choice_log_prob[visit.samples, visit.step]
        choice = visit_choice(visit, chosen)
        return clipped_surrogate(choice, old, advantage[visit.samples], self.config.clip_range)[0]


def backward_pace(
    generator: MaskedGenerator, trajectory: Trajectory, advantage: Tensor, clip_range: float
) -> dict[str, float]:
    """Add the gradient of the pace head, from stored features; the path through the network is left out.

    Returns the numbers of `RolloutLoss.backward` as means over actions, and `pace_entropy`; `entropy` is that of the
    tokens, estimated from those that were drawn. Empty where nothing was chosen, as with one step.
    """
    acted = trajectory.pace >= 0  # (B, T)
    log_probs = generator.pace(trajectory.pace_features[acted])  # (A, K)
    chosen = log_probs.gather(1, trajectory.pace[acted][:, None]).squeeze(1)
    owner = acted.nonzero()[:, 0]
    old = trajectory.pace_log_prob[acted]
    value, ratio, clipped = clipped_surrogate(chosen, old, advantage[owner], clip_range)
    (-value.sum() / (len(trajectory) * parallel.world_size())).backward()
    tally = Tally()
    tally.add(ratio, clip_fraction=clipped, approx_kl=old - chosen.detach(), pace_entropy=entropy(log_probs.detach()))
    measured = tally.means()
    if measured:
        measured["kl"] = 0.0  # the network is what it was
        measured["entropy"] = parallel.mean(-float(trajectory.log_prob.mean()))
    return measured
