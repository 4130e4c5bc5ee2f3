"""Judges of EmojiScenes pictures.

No reward reads what they say, but for the nearest scene, from which `variety` and `balance` are reckoned.
The nearest valid scene says whether a picture is crisp and legal, the detector's verdict whether it
shows what the caption asks for, diversity and layout entropy how much of what the caption leaves open is
still used. Distances between sets of pictures: `distances`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from speedrl_lab.compositor import COLORS, IMAGE_SIZE, LARGE, OBJECTS, SMALL, STRIDE, Layout, paint, sprites
from speedrl_lab.networks import Detector
from speedrl_lab.scenes import DATA, Scene, object_slots, parse_caption
from speedrl_lab.weights import load_weights

CHUNK = 64  # rows searched at once, to bound the memory
BATCH = 256  # pictures read by the detector at once
MIN_MSE = 1e-10  # a perfect picture has a PSNR of 100 dB


@dataclass(frozen=True)
class NearestScene:
    """The best-matching valid scene of each picture; columns are named as in `compositor.Layout`.

    `psnr` is float32 (B,) in dB, at most 100. `styles`, `tops`, `lefts` are int64 (B, 2), with -1 in
    the second slot where the caption has one object; `sizes` and `backgrounds` are int64 (B,). The
    slots of "two ..." are sorted by position, because swapping them changes nothing in the picture.
    """

    psnr: Tensor
    styles: Tensor
    sizes: Tensor
    tops: Tensor
    lefts: Tensor
    backgrounds: Tensor

    def paint(self, prompts: Sequence[str]) -> Tensor:
        """These scenes as clean pictures, float32 (B, 3, 32, 32) in [0, 1]; `prompts` says what is in them."""
        objects = object_slots(_parse(prompts, len(self.sizes)))
        return paint(Layout(objects, self.styles, self.tops, self.lefts, self.sizes, self.backgrounds))


def nearest_scene(images: Tensor, prompts: Sequence[str]) -> NearestScene:
    """Compare images (B, 3, 32, 32) in [0, 1] with every valid scene of their captions.

    Exhaustive over style, size, position and unnamed background, by mean squared error. Raises
    ValueError if there is not one prompt an image, or as parse_caption.
    """
    parsed = _parse(prompts, len(images))
    pixels = images.detach().cpu().double()  # differences of large sums: float32 would lose small errors
    error = torch.zeros(len(parsed), dtype=torch.float64)
    found = torch.zeros(len(parsed), 8, dtype=torch.int64)
    ones = [row for row, scene in enumerate(parsed) if scene.kind == "one"]
    pairs = [row for row, scene in enumerate(parsed) if scene.kind != "one"]
    for search, members in ((_search_one, ones), (_search_pair, pairs)):
        for start in range(0, len(members), CHUNK):
            rows = members[start : start + CHUNK]
            error[rows], found[rows] = search(pixels[rows], [parsed[row] for row in rows])
    psnr = -10 * (error / images[0].numel()).clamp(min=MIN_MSE).log10()
    styles, sizes, tops, lefts, backgrounds = found.split((2, 1, 2, 2, 1), 1)
    return NearestScene(psnr.float(), styles, sizes.flatten(), tops, lefts, backgrounds.flatten())


def _parse(prompts: Sequence[str], count: int) -> list[Scene]:
    if len(prompts) != count:
        raise ValueError(f"got {len(prompts)} prompts for {count} rows; give one prompt a row")
    return [parse_caption(prompt) for prompt in prompts]


def _palette() -> Tensor:
    return torch.tensor(list(COLORS.values()), dtype=torch.float32).double() / 255  # (C, 3)


def _corners(size: int) -> tuple[Tensor, Tensor]:
    """Tops and lefts (P,) of every place a sprite can take, in raster order."""
    starts = torch.arange(0, IMAGE_SIZE - size + 1, STRIDE)
    tops, lefts = torch.meshgrid(starts, starts, indexing="ij")
    return tops.flatten(), lefts.flatten()


def _plain_error(images: Tensor, parsed: Sequence[Scene]) -> Tensor:
    """Squared error (B, C) of each plain background, infinite where the caption names another."""
    error = (images[:, None] - _palette()[:, :, None, None]).square().sum((2, 3, 4))
    named = [-1 if scene.background is None else list(COLORS).index(scene.background) for scene in parsed]
    named = torch.tensor(named)[:, None]  # (B, 1)
    allowed = (named < 0) | (named == torch.arange(len(COLORS)))
    return error.masked_fill(~allowed, torch.inf)


def _best_styles(images: Tensor, names: Sequence[str], size: int) -> tuple[Tensor, Tensor]:
    """What one sprite adds to the squared error of a plain background, in its best style, and that style.

    Both (B, C, P): background and place. With x the picture, p the plain background and d what the
    sprite adds to it, |x - p - d|^2 - |x - p|^2 = d (d + 2p) - 2dx, summed over the sprite's box.
    """
    sprite = sprites(size).double()[[OBJECTS.index(name) for name in names]].flatten(3)  # (B, S, 4, s*s)
    plain = _palette()[:, None, :, None]  # (C, 1, 3, 1)
    added = sprite[:, None, :, :3] - sprite[:, None, :, 3:] * plain  # (B, C, S, 3, s*s)
    own = (added * (added + 2 * plain)).sum((3, 4))  # (B, C, S)
    boxes = functional.unfold(images, size, stride=STRIDE)  # (B, 3*s*s, P)
    cross = added.flatten(3).flatten(1, 2) @ boxes  # (B, C*S, P)
    gains = own[..., None] - 2 * cross.unflatten(1, own.shape[1:])  # (B, C, S, P)
    return gains.min(2)


def _search_one(images: Tensor, parsed: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Least squared error (B,) over one-object scenes, and [styles, size, tops, lefts, background] (B, 8)."""
    names = [scene.objects[0] for scene in parsed]
    by_size = [_best_styles(images, names, size) for size in (SMALL, LARGE)]
    gains, styles = (torch.cat(parts, 2) for parts in zip(*by_size, strict=True))  # (B, C, P16 + P24)
    places = [(size, *place) for size in (SMALL, LARGE) for place in zip(*_corners(size), strict=True)]
    error = (_plain_error(images, parsed)[:, :, None] + gains).flatten(1)
    least, index = error.min(1)
    background, place = index // gains.shape[2], index % gains.shape[2]
    size, top, left = torch.tensor(places)[place].unbind(1)
    style = styles.flatten(1).gather(1, index[:, None])[:, 0]
    none = torch.full_like(top, -1)
    return least, torch.stack([style, none, size, top, none, left, none, background], 1)


def _search_pair(images: Tensor, parsed: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """As `_search_one` over two sprites; they never overlap, so that their errors add up."""
    tops, lefts = _corners(SMALL)
    first, first_styles = _best_styles(images, [scene.objects[0] for scene in parsed], SMALL)  # (B, C, P)
    second, second_styles = _best_styles(images, [scene.objects[-1] for scene in parsed], SMALL)
    legal = _legal_pairs()
    legal = torch.stack([legal[scene.kind] for scene in parsed])  # (B, P, P)
    error = _plain_error(images, parsed)[:, :, None, None] + first[..., None] + second[:, :, None]
    error = error.masked_fill(~legal[:, None], torch.inf).flatten(1)  # (B, C*P*P)
    least, index = error.min(1)
    count = len(tops)
    background, place1, place2 = index // count**2, index // count % count, index % count
    rows = torch.arange(len(parsed))
    style1, style2 = first_styles[rows, background, place1], second_styles[rows, background, place2]
    size = torch.full_like(index, SMALL)
    columns = [style1, style2, size, tops[place1], tops[place2], lefts[place1], lefts[place2], background]
    return least, torch.stack(columns, 1)


def _legal_pairs() -> dict[str, Tensor]:
    """Which places (P, P) the two sprites of each kind may take: at opposite borders, as drawn."""
    tops, lefts = _corners(SMALL)
    far = IMAGE_SIZE - SMALL
    left = lefts[None] - lefts[:, None] == far  # the first at the left border, the second at the right
    above = tops[None] - tops[:, None] == far
    either = left | left.T | above | above.T
    return {"left": left, "above": above, "and": either, "two": either.triu()}


def diversity(features: Tensor, group_size: int) -> Tensor:
    """Mean pairwise Euclidean distance (P,) within each group of features (B, F), rows group-major."""
    _check_groups(len(features), group_size)
    groups = features.unflatten(0, (-1, group_size))  # (P, G, F)
    distances = torch.cdist(groups, groups, compute_mode="donot_use_mm_for_euclid_dist")  # (P, G, G)
    return distances.sum((1, 2)) / (group_size * (group_size - 1))


def _check_groups(count: int, group_size: int) -> None:
    if group_size < 2 or count % group_size:
        raise ValueError(f"group_size {group_size} for {count} rows; it must divide them and be at least 2")


def layout_entropies(nearest: NearestScene, prompts: Sequence[str], group_size: int) -> dict[str, Tensor]:
    """Entropy within each group, in nats, of each thing that the captions leave open: float64 (P,) each.

    Keys: style and position (of a sprite, averaged over the caption's sprites), size (captions of one
    object), background (where unnamed); NaN where the caption does not leave it open. `prompts` has one
    entry a row, rows are group-major. At most log(group_size); for two samples, log 2 times whether they
    differ, so that its mean over groups does not depend on how many were drawn.
    """
    parsed = _parse(prompts, len(nearest.psnr))
    _check_groups(len(parsed), group_size)
    if any(parsed[row] != parsed[row - row % group_size] for row in range(len(parsed))):
        raise ValueError(f"prompts change inside a group; repeat each prompt group_size={group_size} times")
    single = torch.tensor([scene.kind == "one" for scene in parsed[::group_size]])  # (P,)
    named = torch.tensor([scene.background is not None for scene in parsed[::group_size]])

    def within(values: Tensor) -> Tensor:
        return _entropy(values.unflatten(0, (-1, group_size)))

    def per_sprite(values: Tensor) -> Tensor:
        first, second = (within(values[:, slot]) for slot in range(2))
        return torch.where(single, first, (first + second) / 2)

    return {
        "style": per_sprite(nearest.styles),
        "size": within(nearest.sizes).masked_fill(~single, torch.nan),
        "position": per_sprite(nearest.tops * IMAGE_SIZE + nearest.lefts),
        "background": within(nearest.backgrounds).masked_fill(named, torch.nan),
    }


def layout_entropy(nearest: NearestScene, prompts: Sequence[str], group_size: int) -> dict[str, float]:
    """Means over the groups of `layout_entropies`; NaN if no caption leaves a thing open."""
    found = layout_entropies(nearest, prompts, group_size)
    return {name: values.nanmean().item() for name, values in found.items()}


def _entropy(values: Tensor) -> Tensor:
    """Entropy (P,) in nats of the values (P, G) found in each group."""
    share = (values[:, :, None] == values[:, None, :]).double().mean(2)  # of its own value, (P, G)
    return -share.log().mean(1)


@lru_cache(maxsize=2)
def load_second_detector(device: torch.device | str = "cpu") -> Detector:
    """The committed second detector: other data order, width and augmentation than the first, in no reward."""
    return load_weights(DATA / "weights" / "detector2.safetensors", "Detector").to(device)


@torch.no_grad()
def verdict(detector: Detector, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """What the detector says of images (B, 3, 32, 32) in [0, 1]: bool (B,) as `check_answers`."""
    _parse(prompts, len(images))
    device = next(detector.parameters()).device
    parts = [detector(batch.to(device)) for batch in images.split(BATCH)]
    counts, colors, centers = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return check_answers(counts.argmax(-1), colors.argmax(-1), centers, prompts)


def check_answers(counts: Tensor, colors: Tensor, centers: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Compare counts (B, O), background ids (B,) and centres (B, O, 2) with what the captions ask for.

    Returns bool (B,) each: `counts` (all objects exactly right), `color` (the named background; True
    where unnamed) and `relation` (left, above: both objects once and their centres in order; other
    captions: as `counts`).
    """
    result = {"counts": [], "color": [], "relation": []}
    for row, scene in enumerate(_parse(prompts, len(counts))):
        wanted = [scene.counts.get(name, 0) for name in OBJECTS]
        exact = counts[row].tolist() == wanted
        related = exact
        if scene.kind in ("left", "above"):
            ids = [OBJECTS.index(name) for name in scene.objects]
            first, second = centers[row, ids, 0 if scene.kind == "left" else 1].tolist()
            related = counts[row, ids].tolist() == [1, 1] and first < second
        named = scene.background is None or list(COLORS)[int(colors[row])] == scene.background
        for key, value in (("counts", exact), ("color", named), ("relation", related)):
            result[key].append(value)
    return {key: torch.tensor(values) for key, values in result.items()}
