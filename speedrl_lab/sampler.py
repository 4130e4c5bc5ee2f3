"""The only loop that draws random numbers: unmask tokens step by step and record how.

A step costs one forward pass of the network on each unfinished sample, two with guidance. The head is
computed only at the rows that need it. Sampling mathematics is float32; a token is drawn by inverting
the cumulative distribution with one uniform number.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from speedrl_lab import noise
from speedrl_lab.config import HEADED, VARYING, SamplerConfig
from speedrl_lab.generator import Cond, MaskedGenerator, StepInfo, guided_logits
from speedrl_lab.pace import FEATURES, pace_features
from speedrl_lab.schedules import halton_order, reveal_counts, shifted_orders
from speedrl_lab.trajectory import Trajectory


def policy_logits(
    generator: MaskedGenerator,
    tokens: Tensor,
    cond: Cond,
    sampler: SamplerConfig,
    step: StepInfo,
    rows: Tensor | None = None,
) -> Tensor:
    """Logits of the distribution that is sampled: guided, divided by the temperature, float32.

    Rollouts and likelihoods both call this one function, so that they cannot differ.
    """
    return guided_logits(generator, tokens, cond, sampler.guidance_scale, step, rows) / sampler.temperature


def steered_log_probs(
    generator: MaskedGenerator,
    log_probs: Tensor,
    tokens: Tensor,
    step: StepInfo,
    rows: Tensor,
    temperatures: Tensor,
    scales: Tensor,
) -> Tensor:
    """Log-probabilities (R, V) under the temperature and guidance that each sample took, both (S,).

    From conditional ones at flat indices `rows` (R,) into tokens (S, N). Samples whose scale is not 1 cost a
    second, unconditional pass; the others none. Rollouts and likelihoods both call this one function.
    """
    owners, position = rows // tokens.shape[1], rows % tokens.shape[1]  # (R,)
    guided = scales != 1.0  # (S,)
    if guided.any():
        inside = guided[owners].nonzero().flatten()
        place = guided.cumsum(0) - 1  # of a sample among the guided ones
        wanted = place[owners[inside]] * tokens.shape[1] + position[inside]
        free = generator.logits(tokens[guided], generator.null(int(guided.sum())), step, wanted)
        moved = free + scales[owners[inside], None] * (log_probs[inside] - free)
        log_probs = log_probs.index_copy(0, inside, moved)
    return (log_probs / temperatures[owners, None]).log_softmax(-1)


def inverse_cdf(log_probs: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one code a row: int64 (R,) from log-probabilities (R, V) and numbers (R,) in (0, 1)."""
    cumulative = log_probs.exp().cumsum(-1)  # (R, V)
    target = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target).squeeze(1).clamp(max=log_probs.shape[1] - 1)


def plackett_luce(scores: Tensor, picks: Tensor) -> Tensor:
    """Log-probability (B,) of drawing the indices `picks` (B, k) in this order, without replacement.

    Each draw is a softmax over the scores (B, M) still there; adding Gumbel noise to the scores and taking
    the k largest, in order, draws from it (Plackett-Luce; Kool et al., arXiv 1903.06059).
    """
    chosen = scores.gather(1, picks)  # (B, k)
    rest = scores.scatter(1, picks, -torch.inf).logsumexp(1, keepdim=True)  # (B, 1), never drawn
    left = torch.cat([chosen, rest], 1).flip(1).logcumsumexp(1).flip(1)  # (B, k + 1), there at each draw
    return (chosen - left[:, :-1]).sum(1)


def choice_level(sampler: SamplerConfig, step: int) -> float:
    """Scale of the Gumbel noise on the confidences at a step; 0 at the last one, where all are kept."""
    return sampler.choice_temperature * (1 - (step + 1) / sampler.steps)


def fixed_orders(generator: MaskedGenerator, sampler: SamplerConfig, keys: Tensor) -> Tensor:
    """Positions in the order of revealing, int64 (B, N): Halton shifted and flipped a row, or random."""
    grid, num_tokens = generator.spec.grid, generator.spec.num_tokens
    if sampler.order == "random":
        return noise.uniforms(keys, noise.ORDER, 0, num_tokens).argsort(1)
    uniforms = noise.uniforms(keys, noise.ORDER, 0, 4)
    return shifted_orders(halton_order(*grid).to(keys.device), grid, uniforms)


def fixed_counts(num_tokens: int, sampler: SamplerConfig, keys: Tensor) -> Tensor:
    """How many positions each step reveals as far as it does not depend on the model, int64 (B, T).

    For a random budget each row has its own number of steps, zeros after it. Raises ValueError for
    steps > N.
    """
    kind = sampler.schedule if sampler.schedule in ("cosine", "linear", "arccos") else "power"
    if sampler.schedule != "random_budget":
        counts = reveal_counts(num_tokens, sampler.steps, kind, sampler.power)
        return counts.to(keys.device).expand(len(keys), -1)
    budgets = range(1, sampler.steps + 1)
    table = [functional.pad(reveal_counts(num_tokens, n, kind, sampler.power), (0, sampler.steps - n)) for n in budgets]
    drawn = (noise.uniforms(keys, noise.BUDGET, 0, 1)[:, 0] * sampler.steps).long()  # (B,)
    return torch.stack(table).to(keys.device)[drawn]


def start_tokens(num_tokens: int, codebook_size: int, mask_id: int, share: float, keys: Tensor) -> Tensor:
    """What the first step sees, int64 (B, N): masks, and random codes at round(share * N) positions."""
    shown = torch.full((len(keys), num_tokens), mask_id, device=keys.device)
    if share == 0:
        return shown
    rank = noise.uniforms(keys, noise.START, 0, num_tokens).argsort(1).argsort(1)  # (B, N)
    codes = (noise.uniforms(keys, noise.START, 1, num_tokens) * codebook_size).long()
    return torch.where(rank < round(share * num_tokens), codes, shown)


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
    cond = generator.encode(prompts)
    keys = noise.row_keys(seed, prompts, generator.device)
    state = _Unmasking(generator, sampler, keys, cond)
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

    def __init__(self, generator: MaskedGenerator, sampler: SamplerConfig, keys: Tensor, cond: Cond):
        spec, count, device = generator.spec, len(keys), keys.device
        self.generator, self.sampler, self.keys, self.cond = generator, sampler, keys, cond
        self.tokens = torch.full((count, spec.num_tokens), spec.mask_id, device=device)
        self.start = start_tokens(spec.num_tokens, spec.codebook_size, spec.mask_id, sampler.start_noise, keys)
        self.reveal_step = torch.full_like(self.tokens, -1)
        self.log_prob = torch.zeros(count, spec.num_tokens, device=device)
        self.known = torch.zeros(count, dtype=torch.int64, device=device)  # how many are revealed
        self.steps, self.forwards = torch.zeros_like(self.known), torch.zeros_like(self.known)
        self.alive = torch.arange(count, device=device)
        self.counts = fixed_counts(spec.num_tokens, sampler, keys)
        confident, paced = sampler.order == "confidence", sampler.schedule in HEADED
        each = (count, sampler.steps, spec.num_tokens)
        self.order = torch.zeros_like(self.tokens) if confident else fixed_orders(generator, sampler, keys)
        self.proposals = torch.full(each, -1, device=device) if confident else None
        self.proposal_log_prob = torch.zeros(each, device=device) if confident else None
        self.choice_log_prob = torch.zeros(each[:2], device=device) if confident else None
        self.pace = torch.full((count, sampler.steps), -1, device=device) if paced else None
        self.pace_log_prob = torch.zeros(count, sampler.steps, device=device) if paced else None
        self.pace_features = torch.zeros(count, sampler.steps, FEATURES, device=device) if paced else None

    def _rows(self, positions: Tensor) -> Tensor:
        """Positions (A, M) of the rows alive as flat indices (A * M,) into their tokens."""
        starts = torch.arange(len(positions), device=positions.device)[:, None] * self.tokens.shape[1]
        return (starts + positions).flatten()

    def _shown(self, step: int) -> Tensor:
        """What the network sees of the rows alive at a step, int64 (A, N)."""
        return self.start if step == 0 else self.tokens[self.alive]

    def _log_probs(self, positions: Tensor, step: int) -> Tensor:
        """Log-probabilities (A, M, V) at positions (A, M) of the rows alive; counts the passes."""
        everyone = len(self.alive) == len(self.tokens)
        cond = self.cond if everyone else self.cond.index(self.alive)
        rows, info = self._rows(positions), StepInfo(step, self.sampler.steps)
        logits = policy_logits(self.generator, self._shown(step), cond, self.sampler, info, rows)
        self.forwards[self.alive] += 1 if self.sampler.guidance_scale == 1.0 else 2
        return logits.log_softmax(-1).unflatten(0, positions.shape)

    def _draw(self, log_probs: Tensor, positions: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Tokens and their log-probabilities, both (A, M)."""
        uniforms = noise.uniforms(self.keys[self.alive], noise.TOKEN, step, self.tokens.shape[1])
        drawn = inverse_cdf(log_probs.flatten(0, 1), uniforms.gather(1, positions).flatten())
        drawn = drawn.unflatten(0, positions.shape)
        return drawn, log_probs.gather(-1, drawn[..., None]).squeeze(-1)

    def _fix(self, positions: Tensor, drawn: Tensor, log_prob: Tensor, keep: Tensor, step: int) -> None:
        """Fix the tokens at positions (A, M) of the rows alive where `keep` (A, M) holds."""
        rows = self.alive[:, None].expand_as(positions)[keep]
        where = (rows, positions[keep])
        self.tokens = self.tokens.index_put(where, drawn[keep])
        self.reveal_step[where] = step
        self.log_prob[where] = log_prob[keep]
        self.known[self.alive] += keep.sum(1)
        self.steps[self.alive] += 1
        if self.sampler.schedule in VARYING:
            self.alive = self.alive[self.known[self.alive] < self.tokens.shape[1]]

    def ordered_step(self, step: int) -> None:
        """Reveal the next positions of each row's order, as many as the schedule or the policy says."""
        num_tokens = self.tokens.shape[1]
        known, counts = self.known[self.alive], self.counts[self.alive, step]  # (A,)
        remaining = num_tokens - known
        looks_ahead = self.sampler.schedule in (*HEADED, "threshold")
        width = int((remaining if looks_ahead else counts).max())
        offsets = torch.arange(width, device=known.device)
        index = (known[:, None] + offsets).clamp(max=num_tokens - 1)
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
        self._fix(positions, drawn, log_prob, offsets < counts[:, None], step)

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
        steered = steered_log_probs(self.generator, flat, shown, info, rows, temperatures, scales)
        return steered.unflatten(0, positions.shape)

    def confidence_step(self, step: int) -> None:
        """Propose every masked token, keep the most confident (MaskGIT, arXiv 2202.04200)."""
        first, count = int(self.known[0]), int(self.counts[0, step])  # equal in every row
        masked = self.reveal_step < 0
        positions = masked.nonzero()[:, 1].unflatten(0, (len(self.tokens), -1))  # (B, M)
        log_probs = self._log_probs(positions, step)
        drawn, log_prob = self._draw(log_probs, positions, step)
        uniforms = noise.uniforms(self.keys, noise.CHOICE, step, self.tokens.shape[1]).gather(1, positions)
        level = choice_level(self.sampler, step)
        confidence = log_prob - level * (-uniforms.log()).log()
        best = confidence.topk(count, dim=1).indices  # (B, count), most confident first
        self.order[:, first : first + count] = positions.gather(1, best)
        self.proposals[:, step].scatter_(1, positions, drawn)
        self.proposal_log_prob[:, step].scatter_(1, positions, log_prob)
        if level > 0:
            self.choice_log_prob[:, step] = plackett_luce(log_prob / level, best)
        keep = torch.zeros_like(positions, dtype=torch.bool).scatter(1, best, True)
        self._fix(positions, drawn, log_prob, keep, step)

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
            proposals=self.proposals,
            proposal_log_prob=self.proposal_log_prob,
            choice_log_prob=self.choice_log_prob,
            pace=self.pace,
            pace_features=self.pace_features,
            pace_log_prob=self.pace_log_prob,
        )
