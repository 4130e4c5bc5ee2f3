"""The pace head: reads what the model knows, chooses how many tokens to reveal now, and maybe how to draw them.

Our interpretation of how the number of steps becomes an action (the paper does not say). It sees the
entropies of the next positions in the order and the share revealed, as numbers without gradient: the
pace is learned by its own log-probability alone.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""The choices, as shares of all N tokens; a choice above what is left reveals all that is left."""
EXPLORATION = 0.05
"""Share of uniform choices mixed into each part: without it the head soon takes one count always, and then a speed
reward has nothing to act on."""
FEATURES = 2 * len(SHARES) + 2
TEMPERATURES = (0.5, 0.7, 0.85, 1.0)
"""Of the tokens, that an adaptive head chooses from."""
SCALES = (1.0, 2.0, 3.0)
"""Of guidance, that an adaptive head chooses from; 1 costs one pass a step, another two."""


def pace_counts(num_tokens: int) -> Tensor:
    """How many tokens each choice reveals, int64 (K,), at least one."""
    return torch.tensor([max(1, round(share * num_tokens)) for share in SHARES])


def pace_features(entropies: Tensor, remaining: Tensor) -> Tensor:
    """Features (B, FEATURES) of ordered entropies (B, N) in nats; the first `remaining` (B,) count.

    Mean and maximum entropy of the next 1/64 ... 1 of the tokens (in units of 4 bits), the share
    revealed and the log of the share that is left.
    """
    num_tokens = entropies.shape[1]
    left = torch.arange(num_tokens, device=entropies.device) < remaining[:, None]  # (B, N)
    known = entropies * left
    totals, peaks = known.cumsum(1), known.cummax(1).values
    ends = pace_counts(num_tokens).to(entropies.device)  # (K,)
    ends = torch.minimum(ends, remaining[:, None].clamp(min=1))  # (B, K)
    means = totals.gather(1, ends - 1) / ends
    share = remaining[:, None].float() / num_tokens
    knowledge = torch.cat([means, peaks.gather(1, ends - 1)], 1) / (4 * math.log(2))
    return torch.cat([knowledge, 1 - share, share.clamp(min=1e-3).log()], 1)


class PaceHead(nn.Module):
    """Log-probabilities of the K choices from pace features; starts with all choices equally likely.

    A choice is a count, and where several `temperatures` or `scales` are given also a temperature of the
    tokens and a guidance scale for this step (the actions of AdaNAT, arXiv 2409.00342): one categorical over
    the product, in which each part is drawn on its own and explores on its own.
    """

    def __init__(self, width: int = 64, temperatures: Sequence[float] = (1.0,), scales: Sequence[float] = (1.0,)):
        super().__init__()
        self.temperatures, self.scales = tuple(temperatures), tuple(scales)
        self.adaptive = len(self.temperatures) * len(self.scales) > 1
        self.config = {"width": width}
        if self.adaptive:
            self.config |= {"temperatures": list(self.temperatures), "scales": list(self.scales)}
        self.sizes = (len(SHARES), len(self.temperatures), len(self.scales))
        self.outputs = [size for size in self.sizes if size > 1]  # a part without a choice has no logits
        self.layers = nn.Sequential(nn.Linear(FEATURES, width), nn.SiLU(), nn.Linear(width, sum(self.outputs)))

    def forward(self, features: Tensor) -> Tensor:
        """Log-probabilities (..., K) from pace features (..., FEATURES)."""
        parts = [
            ((1 - EXPLORATION) * logits.softmax(-1) + EXPLORATION / logits.shape[-1]).log()
            for logits in self.layers(features).split(self.outputs, -1)
        ]
        joint = parts[0]
        for part in parts[1:]:
            joint = (joint[..., None] + part[..., None, :]).flatten(-2)
        return joint

    def decode(self, taken: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """What choices int64 (...) mean: how many tokens, int64, temperature and guidance scale, float32; all (...)."""
        share, temperature, scale = torch.unravel_index(taken, self.sizes)
        parts = pace_counts(num_tokens), torch.tensor(self.temperatures), torch.tensor(self.scales)
        counts, temperatures, scales = (part.to(taken.device) for part in parts)
        return counts[share], temperatures[temperature], scales[scale]

    @torch.no_grad()
    def reset(self, seed: int) -> "PaceHead":
        """Fresh weights from a seed; returns itself."""
        rng = torch.Generator().manual_seed(seed)
        first, last = self.layers[0], self.layers[2]
        first.weight.copy_(torch.randn(first.weight.shape, generator=rng) / first.in_features**0.5)
        for zero in (first.bias, last.weight, last.bias):
            zero.zero_()
        return self


def head_for(schedule: str, seed: int) -> PaceHead:
    """A fresh head for the schedule `paced` or `adaptive`."""
    head = PaceHead(temperatures=TEMPERATURES, scales=SCALES) if schedule == "adaptive" else PaceHead()
    return head.reset(seed)
