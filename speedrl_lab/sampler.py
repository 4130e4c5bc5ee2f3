"""The only loop that draws random numbers: unmask tokens step by step and record how.

A step costs one forward pass of the network on each unfinished sample, two with guidance. The first pass sees
masks alone and is computed once a prompt, whatever the number of its samples; unconditionally once. The head is
computed only at the rows that need it, and prompts once before the loop. With a fixed schedule the loop never
waits for the device. Sampling mathematics is float32; a token is drawn by inverting the cumulative distribution
with one uniform number. Where steps revise, each draws everything anew that the next one, or the picture, shows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from speedrl_lab import noise
from speedrl_lab.config import HEADED, VARYING, SamplerConfig
from speedrl_lab.draws import (
    choice_level,
    fixed_counts,
    fixed_orders,
    inverse_cdf,
    plackett_luce,
    planned_counts,
    start_tokens,
)
from speedrl_lab.generator import Cond, MaskedGenerator, StepInfo, guided_logits, prepared
from speedrl_lab.pace import FEATURES, pace_features
from speedrl_lab.schedules import reveal_counts
from speedrl_lab.trajectory import Trajectory


def policy_logits(
    generator: MaskedGenerator,
    tokens: Tensor,
    cond: Cond,
    sampler: SamplerConfig,
    step: StepInfo,
    rows: Tensor | None = None,
    null: Cond | None = None,
    alike: bool = False,
) -> Tensor:
    """Logits of the distribution that is sampled: guided, divided by the temperature, float32.

    Rollouts and likelihoods both call this one function, so that they cannot differ. `null` and `alike` are
    those of `guided_logits`.
    """
    logits = guided_logits(generator, tokens, cond, sampler.guidance_scale, step, rows, null, alike)
    temperature = sampler.temperature * (sampler.first_temperature if step.index == 0 else 1.0)
    return logits if temperature == 1.0 else logits / temperature


def steered_log_probs(
    generator: MaskedGenerator,
    log_probs: Tensor,
    tokens: Tensor,
    step: StepInfo,
    rows: Tensor,
    temperatures: Tensor,
    scales: Tensor,
    null: Cond | None = None,
    alike: bool = False,
) -> Tensor:
    """Log-probabilities (R, V) under the temperature and guidance that each sample took, both (S,).

    From conditional ones at flat indices `rows` (R,) into tokens (S, N). Samples whose scale is not 1 cost a
    second, unconditional pass; the others none. `null` and `alike` are those of `guided_logits`. Rollouts and
    likelihoods both call this one function.
    """
    owners, position = rows // tokens.shape[1], rows % tokens.shape[1]  # (R,)
    guided = scales != 1.0  # (S,)
    if guided.any():
        inside = guided[owners].nonzero().flatten()
        place = guided.cumsum(0) - 1  # of a sample among the guided ones
        seen = tokens[:1] if alike else tokens[guided]
        wanted = position[inside] if alike else place[owners[inside]] * tokens.shape[1] + position[inside]
        unprompted = generator.null(len(seen)) if null is None else null.index(seen.new_zeros(len(seen)))
        free = generator.logits(seen, unprompted, step, wanted)
        moved = free + scales[owners[inside], None] * (log_probs[inside] - free)
        log_probs = log_probs.index_copy(0, inside, moved)
    return (log_probs / temperatures[owners, None]).log_softmax(-1)


def require_head(generator: MaskedGenerator, sampler: SamplerConfig) -> None:
    """Raise ValueError where the schedule needs another pace head than the generator has."""
    if sampler.schedule not in HEADED:
        return
    if generator.pace is None:
        raise ValueError(
            f"schedule={sampler.schedule!r} needs a pace head and generator {generator.spec.name!r} has none; "
            "load one with policy=<file>, train one, or take schedule='cosine'"
        )
    fitting = "adaptive" if generator.pace.adaptive else "paced"
    if sampler.schedule != fitting:
        raise ValueError(
            f"schedule={sampler.schedule!r} does not fit the pace head of generator {generator.spec.name!r}, which "
            f"was made for {fitting!r}; take schedule={fitting!r}, or set generator.pace = None and train another"
        )


@torch.no_grad()
def sample(
    generator: MaskedGenerator,
    prompts: Sequence[str],
    sampler: SamplerConfig,
    seed: int = 0,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> Trajectory:
    """Generate one sample a prompt; repeated prompts give different samples.

    A sample is fixed by (seed, prompt, how often the prompt appeared before), whatever else is in the
    batch. `on_step` receives `step`, `tokens` (B, N) with masks, and `revealed` bool (B, N) each step.
    Raises ValueError for an unreadable prompt, steps > N, or a schedule without the pace head it needs.
    """
    spec = generator.spec
    require_head(generator, sampler)
    reveal_counts(spec.num_tokens, sampler.steps)  # raises where there are more steps than tokens
    if len(prompts) == 0:
        raise ValueError("no prompts given; expected at least one")
    unique = list(dict.fromkeys(prompts))
    place = {prompt: row for row, prompt in enumerate(unique)}
    pool = generator.encode(unique)
    if sampler.guidance_scale != 1.0 or sampler.schedule == "adaptive":
        pool = pool.cat(generator.null(1))  # behind the prompts, so that all that is shared is made in one go
    pool = prepared(generator, pool)
    keys = noise.row_keys(seed, prompts, generator.device)
    owners = torch.tensor([place[prompt] for prompt in prompts], device=keys.device)
    state = _Unmasking(generator, sampler, keys, pool, owners, len(unique))
    for step in range(sampler.steps):
        before = state.tokens
        if sampler.order == "confidence":
            state.confidence_step(step)
        else:
            state.ordered_step(step)
        if on_step is not None:
            on_step({"step": step, "tokens": state.tokens.clone(), "revealed": state.tokens != before})
        if not len(state.alive):
            break
    return state.record()


class _Unmasking:
    """The state of one sampling loop: B rows, of which `alive` still hold masks."""

    def __init__(
        self,
        generator: MaskedGenerator,
        sampler: SamplerConfig,
        keys: Tensor,
        pool: Cond,
        owners: Tensor,
        num_prompts: int,
    ):
        """`pool` has a row a prompt, which `owners` (B,) index, and behind them the unconditional one or none."""
        spec, count, device = generator.spec, len(keys), keys.device
        self.generator, self.sampler, self.keys, self.owners = generator, sampler, keys, owners
        numbers = torch.arange(len(pool), device=device)
        parts = (numbers[:num_prompts], numbers[num_prompts:], owners)
        self.prompts, self.null, self.cond = (pool.index(rows) for rows in parts)  # U, 1 or 0, and B rows
        self.tokens = torch.full((count, spec.num_tokens), spec.mask_id, device=device)
        self.start = start_tokens(spec.num_tokens, spec.codebook_size, spec.mask_id, sampler.start_noise, keys)
        self.reveal_step = torch.full_like(self.tokens, -1)
        self.log_prob = torch.zeros(count, spec.num_tokens, device=device)
        self.known = torch.zeros(count, dtype=torch.int64, device=device)  # how many are revealed
        self.steps, self.forwards = torch.zeros_like(self.known), torch.zeros_like(self.known)
        self.alive = torch.arange(count, device=device)
        self.counts = fixed_counts(spec.num_tokens, sampler, keys)
        self.drafts: list[Tensor] = []  # (B, N) each, and their log-probabilities
        self.draft_log_probs: list[Tensor] = []
        self.plan = planned_counts(spec.num_tokens, sampler).tolist()  # the same numbers where nothing varies
        confident, paced = sampler.order == "confidence", sampler.schedule in HEADED
        each = (count, sampler.steps, spec.num_tokens)
        self.order = torch.zeros_like(self.tokens) if confident else fixed_orders(generator, sampler, keys)
        self.proposals = torch.full(each, -1, device=device) if confident else None
        self.proposal_log_prob = torch.zeros(each, device=device) if confident else None
        self.choice_log_prob = torch.zeros(each[:2], device=device) if confident else None
        self.pace = torch.full((count, sampler.steps), -1, device=device) if paced else None
        self.pace_log_prob = torch.zeros(count, sampler.steps, device=device) if paced else None
        self.pace_features = torch.zeros(count, sampler.steps, FEATURES, device=device) if paced else None

    def _alike(self, step: int) -> bool:
        """Whether all rows alive show the same tokens: masks alone."""
        return step == 0 and self.sampler.start_noise == 0

    def _rows(self, positions: Tensor, owners: Tensor | None = None) -> Tensor:
        """Positions (A, M) of rows 0 ... A-1, or of `owners` (A,), as flat indices (A * M,) into their tokens."""
        owners = torch.arange(len(positions), device=positions.device) if owners is None else owners
        return (owners[:, None] * self.tokens.shape[1] + positions).flatten()

    def _shown(self, step: int) -> Tensor:
        """What the network sees of the rows alive at a step, int64 (A, N)."""
        return self.start if step == 0 else self.tokens[self.alive]

    def _log_probs(self, positions: Tensor, step: int) -> Tensor:
        """Log-probabilities (A, M, V) at positions (A, M) of the rows alive; counts the passes."""
        self.forwards[self.alive] += 1 if self.sampler.guidance_scale == 1.0 else 2
        alike = self._alike(step)
        rows = wanted = self._rows(positions, self.owners if alike else None)
        tokens, cond = (self.start[: len(self.prompts)], self.prompts) if alike else (self._shown(step), self.cond)
        if alike and len(rows) > tokens.numel():  # fewer rows of the head than draws from them
            wanted = torch.arange(tokens.numel(), device=rows.device)
        info = StepInfo(step, self.sampler.steps)
        logits = policy_logits(self.generator, tokens, cond, self.sampler, info, wanted, self.null, alike)
        log_probs = logits.log_softmax(-1)
        return (log_probs if wanted is rows else log_probs[rows]).unflatten(0, positions.shape)

    def _draw(self, log_probs: Tensor, positions: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Tokens and their log-probabilities, both (A, M)."""
        uniforms = noise.uniforms_at(self.keys[self.alive], noise.TOKEN, step, positions)
        drawn = inverse_cdf(log_probs.flatten(0, 1), uniforms.flatten()).unflatten(0, positions.shape)
        return drawn, log_probs.gather(-1, drawn[..., None]).squeeze(-1)

    def _write(self, store: Tensor, positions: Tensor, values: Tensor, keep: Tensor | None) -> Tensor:
        """`store` (B, N) with values (A, M) at positions of the rows alive, where `keep` holds."""
        held = store[self.alive]  # (A, N)
        values = values if keep is None else torch.where(keep, values, held.gather(1, positions))
        return store.index_copy(0, self.alive, held.scatter(1, positions, values))

    def _fix(self, positions: Tensor, drawn: Tensor, log_prob: Tensor, keep: Tensor | None, step: int) -> None:
        """Fix the tokens at positions (A, M) of the rows alive, or where `keep` (A, M) holds."""
        self.tokens = self._write(self.tokens, positions, drawn, keep)
        first = torch.full_like(positions, step)
        if self.sampler.revise:
            known = self.reveal_step[self.alive].gather(1, positions)
            first = torch.where(known < 0, first, known)
        self.reveal_step = self._write(self.reveal_step, positions, first, keep)
        self.log_prob = self._write(self.log_prob, positions, log_prob, keep)
        fixed = positions.shape[1] if keep is None else keep.sum(1)
        self.known[self.alive] = fixed if self.sampler.revise else self.known[self.alive] + fixed
        self.steps[self.alive] += 1
        if self.sampler.revise:
            self.drafts.append(self.tokens)
            self.draft_log_probs.append(self._write(torch.zeros_like(self.log_prob), positions, log_prob, keep))
        if self.sampler.schedule in VARYING:
            alive = self.alive[self.known[self.alive] < self.tokens.shape[1]]
            if len(alive) < len(self.alive):
                self.alive, self.cond = alive, self.prompts.index(self.owners[alive])

    def ordered_step(self, step: int) -> None:
        """Reveal the next positions of each row's order, as many as the schedule or the policy says."""
        if self.sampler.schedule in VARYING:
            return self._varying_step(step)
        last = sum(self.plan[: step + 1])
        positions = self.order[:, 0 if self.sampler.revise else last - self.plan[step] : last]
        drawn, log_prob = self._draw(self._log_probs(positions, step), positions, step)
        return self._fix(positions, drawn, log_prob, None, step)

    def _varying_step(self, step: int) -> None:
        """A step in which each row has its own number of tokens to reveal."""
        num_tokens = self.tokens.shape[1]
        known, counts = self.known[self.alive], self.counts[self.alive, step]  # (A,)
        remaining = num_tokens - known
        looks_ahead = self.sampler.schedule in (*HEADED, "threshold")
        width = int((remaining if looks_ahead else counts).max())
        # What is left comes first; past the end there are known ones, which stay, or are revised.
        offsets = torch.arange(num_tokens if self.sampler.revise else width, device=known.device)
        index = (known[:, None] + offsets) % num_tokens
        positions = self.order[self.alive].gather(1, index)  # (A, width)
        log_probs = self._log_probs(positions, step)
        last = step == self.sampler.steps - 1
        if self.sampler.schedule == "adaptive":
            counts, temperatures, scales = self._act(log_probs, remaining, step)
            log_probs = self._steered(log_probs, positions, temperatures, scales, step)
        elif self.sampler.schedule == "paced" and not last:
            counts, _, _ = self._act(log_probs, remaining, step)
        elif self.sampler.schedule == "threshold":
            sure = (log_probs.amax(-1).exp() * (offsets < remaining[:, None])).sum(1) / remaining
            counts = torch.where(sure >= self.sampler.stop_confidence, remaining, counts)
        if looks_ahead:
            counts = remaining if last else counts.minimum(remaining)
        drawn, log_prob = self._draw(log_probs, positions, step)
        fixed = offsets < counts[:, None]
        if self.sampler.revise:
            fixed |= offsets >= remaining[:, None]
        self._fix(positions, drawn, log_prob, fixed, step)

    def _act(self, log_probs: Tensor, remaining: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the pace head chooses for the rows alive: `PaceHead.decode`, each (A,); records the action."""
        num_tokens = self.tokens.shape[1]
        entropies = -(log_probs.exp() * log_probs).sum(-1)  # (A, width)
        padding = (0, num_tokens - entropies.shape[1])
        features = pace_features(functional.pad(entropies, padding), remaining)
        choices = self.generator.pace(features)  # (A, K)
        uniforms = noise.uniforms(self.keys[self.alive], noise.PACE, step, 1)[:, 0]
        taken = choices.argmax(1) if self.sampler.greedy_pace else inverse_cdf(choices, uniforms)
        self.pace[self.alive, step] = taken
        self.pace_features[self.alive, step] = features
        self.pace_log_prob[self.alive, step] = choices.gather(1, taken[:, None]).squeeze(1)
        return self.generator.pace.decode(taken, num_tokens)

    def _steered(
        self, log_probs: Tensor, positions: Tensor, temperatures: Tensor, scales: Tensor, step: int
    ) -> Tensor:
        """Log-probabilities (A, M, V) under each row's temperature and guidance (A,); counts the passes."""
        info, rows = StepInfo(step, self.sampler.steps), self._rows(positions)
        flat, shown = log_probs.flatten(0, 1), self._shown(step)
        self.forwards[self.alive] += scales != 1.0
        how = (temperatures, scales, self.null, self._alike(step))
        steered = steered_log_probs(self.generator, flat, shown, info, rows, *how)
        return steered.unflatten(0, positions.shape)

    def confidence_step(self, step: int) -> None:
        """Propose every masked token, keep the most confident (MaskGIT, arXiv 2202.04200)."""
        first, count = sum(self.plan[:step]), self.plan[step]  # equal in every row
        masked = (self.reveal_step < 0).to(torch.uint8)
        positions = masked.argsort(dim=1, descending=True, stable=True)[:, : self.tokens.shape[1] - first]  # (B, M)
        drawn, log_prob = self._draw(self._log_probs(positions, step), positions, step)
        level = choice_level(self.sampler, step)
        uniforms = noise.uniforms_at(self.keys, noise.CHOICE, step, positions)
        confidence = log_prob - level * (-uniforms.log()).log()
        best = confidence.topk(count, dim=1).indices  # (B, count), most confident first
        chosen = positions.gather(1, best)
        self.order[:, first : first + count] = chosen
        self.proposals[:, step].scatter_(1, positions, drawn)
        self.proposal_log_prob[:, step].scatter_(1, positions, log_prob)
        if level > 0:
            self.choice_log_prob[:, step] = plackett_luce(log_prob / level, best)
        self._fix(chosen, drawn.gather(1, best), log_prob.gather(1, best), None, step)

    def _each_step(self, kept: list[Tensor], rest: Tensor) -> Tensor | None:
        """What was kept of each step, (B, T, N), with `rest` (B, N) for steps that nobody took; None without any."""
        return torch.stack(kept + [rest] * (self.sampler.steps - len(kept)), 1) if kept else None

    def record(self) -> Trajectory:
        """The finished trajectory."""
        return Trajectory(
            tokens=self.tokens,
            reveal_step=self.reveal_step.to(torch.int16),
            steps=self.steps,
            forwards=self.forwards,
            log_prob=self.log_prob,
            mask_id=self.generator.spec.mask_id,
            sampler=self.sampler,
            start=self.start if self.sampler.start_noise else None,
            order=self.order,
            drafts=self._each_step(self.drafts, self.tokens),
            draft_log_prob=self._each_step(self.draft_log_probs, torch.zeros_like(self.log_prob)),
            proposals=self.proposals,
            proposal_log_prob=self.proposal_log_prob,
            choice_log_prob=self.choice_log_prob,
            pace=self.pace,
            pace_features=self.pace_features,
            pace_log_prob=self.pace_log_prob,
        )
