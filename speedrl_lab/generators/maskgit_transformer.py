"""The class-conditional MaskGIT transformer of Halton-MaskGIT, with the names of its published weights.

A DiT-like encoder (Besnier et al., arXiv 2503.17076; blocks of Peebles and Xie, arXiv 2212.09748): tokens plus
learned positions and a register token, adaLN-zero from the class, SwiGLU, a head tied to the token embedding.
The published head predicts the mask as one more class; it is sliced away here. The dropout of its training
is left out. Comments give shapes with B rows, N tokens, R registers, V codes, D width.
"""

from collections.abc import Mapping
from math import isqrt

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

PUBLISHED_HEADS = {384: 6, 512: 6, 768: 12, 1024: 16, 1152: 16}
"""Width of the tiny, small, base, large and xlarge networks -> attention heads, which no weight tells."""
EPS = 1e-5


def feed_forward_width(width: int) -> int:
    """Hidden units of the SwiGLU: two thirds of 4 D, rounded up to a multiple of 256."""
    return -(-int(2 * 4 * width / 3) // 256) * 256


def embedding(rows: int, width: int) -> nn.Embedding:
    """A table of small uniform numbers; nn.Embedding's normal ones cost seconds of imports on the meta device."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width).uniform_(-0.03, 0.03), freeze=False)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, for x (B, N, D) and one shift and scale (B, D) a row."""
    return x * (1 + scale[:, None]) + shift[:, None]


class BiasedRMSNorm(nn.RMSNorm):
    """RMSNorm with a bias beside its weight."""

    def __init__(self, width: int):
        super().__init__(width, EPS)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias


class Attention(nn.Module):
    """Self-attention whose queries and keys are RMS-normed over all heads together, without weights."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        inner = heads * (width // heads)  # 510 of 512 in the small network, whose 6 heads do not divide it
        self.wq = nn.Linear(width, inner, bias=False)
        self.wk = nn.Linear(width, inner, bias=False)
        self.wv = nn.Linear(width, inner, bias=False)
        self.wo = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.wq(x), self.wk(x), self.wv(x)
        q = functional.rms_norm(q, q.shape[-1:], eps=EPS).to(v.dtype)
        k = functional.rms_norm(k, k.shape[-1:], eps=EPS).to(v.dtype)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, h, N+R, d)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.wo(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, width: int):
        super().__init__()
        hidden = feed_forward_width(width)
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Attention and SwiGLU, each shifted, scaled and gated by the class (adaLN-zero)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.ln1 = nn.RMSNorm(width, EPS)
        self.attn = Attention(width, heads)
        self.ln2 = nn.RMSNorm(width, EPS)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, label: Tensor, numbers: Tensor | None = None) -> Tensor:
        """x (B, N+R, D) and label (B, D), or what `mlp` makes of it, (B, 6 D)."""
        numbers = self.mlp(label) if numbers is None else numbers
        shift1, scale1, gate1, shift2, scale2, gate2 = numbers.chunk(6, 1)  # (B, D) each
        x = x + gate1[:, None] * self.attn(modulate(self.ln1(x), shift1, scale1))
        return x + gate2[:, None] * self.ff(modulate(self.ln2(x), shift2, scale2))


class Encoder(nn.Module):
    """The blocks; a module of its own for the sake of the published names."""

    def __init__(self, width: int, depth: int, heads: int):
        super().__init__()
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(depth))


class FinalNorm(nn.Module):
    """Norm shifted and scaled by the class."""

    def __init__(self, width: int):
        super().__init__()
        self.norm_final = BiasedRMSNorm(width)
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return modulate(self.norm_final(x), *self.mlp(label).chunk(2, 1))


class MaskGitTransformer(nn.Module):
    """Predicts the masked codes of a square grid from an ImageNet class.

    Args:
        side: rows, and columns, of the token grid.
        heads: attention heads; the published ones are in `PUBLISHED_HEADS`.
        registers: learned tokens appended to the image and dropped before the head.
    """

    def __init__(
        self,
        side: int = 24,
        width: int = 1024,
        depth: int = 24,
        heads: int = 16,
        codebook_size: int = 16384,
        num_classes: int = 1000,
        registers: int = 1,
    ):
        super().__init__()
        self.side, self.heads = side, heads
        self.codebook_size = self.mask_id = codebook_size
        self.null_label = num_classes
        self.gradient_checkpointing = False
        self.cls_emb = embedding(num_classes + 1, width)
        self.tok_emb = embedding(codebook_size + 1, width)
        self.pos_emb = embedding(side**2, width)
        self.reg_tokens = embedding(registers, width)
        self.transformer = Encoder(width, depth, heads)
        self.last_norm = FinalNorm(width)
        self.head = nn.Linear(width, codebook_size + 1)
        self.tie()

    def tie(self) -> None:
        """Make the head's weight the token embedding itself."""
        self.head.weight = self.tok_emb.weight

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block in the backward pass instead of keeping what is inside it."""
        self.gradient_checkpointing = True

    def modulation(self, labels: Tensor) -> Tensor:
        """What every block makes of labels (B,): (B, blocks, 6 D), the same for all tokens."""
        label = self.cls_emb(labels)
        return torch.stack([block.mlp(label) for block in self.transformer.layers], 1)

    def hidden(self, tokens: Tensor, labels: Tensor, modulation: Tensor | None = None) -> Tensor:
        """Final hidden states (B, N, D) of tokens (B, N) in 0..V (V is the mask) and labels (B,).

        `modulation` is that of the labels, where it is there already.
        """
        label = self.cls_emb(labels)  # (B, D)
        image = self.tok_emb(tokens) + self.pos_emb.weight
        x = torch.cat([image, self.reg_tokens.weight.expand(len(tokens), -1, -1)], 1)  # (B, N+R, D)
        for number, block in enumerate(self.transformer.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, label, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, label, None if modulation is None else modulation[:, number])
        return self.last_norm(x[:, : tokens.shape[1]], label)

    def forward(
        self, tokens: Tensor, labels: Tensor, rows: Tensor | None = None, modulation: Tensor | None = None
    ) -> Tensor:
        """Float32 logits (B, N, V), or (len(rows), V) at flat indices `rows` into B*N; never of the mask."""
        hidden = self.hidden(tokens, labels, modulation)
        hidden = hidden if rows is None else hidden.flatten(0, 1)[rows]
        codes = slice(self.codebook_size)
        return functional.linear(hidden, self.head.weight[codes], self.head.bias[codes]).float()


def published_sizes(state: Mapping[str, Tensor], heads: int | None = None) -> dict[str, int]:
    """Constructor arguments of the network that a state dict is of; `heads` where it is none of the published widths.

    Raises KeyError for a weight that is not there, ValueError for sizes that cannot be.
    """
    tokens, width = state["tok_emb.weight"].shape
    heads = PUBLISHED_HEADS.get(width) if heads is None else heads
    if heads is None:
        known = ", ".join(f"{size}: {count}" for size, count in PUBLISHED_HEADS.items())
        raise ValueError(f"width {width} is not published ({known}), so that 'heads' must be in the file's config")
    positions = len(state["pos_emb.weight"])
    if isqrt(positions) ** 2 != positions:
        raise ValueError(f"pos_emb.weight has {positions} rows: expected a square; nearest: {isqrt(positions) ** 2}")
    layers = {name.split(".")[2] for name in state if name.startswith("transformer.layers.")}
    return {
        "side": isqrt(positions),
        "width": width,
        "depth": len(layers),
        "heads": heads,
        "codebook_size": tokens - 1,
        "num_classes": len(state["cls_emb.weight"]) - 1,
        "registers": len(state["reg_tokens.weight"]),
    }


def transformer_from(state: Mapping[str, Tensor], heads: int | None = None) -> MaskGitTransformer:
    """The network of a published state dict, float32, in eval mode.

    The head and the token embedding are one tensor; either name may be absent. Raises KeyError, ValueError or
    RuntimeError (of the strict load) for weights that are not of this network.
    """
    state = dict(state)
    for name, twin in (("head.weight", "tok_emb.weight"), ("tok_emb.weight", "head.weight")):
        if twin in state:
            state.setdefault(name, state[twin])
    sizes = published_sizes(state, heads)
    if not torch.equal(state["head.weight"], state["tok_emb.weight"]):
        raise ValueError("head.weight differs from tok_emb.weight: expected one tensor under both names")
    with torch.device("meta"):  # no time and no random numbers for weights that are replaced at once
        network = MaskGitTransformer(**sizes)
    network.load_state_dict({name: value.float().clone() for name, value in state.items()}, strict=True, assign=True)
    network.tie()
    return network.eval()
