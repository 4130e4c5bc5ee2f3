"""The loop most would write first: what our sampler is measured against, on the same generator.

Logits of every position at every step, softmax and `torch.multinomial` over all of them, prompts encoded at each
call, guidance as a second pass over the whole batch, every sample through every step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from speedrl_lab.generator import MaskedGenerator, StepInfo
from speedrl_lab.schedules import reveal_counts


@torch.no_grad()
def sample_plainly(
    generator: MaskedGenerator, prompts: Sequence[str], steps: int, guidance_scale: float = 1.0, seed: int = 0
) -> Tensor:
    """Tokens int64 (B, N) by MaskGIT's confidence order (arXiv 2202.04200)."""
    spec, device = generator.spec, generator.device
    rng = torch.Generator(device).manual_seed(seed)
    cond, null = generator.encode(prompts), generator.null(len(prompts))
    tokens = torch.full((len(prompts), spec.num_tokens), spec.mask_id, device=device)
    for step, count in enumerate(reveal_counts(spec.num_tokens, steps).tolist()):
        info = StepInfo(step, steps)
        logits = generator.logits(tokens, cond, info)  # (B, N, V)
        if guidance_scale != 1.0:
            free = generator.logits(tokens, null, info)
            logits = free + guidance_scale * (logits - free)
        chances = logits.softmax(-1)
        drawn = torch.multinomial(chances.flatten(0, 1), 1, generator=rng).view_as(tokens)
        confidence = chances.gather(-1, drawn[..., None]).squeeze(-1).log()
        noise = -(-torch.rand(tokens.shape, generator=rng, device=device).clamp(min=1e-20).log()).log()
        confidence = confidence + (1 - (step + 1) / steps) * noise
        confidence = confidence.masked_fill(tokens != spec.mask_id, -torch.inf)
        places = confidence.topk(count, dim=1).indices  # (B, count)
        tokens = tokens.scatter(1, places, drawn.gather(1, places))
    return tokens
