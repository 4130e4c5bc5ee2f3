"""Sampling that consumes random numbers exactly as diffusers' AmusedScheduler does.

Only for comparisons with published pipelines: noise is drawn for the whole batch from one generator,
so a sample depends on its batch. `sampler` is what everything else uses.
"""

import math

import torch
from torch import Tensor

from speedrl_lab.generator import Cond, MaskedGenerator, StepInfo, guided_logits


def masks_left(num_tokens: int, step: int, steps: int, schedule: str = "cosine") -> int:
    """Masks that stay after 0-based `step`: floor(N * ratio), rounded in float32 as published."""
    ratio = torch.tensor((step + 1) / steps, dtype=torch.float32)
    match schedule:
        case "cosine":
            share = torch.cos(ratio * math.pi / 2)
        case "linear":
            share = 1 - ratio
        case _:
            raise ValueError(f"schedule={schedule!r}: parity knows cosine and linear")
    return int((num_tokens * share).floor())


def unmask(
    tokens: Tensor,
    logits: Tensor,
    exponentials: Tensor,
    uniforms: Tensor,
    mask_id: int,
    step: int,
    steps: int,
    schedule: str = "cosine",
    choice_temperature: tuple[float, float] = (2.0, 0.0),
) -> tuple[Tensor, Tensor]:
    """One step of the published algorithm: (next tokens, drawn tokens), both int64 (B, N).

    Args:
        tokens: int64 (B, N) with `mask_id` where unknown.
        logits: float32 (B, N, V).
        exponentials: (B, N, V); the token is argmax(p / exponential), as torch.multinomial computes it.
        uniforms: (B, N), for the Gumbel noise on the confidences.
    """
    unknown = tokens == mask_id
    probabilities = logits.softmax(-1)
    drawn = (probabilities / exponentials).argmax(-1)
    drawn = torch.where(unknown, drawn, tokens)
    if step == steps - 1:
        return drawn, drawn
    count = unknown.sum(1, keepdim=True)
    left = torch.full_like(count, masks_left(tokens.shape[1], step, steps, schedule))
    left = left.minimum(count - 1).clamp(min=1)  # (B, 1)
    chosen = probabilities.gather(-1, drawn.clamp(max=logits.shape[-1] - 1)[..., None]).squeeze(-1)
    chosen = torch.where(unknown, chosen, torch.finfo(torch.float32).max)
    gumbel = -(-uniforms.clamp(min=1e-20).log()).clamp(min=1e-20).log()
    level = torch.linspace(*choice_temperature, steps)[step].to(logits.device)
    confidence = chosen.clamp(min=1e-20).log() + level * gumbel
    cut = confidence.sort(1).values.gather(1, left)
    return torch.where(confidence < cut, mask_id, drawn), drawn


@torch.no_grad()
def sample_parity(
    generator: MaskedGenerator,
    cond: Cond,
    steps: int,
    rng: torch.Generator,
    guidance_scale: float = 10.0,
    schedule: str = "cosine",
    choice_temperature: tuple[float, float] = (2.0, 0.0),
) -> Tensor:
    """Final tokens int64 (B, N), equal token for token to the published pipeline with the same generator."""
    spec = generator.spec
    tokens = torch.full((len(cond), spec.num_tokens), spec.mask_id, device=rng.device)
    for step in range(steps):
        info = StepInfo(step, steps)
        logits = guided_logits(generator, tokens, cond, guidance_scale, info).to(rng.device)
        # Exactly what torch.multinomial draws inside: one exponential for every row and code.
        exponentials = torch.empty_like(logits).exponential_(1, generator=rng)
        uniforms = torch.zeros(tokens.shape, device=rng.device)
        if step < steps - 1:
            uniforms.uniform_(0, 1, generator=rng)
        tokens, _ = unmask(
            tokens, logits, exponentials, uniforms, spec.mask_id, step, steps, schedule, choice_temperature
        )
    return tokens
