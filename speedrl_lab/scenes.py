"""EmojiScenes: captions whose pictures can be verified, composed on the fly.

A scene is one object, two of a kind, or two different objects in a relation, on a named background.
The caption never says which drawing style, size or position to use: those are what diversity is
measured on. This module holds the grammar, the deterministic split and what is drawn at random for a
caption; the compositor paints it. Neither knows anything of networks.
"""

import difflib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from speedrl_lab.compositor import (
    COLORS,
    DATA,
    IMAGE_SIZE,
    LARGE,
    OBJECTS,
    SMALL,
    STRIDE,
    STYLES,
    Layout,
    paint,
)

KINDS = ("one", "two", "and", "left", "above")
SPLITS = ("train", "validation", "test", "composition")

MAX_WORDS = 12
_PLURALS = {name: "fish" if name == "fish" else name + "s" for name in OBJECTS}
_SINGULARS = {plural: name for name, plural in _PLURALS.items()} | {"fishes": "fish"}
# "an" shares the id of "a", and "fishes" that of the plural "fish", written "fish+" here.
_GRAMMAR = ("a", "two", "and", "left", "of", "above", "on", "background")
WORDS = ("", *_GRAMMAR, *COLORS, *OBJECTS, *(name + "+" for name in OBJECTS))
_WORD_IDS = {word: index for index, word in enumerate(WORDS)}
_SURFACE = sorted({*_GRAMMAR, "an", *COLORS, *OBJECTS, *_SINGULARS})


@dataclass(frozen=True)
class Scene:
    """What a caption asks for: the kind, one or two objects, and a background or None."""

    kind: str
    objects: tuple[str, ...]
    background: str | None = None

    @property
    def counts(self) -> dict[str, int]:
        """How often each object must appear."""
        return {self.objects[0]: 2} if self.kind == "two" else dict.fromkeys(self.objects, 1)

    @property
    def caption(self) -> str:
        """The caption in words."""
        first = self.objects[0]
        text = f"two {_PLURALS[first]}" if self.kind == "two" else _article(first)
        if self.kind in ("and", "left", "above"):
            relation = {"and": "and", "left": "left of", "above": "above"}[self.kind]
            text = f"{text} {relation} {_article(self.objects[1])}"
        return text if self.background is None else f"{text} on a {self.background} background"


def _article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def parse_caption(caption: str) -> Scene:
    """Read a caption into a Scene; raises ValueError that names the nearest words or the forms."""
    words = caption.lower().split()
    for word in words:
        if word not in _SURFACE:
            nearest = difflib.get_close_matches(word, _SURFACE, n=3, cutoff=0.0)
            raise ValueError(f"unknown word {word!r} in caption {caption!r}; nearest words: {', '.join(nearest)}")
    background, body = None, words
    if len(words) >= 4 and words[-4] == "on" and words[-3] == "a" and words[-1] == "background":
        background, body = words[-2], words[:-4]
    match body:
        case ["two", plural] if plural in _SINGULARS:
            scene = Scene("two", (_SINGULARS[plural],), background)
        case ["a" | "an", first] if first in OBJECTS:
            scene = Scene("one", (first,), background)
        case ["a" | "an", first, "and" | "above" as kind, "a" | "an", second]:
            scene = Scene(kind, (first, second), background)
        case ["a" | "an", first, "left", "of", "a" | "an", second]:
            scene = Scene("left", (first, second), background)
        case _:
            scene = None
    known = scene is not None and (background is None or background in COLORS)
    if not known or any(name not in OBJECTS for name in scene.objects):
        raise ValueError(
            f"cannot read caption {caption!r}; forms: 'a dog', 'two dogs', 'a dog and a cat', "
            "'a dog left of a cat', 'a dog above a cat', each with or without 'on a red background'"
        )
    if len(scene.objects) == 2 and scene.objects[0] == scene.objects[1]:
        raise ValueError(f"caption {caption!r} names {scene.objects[0]!r} twice; write 'two ...' instead")
    return scene


def encode_captions(captions: Sequence[str]) -> Tensor:
    """Turn captions into word ids, int64 (B, MAX_WORDS), zero-padded; raises ValueError as parse_caption."""
    rows = torch.zeros(len(captions), MAX_WORDS, dtype=torch.int64)
    for row, caption in enumerate(captions):
        scene = parse_caption(caption)
        words = ["a" if word == "an" else word for word in scene.caption.split()]
        if scene.kind == "two":
            words[1] = scene.objects[0] + "+"
        rows[row, : len(words)] = torch.tensor([_WORD_IDS[word] for word in words])
    return rows


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def split_of(scene: Scene) -> str:
    """The split a caption belongs to, fixed by its words.

    `composition` holds every caption with a held-out pair of objects (26 of 276) or a held-out
    object-colour pair (10 of 192); the rest is 5% validation, 10% test, 85% train.
    """
    pairs = ["+".join(sorted(scene.objects))] if len(scene.objects) == 2 else []
    pairs += [f"{name}@{scene.background}" for name in scene.objects if scene.background]
    if any(_hash("pair:" + pair) % 10 == 0 for pair in pairs):
        return "composition"
    bucket = _hash("caption:" + scene.caption) % 20
    return {0: "validation", 1: "test", 2: "test"}.get(bucket, "train")


def all_scenes() -> Iterator[Scene]:
    """Every Scene of the grammar, in a fixed order."""
    for background in (None, *COLORS):
        for first in OBJECTS:
            yield Scene("one", (first,), background)
            yield Scene("two", (first,), background)
            for second in OBJECTS:
                if first != second:
                    for kind in ("and", "left", "above"):
                        yield Scene(kind, (first, second), background)


@cache
def _scenes_by_split() -> dict[tuple[str, str, bool], list[Scene]]:
    table: dict[tuple[str, str, bool], list[Scene]] = {}
    for scene in all_scenes():
        table.setdefault((split_of(scene), scene.kind, scene.background is not None), []).append(scene)
    return table


def draw_scenes(count: int, split: str, rng: torch.Generator) -> list[Scene]:
    """Draw scenes of a split: kinds equally likely, background mentioned in 70% where possible."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; splits: {', '.join(SPLITS)}")
    table = _scenes_by_split()
    uniforms = torch.rand(count, 3, generator=rng, dtype=torch.float64).tolist()
    scenes = []
    for which_kind, which_background, which_scene in uniforms:
        kind = KINDS[int(which_kind * len(KINDS))]
        mentioned = which_background < 0.7
        pool = table.get((split, kind, mentioned)) or table.get((split, kind, not mentioned))
        scenes.append(pool[int(which_scene * len(pool))])
    return scenes


def load_prompts(split: str = "test", count: int | None = None) -> list[str]:
    """Read the committed prompts of a split, all or the first `count`; raises ValueError if too few."""
    path = DATA / "emoji_scenes" / "prompts" / f"{split}.txt"
    if split not in SPLITS:
        nearest = difflib.get_close_matches(split, SPLITS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown split {split!r}; nearest: {nearest!r}")
    prompts = path.read_text().splitlines()
    if count is not None and not 0 < count <= len(prompts):
        raise ValueError(f"asked for {count} {split} prompts; {path.name} holds {len(prompts)}")
    return prompts[:count]


def object_slots(scenes: Sequence[Scene]) -> Tensor:
    """Object ids of both slots as in `compositor.Layout`, int64 (B, 2); -1 where a scene has one object."""
    objects = torch.full((len(scenes), 2), -1)
    for row, scene in enumerate(scenes):
        names = scene.objects * 2 if scene.kind == "two" else scene.objects
        objects[row, : len(names)] = torch.tensor([OBJECTS.index(name) for name in names])
    return objects


def draw_layouts(scenes: Sequence[Scene], rng: torch.Generator) -> Layout:
    """Choose at random what the captions leave open: style, size, position, unnamed background."""
    count, cells = len(scenes), (IMAGE_SIZE - SMALL) // STRIDE + 1
    far = IMAGE_SIZE - SMALL

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=rng)

    kinds = torch.tensor([KINDS.index(scene.kind) for scene in scenes])
    single = kinds == KINDS.index("one")
    objects = object_slots(scenes)
    sizes = torch.where(single & (integers(2, count) == 1), LARGE, SMALL)
    # Two small sprites do not overlap exactly when they touch opposite borders along one axis.
    horizontal = torch.where(
        kinds == KINDS.index("left"), True, (kinds != KINDS.index("above")) & (integers(2, count) == 1)
    )
    swap = (kinds != KINDS.index("left")) & (kinds != KINDS.index("above")) & (integers(2, count) == 1)
    opposite = torch.tensor([0, far]).expand(count, 2)
    opposite = torch.where(swap[:, None], opposite.flip(1), opposite)  # (B, 2)
    free = integers(cells, count, 2) * STRIDE
    lefts = torch.where(horizontal[:, None], opposite, free)
    tops = torch.where(horizontal[:, None], free, opposite)
    alone = torch.rand(count, 2, generator=rng) * ((IMAGE_SIZE - sizes) // STRIDE + 1)[:, None]
    alone = alone.long() * STRIDE  # (B, 2)
    lefts[:, 0] = torch.where(single, alone[:, 0], lefts[:, 0])
    tops[:, 0] = torch.where(single, alone[:, 1], tops[:, 0])
    named = [-1 if scene.background is None else list(COLORS).index(scene.background) for scene in scenes]
    backgrounds = torch.tensor(named)
    backgrounds = torch.where(backgrounds < 0, integers(len(COLORS), count), backgrounds)
    return Layout(objects, integers(len(STYLES), count, 2), tops, lefts, sizes, backgrounds)


def real_pictures(captions: Sequence[str], rng: torch.Generator) -> Tensor:
    """A real scene of each caption, float32 (B, 3, 32, 32) in [0, 1]: `draw_layouts`, painted.

    Raises ValueError as parse_caption.
    """
    return paint(draw_layouts([parse_caption(caption) for caption in captions], rng))


def draw_batch(count: int, split: str, seed: int) -> tuple[list[Scene], Layout, Tensor]:
    """Draw `count` scenes with layouts and pictures from one seed: (scenes, layout, images)."""
    rng = torch.Generator().manual_seed(seed)
    scenes = draw_scenes(count, split, rng)
    layout = draw_layouts(scenes, rng)
    return scenes, layout, paint(layout)


def answers(layout: Layout) -> tuple[Tensor, Tensor]:
    """What a detector must say: counts int64 (B, objects) in 0..2, and centres (B, objects, 2).

    Centres are (x, y) in [0, 1]; they are meaningful where the count is 1.
    """
    counts = torch.zeros(len(layout), len(OBJECTS), dtype=torch.int64)
    centers = torch.zeros(len(layout), len(OBJECTS), 2)
    for slot in range(2):
        rows = torch.nonzero(layout.objects[:, slot] >= 0).flatten()
        objects = layout.objects[rows, slot]
        counts[rows, objects] += 1
        middle = torch.stack([layout.lefts[rows, slot], layout.tops[rows, slot]], 1)
        centers[rows, objects] = (middle + layout.sizes[rows, None] / 2) / IMAGE_SIZE
    return counts, centers


def alter(scene: Scene, rng: torch.Generator) -> Scene:
    """A caption that differs in one respect: an object, the background, the order, or the count.

    It may belong to any split: it serves as the wrong caption of a picture, never as one to draw.
    """
    choice, other, color = torch.randint(1 << 30, (3,), generator=rng).tolist()
    rest = [name for name in OBJECTS if name not in scene.objects]
    replaced = rest[other % len(rest)]
    colors = [name for name in COLORS if name != scene.background]
    options = [Scene(scene.kind, (replaced, *scene.objects[1:]), scene.background)]
    if scene.background is not None:
        options.append(Scene(scene.kind, scene.objects, colors[color % len(colors)]))
    if scene.kind in ("left", "above"):
        options.append(Scene(scene.kind, scene.objects[::-1], scene.background))
    if len(scene.objects) == 2:
        options.append(Scene(scene.kind, (scene.objects[0], replaced), scene.background))
    else:
        options.append(Scene({"one": "two", "two": "one"}[scene.kind], scene.objects, scene.background))
    return options[choice % len(options)]


def wanted_counts(captions: Sequence[str]) -> Tensor:
    """How often each object must appear, int64 (B, objects); raises ValueError as parse_caption."""
    counts = torch.zeros(len(captions), len(OBJECTS), dtype=torch.int64)
    for row, caption in enumerate(captions):
        for name, count in parse_caption(caption).counts.items():
            counts[row, OBJECTS.index(name)] = count
    return counts
