"""The compositor of EmojiScenes: sprites, where they lie, and the pictures they make.

It knows ids, pixels and colours, and no captions. Sprites and their licences: `data/emoji_scenes`.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

DATA = Path(__file__).resolve().parent.parent / "data"
FOLDER = DATA / "emoji_scenes"

OBJECTS = (
    "dog", "cat", "car", "apple", "banana", "tree", "star", "heart", "house", "fish", "ball", "flower",
    "pizza", "book", "rocket", "boat", "frog", "pig", "mushroom", "umbrella", "guitar", "clock", "key", "cake",
)  # fmt: skip
STYLES = ("noto", "twemoji", "fluent-emoji-flat")
COLORS = {
    "white": (245, 245, 245), "black": (25, 25, 28), "red": (200, 60, 55), "green": (70, 150, 80),
    "blue": (70, 110, 200), "yellow": (235, 205, 80), "purple": (130, 80, 170), "gray": (140, 140, 145),
}  # fmt: skip
IMAGE_SIZE = 32
SMALL, LARGE = 16, 24  # sprite sizes in pixels; pairs are always small
STRIDE = 4  # sprites sit on the token grid


@lru_cache(maxsize=4)
def sprites(size: int) -> Tensor:
    """The sprites at one size, premultiplied RGBA float32 (objects, styles, 4, size, size) in [0, 1]."""
    names = json.loads((FOLDER / "atlas.json").read_text())
    cell = names["size"]
    pixels = np.asarray(Image.open(FOLDER / "atlas.png").convert("RGBA"), dtype=np.float32) / 255
    atlas = torch.from_numpy(pixels)  # (styles*cell, objects*cell, 4)
    atlas = atlas.unflatten(1, (-1, cell)).unflatten(0, (-1, cell))  # (S, cell, O, cell, 4)
    atlas = atlas.permute(2, 0, 4, 1, 3)  # (O, S, 4, cell, cell)
    atlas = torch.cat([atlas[:, :, :3] * atlas[:, :, 3:], atlas[:, :, 3:]], 2)
    flat = atlas.flatten(0, 1)
    small = functional.interpolate(flat, size=(size, size), mode="bilinear", antialias=True)
    return small.clamp(0, 1).unflatten(0, atlas.shape[:2])


@dataclass
class Layout:
    """Where things are, one row a scene: object and style ids, top-left pixels, size, background id.

    `objects`, `styles`, `tops`, `lefts` are int64 (B, 2); the second slot is -1 in `objects` when the
    scene has one object. `sizes` and `backgrounds` are int64 (B,).
    """

    objects: Tensor
    styles: Tensor
    tops: Tensor
    lefts: Tensor
    sizes: Tensor
    backgrounds: Tensor

    def __len__(self) -> int:
        return len(self.sizes)


def paint(layout: Layout) -> Tensor:
    """Compose the pictures of a layout, float32 (B, 3, 32, 32) in [0, 1]."""
    palette = torch.tensor(list(COLORS.values()), dtype=torch.float32) / 255
    canvas = palette[layout.backgrounds][:, :, None, None].repeat(1, 1, IMAGE_SIZE, IMAGE_SIZE)
    for slot in range(2):
        for size in (SMALL, LARGE):
            rows = torch.nonzero((layout.sizes == size) & (layout.objects[:, slot] >= 0)).flatten()
            if len(rows) == 0:
                continue
            sprite = sprites(size)[layout.objects[rows, slot], layout.styles[rows, slot]]  # (R, 4, s, s)
            span = torch.arange(size)
            where = (
                rows[:, None, None],
                slice(None),
                (layout.tops[rows, slot][:, None] + span)[:, :, None],
                (layout.lefts[rows, slot][:, None] + span)[:, None, :],
            )
            under = canvas[where]  # (R, s, s, 3)
            alpha = sprite[:, 3:].permute(0, 2, 3, 1)
            canvas[where] = sprite[:, :3].permute(0, 2, 3, 1) + under * (1 - alpha)
    return canvas
