"""The embedded networks of EmojiScenes: FSQ tokenizer, masked transformer, small CLIP, detector.

Plain modules without any randomness of their own (no dropout). Every constructor argument is kept in
`config`, so that a weights file can rebuild its module (see `weights`). Comments give shapes with
B rows, N tokens, L words, V codes, D width.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from speedrl_lab.compilation import as_written, compiled

CHUNK = 8
"""Samples that a CPU takes through the transformer at once without gradient: what lies between then fits its cache."""


class FSQ(nn.Module):
    """Finite scalar quantization: round each of a few bounded channels to a small number of levels.

    The code is the mixed-radix number of the rounded channels (Mentzer et al., arXiv 2309.15505).
    """

    def __init__(self, levels: Sequence[int]):
        super().__init__()
        self.levels = tuple(levels)
        basis = [math.prod(self.levels[:k]) for k in range(len(self.levels))]
        self.register_buffer("_levels", torch.tensor(self.levels), persistent=False)
        self.register_buffer("_basis", torch.tensor(basis), persistent=False)
        self.codebook_size = math.prod(self.levels)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize (..., K): values in [-1, 1] with a straight-through gradient, and codes (...)."""
        half = (self._levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(self._levels % 2 == 0, 0.5, 0.0)
        bounded = (z + (offset / half).atanh()).tanh() * half - offset
        digits = bounded + (bounded.round() - bounded).detach()
        codes = ((digits.detach() + self._levels // 2).long() * self._basis).sum(-1)
        return digits / (self._levels // 2), codes

    def digits(self, codes: Tensor) -> Tensor:
        """Split codes (...) into their digits, int64 (..., K)."""
        return (codes[..., None] // self._basis) % self._levels

    def values(self, codes: Tensor) -> Tensor:
        """The channel values of codes, float32 (..., K) in [-1, 1]."""
        half = self._levels // 2
        return (self.digits(codes) - half) / half


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, added to the input."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, padding_mode="replicate")
        self.norm2 = nn.GroupNorm(8, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, padding_mode="replicate")

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(functional.silu(self.norm1(x)))
        return x + self.conv2(functional.silu(self.norm2(y)))


class Tokenizer(nn.Module):
    """FSQ autoencoder of 4x4-pixel patches; all work happens on the token grid.

    A token sees only its 3x3 neighbourhood of patches, so that the same content gets the same tokens
    wherever it stands; the decoder has context.
    """

    PATCH = 4

    def __init__(self, levels: Sequence[int] = (8, 5, 5, 5), width: int = 128, blocks: int = 3):
        super().__init__()
        self.config = {"levels": list(levels), "width": width, "blocks": blocks}
        self.quantizer = FSQ(levels)
        pixels = 3 * self.PATCH**2
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(self.PATCH),  # (B, 48, H/4, W/4)
            nn.Conv2d(pixels, width, 3, padding=1, padding_mode="replicate"),
            nn.SiLU(),
            nn.Conv2d(width, width, 1),
            nn.SiLU(),
            nn.Conv2d(width, len(levels), 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(len(levels), width, 1),
            *(ResidualBlock(width) for _ in range(blocks)),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, pixels, 1),
            nn.PixelShuffle(self.PATCH),  # (B, 3, H, W)
        )

    def quantize(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [0, 1] to values (B, h, w, K) and codes (B, h, w)."""
        z = self.encoder(images * 2 - 1)
        return self.quantizer(z.permute(0, 2, 3, 1).float())

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to codes, int64 (B, N) in raster order."""
        return self.quantize(images)[1].flatten(1)

    def decode_values(self, values: Tensor) -> Tensor:
        """Channel values (B, h, w, K) to unclipped images (B, 3, H, W)."""
        return self.decoder(values.permute(0, 3, 1, 2)) * 0.5 + 0.5

    def decode(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        """Codes (B, N) to images, float32 (B, 3, H, W) in [0, 1]."""
        values = self.quantizer.values(codes).unflatten(1, grid)  # (B, h, w, K)
        return self.decode_values(values).clamp(0, 1).float()


def _rotary_angles(grid: tuple[int, int], words: int, head_width: int) -> Tensor:
    """Rotation angles (L + N, head_width / 2): none for words, rows then columns for the image."""
    quarter = head_width // 4
    frequency = 10.0 ** (-torch.arange(quarter) / quarter)
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    image = torch.cat([rows.reshape(-1, 1) * frequency, columns.reshape(-1, 1) * frequency], 1)  # (N, head_width / 2)
    return torch.cat([torch.zeros(words, 2 * quarter), image])


class TransformerBlock(nn.Module):
    """Pre-norm attention with q/k norm and 2-D rotary positions, `attend`, then a GELU MLP, in `finish`."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm = nn.RMSNorm(width // heads)
        self.k_norm = nn.RMSNorm(width // heads)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """What each position gathers from all of x (B, L+N, D): (B, L+N, D)."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, L+N, h, d)
        q, k = _rotate(self.q_norm(q), cos, sin), _rotate(self.k_norm(k), cos, sin)
        # Written out: the fused CPU kernel is several times slower in the bf16 backward pass.
        scores = (q.transpose(1, 2) * q.shape[-1] ** -0.5) @ k.permute(0, 2, 3, 1)  # (B, h, L+N, L+N)
        mixed = scores.softmax(-1) @ v.transpose(1, 2)  # (B, h, L+N, d)
        return mixed.transpose(1, 2).flatten(2)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The rest of the block, where every position stands alone, of x and what it gathered, both (..., D)."""
        x = x + self.out(mixed)
        return x + self.down(_gelu(self.up(self.norm2(x))))


def _onward(
    block: TransformerBlock, following: TransformerBlock, x: Tensor, mixed: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """The rest of a block and the attention of the next: states and what they gather, both (B, L+N, D)."""
    x = block.finish(x, mixed)
    return x, following.attend(x, cos, sin)


def _gelu(x: Tensor) -> Tensor:
    """GELU by its tanh formula, or as x * sigmoid(2 u), where 0.5 (1 + tanh u) is sigmoid(2 u).

    The second is cheaper on a CPU, compiled or without gradient: PyTorch's kernel of the first takes half as long
    again, inductor's tanh twice as long as its sigmoid. Only in float32: in bfloat16 the two round apart, and a policy
    would seem to differ from its own copy.
    """
    fused = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if x.device.type != "cpu" or x.dtype != torch.float32 or fused:
        return functional.gelu(x, approximate="tanh")
    slope = 2 * math.sqrt(2 / math.pi)
    if torch.is_grad_enabled():
        return x * ((x * x * (0.044715 * slope) + slope) * x).sigmoid()
    return (x * x).mul_(0.044715 * slope).add_(slope).mul_(x).sigmoid_().mul_(x)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class MaskedTransformer(nn.Module):
    """Bidirectional transformer over caption words and image tokens that predicts the masked codes.

    Codes are embedded and predicted through their FSQ digits plus a table of their own, so that
    similar codes share what they learn. Word id 0 everywhere is the null caption.
    """

    compiled = False
    """Whether the blocks run as torch.compile makes them; a copy of the network does as the network does."""

    def __init__(
        self,
        grid: tuple[int, int] = (8, 8),
        levels: Sequence[int] = (8, 5, 5, 5),
        num_words: int = 65,
        max_words: int = 12,
        width: int = 192,
        depth: int = 6,
        heads: int = 4,
    ):
        super().__init__()
        self.config = {
            "grid": list(grid), "levels": list(levels), "num_words": num_words,
            "max_words": max_words, "width": width, "depth": depth, "heads": heads,
        }  # fmt: skip
        self.max_words = max_words
        self.codebook_size = math.prod(levels)
        self.mask_id = self.codebook_size
        quantizer = FSQ(levels)
        digits = quantizer.digits(torch.arange(self.codebook_size))  # (V, K)
        starts = torch.tensor([sum(levels[:k]) for k in range(len(levels))])
        self.register_buffer("_digit_rows", digits + starts, persistent=False)
        self.code_embedding = nn.Embedding(self.codebook_size + 1, width)
        self.digit_embedding = nn.Embedding(sum(levels), width)
        self.word_embedding = nn.Embedding(num_words, width)
        self.word_position = nn.Parameter(torch.zeros(max_words, width))
        self.image_position = nn.Parameter(torch.zeros(math.prod(grid), width))
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.code_head = nn.Linear(width, self.codebook_size)
        self.digit_head = nn.Linear(width, sum(levels), bias=False)
        angles = _rotary_angles(tuple(grid), max_words, width // heads)
        self.register_buffer("_cos", angles.cos()[:, None], persistent=False)  # (L+N, 1, d/2)
        self.register_buffer("_sin", angles.sin()[:, None], persistent=False)
        self._initialize()

    def _initialize(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.02)
            if name.endswith(("out.weight", "down.weight", "head.weight")):
                nn.init.zeros_(parameter)

    def tables(self) -> tuple[Tensor, Tensor]:
        """What each code is embedded as, (V+1, D), and what predicts it, (V, D); the same for all tokens."""
        embedded, predicted = (
            functional.embedding_bag(self._digit_rows, weight, mode="sum")  # (V, D)
            for weight in (self.digit_embedding.weight, self.digit_head.weight)
        )
        return self.code_embedding.weight + functional.pad(embedded, (0, 0, 0, 1)), self.code_head.weight + predicted

    def hidden(self, tokens: Tensor, words: Tensor, table: Tensor, rows: Tensor | None = None) -> Tensor:
        """Final states (B, N, D) of tokens (B, N) in 0..V (V is the mask) and words (B, L), embedded by `table`.

        (len(rows), D) at flat indices `rows` into B*N: the last block then ends at these alone.
        """
        graded, device = torch.is_grad_enabled(), tokens.device.type
        size = CHUNK if device == "cpu" and not graded else max(1, len(tokens))
        run = compiled if self.compiled and device != "meta" else as_written
        if graded:  # block by block: the backward pass of all at once takes minutes to compile
            gather, inner = self._gathered, run
        else:  # all blocks in one call: those of single blocks are a sixth of the time that one row takes
            gather, inner = partial(run(MaskedTransformer._gathered), self), as_written
        parts = [gather(*pair, table, inner) for pair in zip(tokens.split(size), words.split(size), strict=True)]
        x, mixed = (torch.cat(column) if len(parts) > 1 else column[0] for column in zip(*parts, strict=True))
        x, mixed = x.flatten(0, 1), mixed.flatten(0, 1)  # (B*N, D)
        wanted = torch.arange(len(x), device=x.device) if rows is None else rows
        finish, last = run(TransformerBlock.finish), self.blocks[-1]
        # Copies of rows, not views: every kind of view would be compiled for itself.
        ends = [finish(last, x[part], mixed[part]) for part in wanted.split(size * tokens.shape[1])]
        states = self.norm(torch.cat(ends) if len(ends) > 1 else ends[0])
        return states.unflatten(0, tokens.shape) if rows is None else states

    def _gathered(self, tokens: Tensor, words: Tensor, table: Tensor, run: Callable) -> tuple[Tensor, Tensor]:
        """States of the image before the last block's attention and what that gathers, both (B, N, D).

        `run` makes of a function the one that is called.
        """
        image = functional.embedding(tokens, table) + self.image_position
        text = self.word_embedding(words) + self.word_position
        x = torch.cat([text, image], 1)  # (B, L+N, D)
        turn = (self._cos, self._sin)
        mixed = run(TransformerBlock.attend)(self.blocks[0], x, *turn)
        for block, following in pairwise(self.blocks):
            x, mixed = run(_onward)(block, following, x, mixed, *turn)
        return x[:, self.max_words :], mixed[:, self.max_words :]

    def forward(
        self,
        tokens: Tensor,
        words: Tensor,
        rows: Tensor | None = None,
        tables: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Logits (B, N, V), or (len(rows), V) at flat indices `rows` into B*N; `tables` where they are made already."""
        table, weight = tables or self.tables()
        return functional.linear(self.hidden(tokens, words, table, rows), weight, self.code_head.bias).float()


class ConvTower(nn.Module):
    """Convolutional picture encoder, (B, 3, 32, 32) to (B, features); keeps positions to the end."""

    def __init__(self, widths: Sequence[int], features: int):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1)]  # (B, w0, 16, 16)
        for level, width in enumerate(widths):
            if level:
                layers += [nn.GroupNorm(8, widths[level - 1]), nn.SiLU()]
                layers += [nn.Conv2d(widths[level - 1], width, 2, stride=2)]  # halves H and W
            layers += [ResidualBlock(width)]
        layers += [nn.GroupNorm(8, widths[-1]), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)  # (B, w2, 4, 4)
        self.out = nn.Linear(widths[-1] * (32 // 2 ** len(widths)) ** 2, features)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.trunk(images * 2 - 1).flatten(1))


class SmallClip(nn.Module):
    """Two-tower picture-caption model (Radford et al., arXiv 2103.00020) for 32x32 scenes."""

    def __init__(
        self,
        num_words: int = 65,
        max_words: int = 12,
        widths: Sequence[int] = (48, 96, 128),
        text_width: int = 128,
        features: int = 128,
    ):
        super().__init__()
        self.config = {
            "num_words": num_words, "max_words": max_words, "widths": list(widths),
            "text_width": text_width, "features": features,
        }  # fmt: skip
        self.image_tower = ConvTower(widths, features)
        self.word_embedding = nn.Embedding(num_words, text_width)
        self.word_position = nn.Parameter(torch.randn(max_words, text_width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            text_width, 4, 4 * text_width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.text_tower = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.text_out = nn.Linear(text_width, features)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, images: Tensor) -> Tensor:
        """Unit vectors (B, features) of images (B, 3, 32, 32) in [0, 1]."""
        return functional.normalize(self.image_tower(images).float(), dim=-1)

    def encode_text(self, words: Tensor) -> Tensor:
        """Unit vectors (B, features) of word ids (B, L)."""
        x = self.word_embedding(words) + self.word_position
        x = self.text_tower(x)
        used = (words > 0).float()[..., None]
        pooled = (x * used).sum(1) / used.sum(1).clamp(min=1)  # (B, D)
        return functional.normalize(self.text_out(pooled).float(), dim=-1)


class Detector(nn.Module):
    """Reads a scene: how many of each object (0, 1, 2), the background, and where single objects are."""

    def __init__(
        self,
        num_objects: int = 24,
        num_colors: int = 8,
        widths: Sequence[int] = (48, 96, 128),
        features: int = 256,
    ):
        super().__init__()
        self.config = {
            "num_objects": num_objects, "num_colors": num_colors,
            "widths": list(widths), "features": features,
        }  # fmt: skip
        self.num_objects = num_objects
        self.tower = ConvTower(widths, features)
        self.counts_head = nn.Linear(features, num_objects * 3)
        self.color_head = nn.Linear(features, num_colors)
        self.place_head = nn.Linear(features, num_objects * 2)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features (B, F) of images (B, 3, 32, 32) in [0, 1]."""
        return functional.silu(self.tower(images)).float()

    def heads(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Count logits (B, O, 3), colour logits (B, C), centres (B, O, 2) as (x, y) in [0, 1]."""
        counts = self.counts_head(features).unflatten(1, (self.num_objects, 3))
        places = self.place_head(features).unflatten(1, (self.num_objects, 2)).sigmoid()
        return counts, self.color_head(features), places

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.heads(self.features(images))
