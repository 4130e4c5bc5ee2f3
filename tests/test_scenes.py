"""EmojiScenes: grammar, splits and pictures, through public names and against slow loops."""

import re
from collections import Counter

import numpy as np
import pytest
import torch

from speedrl_lab import compositor, scenes
from speedrl_lab.scenes import Scene


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_caption_round_trips():
    everything = list(scenes.all_scenes())
    assert len(everything) == len({scene.caption for scene in everything}) == 9 * 24 * (2 + 23 * 3)
    for scene in everything:
        assert scenes.parse_caption(scene.caption) == scene


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a dog", Scene("one", ("dog",))),
        ("two dogs on a red background", Scene("two", ("dog",), "red")),
        ("two fish", Scene("two", ("fish",))),
        ("two fishes", Scene("two", ("fish",))),
        ("A Dog left OF a cat", Scene("left", ("dog", "cat"))),
        ("  an apple   above an umbrella  ", Scene("above", ("apple", "umbrella"))),
        ("a key and a cake on a gray background", Scene("and", ("key", "cake"), "gray")),
    ],
)
def test_parse_caption_reads_every_form(caption, expected):
    assert scenes.parse_caption(caption) == expected


def test_an_unknown_word_names_the_nearest_words():
    with pytest.raises(ValueError, match=r"unknown word 'dgo' in caption 'two dgo'; nearest words: .*\bdog"):
        scenes.parse_caption("two dgo")
    with pytest.raises(ValueError, match="unknown word 'purpel'.*nearest words: purple"):
        scenes.parse_caption("a dog on a purpel background")


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "dog",
        "a dogs",
        "two dog",
        "two dogs and a cat",
        "a dog a cat",
        "a dog left a cat",
        "a dog of a cat",
        "a dog above",
        "a red",
        "a dog and a red",
        "a dog on a red",
        "a dog on a cat background",
        "a dog on red background",
        "on a red background",
        "a dog on a red background on a blue background",
    ],
)
def test_a_malformed_caption_names_the_forms(caption):
    with pytest.raises(ValueError, match=f"cannot read caption {re.escape(repr(caption))}; forms: 'a dog'"):
        scenes.parse_caption(caption)


def test_an_object_named_twice_is_refused():
    with pytest.raises(ValueError, match="names 'dog' twice; write 'two ...'"):
        scenes.parse_caption("a dog and a dog")


def test_encode_captions_ignores_surface_and_separates_meaning():
    ids = scenes.encode_captions(["an apple", "a apple", "A APPLE", "two fish", "two fishes", "a fish"])
    assert ids.shape == (6, scenes.MAX_WORDS) and ids.dtype == torch.int64
    assert torch.equal(ids[0], ids[1]) and torch.equal(ids[0], ids[2])
    assert torch.equal(ids[3], ids[4]) and ids[3, 1] != ids[5, 1]  # the plural has an id of its own
    everything = scenes.encode_captions([scene.caption for scene in scenes.all_scenes()])
    assert len(everything.unique(dim=0)) == len(everything)
    assert everything.max() < len(scenes.WORDS) and everything.min() == 0
    words = (everything > 0).long()
    assert (words.diff(dim=1) <= 0).all()  # padding only at the end, whose id 0 is no word's


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="unknown split 'trian'; splits: train, validation"):
        scenes.draw_scenes(1, "trian", generator())


def test_splits_are_stable():
    counts = Counter(scenes.split_of(scene) for scene in scenes.all_scenes())
    assert counts == {"train": 10801, "composition": 2618, "test": 1274, "validation": 643}
    examples = {
        "train": "a dog and a cat on a white background",
        "validation": "a dog and a banana on a white background",
        "test": "a dog above a cat on a white background",
        "composition": "a dog and a heart on a white background",
    }
    for split, caption in examples.items():
        assert scenes.split_of(scenes.parse_caption(caption)) == split


def combinations(scene: Scene) -> set:
    """The pair of objects and the object-colour pairs that a caption brings together."""
    pair = {frozenset(scene.objects)} if len(scene.objects) == 2 else set()
    return pair | {(name, scene.background) for name in scene.objects if scene.background}


def held_out_combinations() -> set:
    """Combinations of which every caption is in the composition split."""
    seen, elsewhere = set(), set()
    for scene in scenes.all_scenes():
        seen |= combinations(scene)
        if scenes.split_of(scene) != "composition":
            elsewhere |= combinations(scene)
    return seen - elsewhere


def test_compositions_are_held_out_of_every_other_split():
    held_out = held_out_combinations()
    pairs = [item for item in held_out if isinstance(item, frozenset)]
    colored = [item for item in held_out if isinstance(item, tuple)]
    assert (len(pairs), len(colored)) == (26, 10)  # of 276 and of 192
    for split in ("train", "validation", "test"):
        drawn = scenes.draw_scenes(2000, split, generator())
        assert all(scenes.split_of(scene) == split for scene in drawn)
        assert not any(combinations(scene) & held_out for scene in drawn)
    composed = scenes.draw_scenes(500, "composition", generator())
    assert all(combinations(scene) & held_out for scene in composed)


def test_draw_scenes_mixes_kinds_and_backgrounds():
    drawn = scenes.draw_scenes(4000, "train", generator())
    kinds = Counter(scene.kind for scene in drawn)
    assert set(kinds) == set(scenes.KINDS) and all(abs(kinds[kind] / 4000 - 0.2) < 0.03 for kind in kinds)
    assert abs(sum(scene.background is not None for scene in drawn) / 4000 - 0.7) < 0.03


@pytest.fixture(scope="module")
def batch():
    return scenes.draw_batch(1000, "train", seed=0)


def test_objects_stay_inside_and_apart_on_the_grid(batch):
    _, layout, _ = batch
    pairs = layout.objects[:, 1] >= 0
    for slot, rows in ((0, torch.ones_like(pairs)), (1, pairs)):
        for starts in (layout.tops[rows, slot], layout.lefts[rows, slot]):
            assert (starts >= 0).all() and (starts + layout.sizes[rows] <= compositor.IMAGE_SIZE).all()
            assert (starts % compositor.STRIDE == 0).all()
    assert (layout.sizes[pairs] == compositor.SMALL).all()
    assert set(layout.sizes[~pairs].tolist()) == {compositor.SMALL, compositor.LARGE}
    down = (layout.tops[pairs, 0] - layout.tops[pairs, 1]).abs()
    across = (layout.lefts[pairs, 0] - layout.lefts[pairs, 1]).abs()
    assert (torch.maximum(down, across) >= compositor.SMALL).all()


def test_layouts_show_what_the_captions_say(batch):
    drawn, layout, _ = batch
    seen = set()
    for row, scene in enumerate(drawn):
        objects = tuple(scenes.OBJECTS[index] for index in layout.objects[row].tolist() if index >= 0)
        assert objects == (scene.objects * 2 if scene.kind == "two" else scene.objects)
        if scene.kind == "left":
            assert layout.lefts[row, 0] + compositor.SMALL <= layout.lefts[row, 1]
        if scene.kind == "above":
            assert layout.tops[row, 0] + compositor.SMALL <= layout.tops[row, 1]
        if scene.kind == "and":
            seen.add(
                (
                    int(layout.tops[row, 1] > layout.tops[row, 0]),
                    int(layout.lefts[row, 1] > layout.lefts[row, 0]),
                )
            )
        if scene.background is not None:
            assert list(scenes.COLORS)[layout.backgrounds[row]] == scene.background
    assert len(seen) == 4  # "and" fixes no relation


def test_layouts_use_everything_the_captions_leave_open():
    one = scenes.draw_layouts([Scene("one", ("dog",))] * 1500, generator())
    chosen = zip(one.sizes.tolist(), one.tops[:, 0].tolist(), one.lefts[:, 0].tolist(), strict=True)
    assert len(set(chosen)) == 25 + 9  # all places of both sizes
    assert len(one.backgrounds.unique()) == 8 and len(one.styles[:, 0].unique()) == 3
    two = scenes.draw_layouts([Scene("two", ("dog",))] * 300, generator())
    assert len(two.styles.unique(dim=0)) == 9  # the two may differ in style


def test_paint_agrees_with_a_loop_over_pixels():
    drawn, layout, images = scenes.draw_batch(10, "train", seed=4)
    assert len({scene.kind for scene in drawn}) >= 4 and compositor.LARGE in layout.sizes
    assert images.shape == (10, 3, 32, 32) and images.dtype == torch.float32
    palette = list(scenes.COLORS.values())
    for row in range(len(drawn)):
        color = np.array(palette[layout.backgrounds[row]]) / 255
        picture = np.tile(color[:, None, None], (1, 32, 32))
        for slot in range(2):
            if layout.objects[row, slot] < 0:
                continue
            size = int(layout.sizes[row])
            sprite = compositor.sprites(size)[layout.objects[row, slot], layout.styles[row, slot]].numpy()
            top, left = int(layout.tops[row, slot]), int(layout.lefts[row, slot])
            for y in range(size):
                for x in range(size):
                    *rgb, alpha = sprite[:, y, x]
                    for channel in range(3):
                        under = picture[channel, top + y, left + x]
                        picture[channel, top + y, left + x] = rgb[channel] + under * (1 - alpha)
        np.testing.assert_allclose(images[row].numpy(), picture, atol=1e-6)


def test_pictures_are_in_range_and_show_their_objects(batch):
    _, layout, images = batch
    assert images.min() >= 0 and images.max() <= 1 + 1e-6
    plain = torch.tensor(list(scenes.COLORS.values()))[layout.backgrounds] / 255
    touched = ((images - plain[:, :, None, None]).abs().amax(1) > 0.05).sum((1, 2))
    assert (touched > 20).all()


def test_the_seed_alone_decides_the_pictures():
    state = torch.get_rng_state()
    _, _, first = scenes.draw_batch(16, "train", seed=7)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(5)  # another global state
    _, _, again = scenes.draw_batch(16, "train", seed=7)
    _, _, other = scenes.draw_batch(16, "train", seed=8)
    assert torch.equal(first, again)
    assert (first != other).flatten(1).any(1).all()


@pytest.mark.parametrize("size", [compositor.SMALL, compositor.LARGE])
def test_sprites_are_premultiplied_and_distinct(size):
    sprites = compositor.sprites(size)
    assert sprites.shape == (24, 3, 4, size, size) and sprites.dtype == torch.float32
    assert (sprites[:, :, :3] <= sprites[:, :, 3:] + 1e-6).all()
    assert (sprites[:, :, 3].mean((2, 3)) > 0.1).all()  # none is empty
    flat = sprites.flatten(2).flatten(0, 1)
    distance = torch.cdist(flat, flat) + torch.eye(72) * 1e3
    assert distance.min() > 1  # no two objects or styles look alike


def test_answers_match_captions_and_layouts(batch):
    drawn, layout, _ = batch
    counts, centers = scenes.answers(layout)
    for row, scene in enumerate(drawn):
        assert counts[row].tolist() == [scene.counts.get(name, 0) for name in scenes.OBJECTS]
        if scene.kind == "two":
            continue  # two of a kind have no single centre
        for slot, name in enumerate(scene.objects):
            half = int(layout.sizes[row]) / 2
            expected = [(int(layout.lefts[row, slot]) + half) / 32, (int(layout.tops[row, slot]) + half) / 32]
            assert centers[row, scenes.OBJECTS.index(name)].tolist() == pytest.approx(expected)


def meaning(scene: Scene) -> tuple:
    """What can be seen of a caption: counts, background, and the order where the caption gives one."""
    order = (scene.kind, scene.objects) if scene.kind in ("left", "above") else None
    return scene.counts, scene.background, order


def test_alter_always_asks_for_something_else():
    rng = generator()
    changes = Counter()
    for scene in scenes.draw_scenes(1500, "train", generator(1)):
        altered = scenes.alter(scene, rng)
        assert scenes.parse_caption(altered.caption) == altered  # still within the grammar
        differs = [a != b for a, b in zip(meaning(scene), meaning(altered), strict=True)]
        assert any(differs), f"{scene.caption} -> {altered.caption}"
        changes[tuple(differs)] += 1
    assert {(True, False, False), (False, True, False), (False, False, True)} <= set(changes)
