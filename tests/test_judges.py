"""The judges against slow oracles, true answers of real scenes, and deliberately broken ones."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from speedrl_lab import compositor, distances, judges, scenes
from speedrl_lab.networks import Detector
from speedrl_lab.rewards.embedded import load_detector

CAPTIONS = [
    "a dog",
    "an umbrella on a red background",
    "two cats on a gray background",
    "a key and a cake on a white background",
    "a frog left of a boat on a yellow background",
    "a pizza above a clock on a black background",
    "a star left of a pig",
]


def every_layout(caption: str) -> compositor.Layout:
    """All layouts that draw_layouts can draw for a caption, by plain loops."""
    scene = scenes.parse_caption(caption)
    names = scene.objects * 2 if scene.kind == "two" else scene.objects
    objects = [scenes.OBJECTS.index(name) for name in names]
    colors = list(scenes.COLORS)
    backgrounds = range(8) if scene.background is None else [colors.index(scene.background)]
    if scene.kind == "one":
        places = [
            ((top, 0), (left, 0), size)
            for size in (16, 24)
            for top in range(0, 33 - size, 4)
            for left in range(0, 33 - size, 4)
        ]
    else:
        free = list(itertools.product(range(0, 17, 4), repeat=2))
        borders = [(0, 16)] if scene.kind in ("left", "above") else [(0, 16), (16, 0)]
        horizontal = [(pair, border, 16) for pair in free for border in borders]
        vertical = [(border, pair, 16) for pair in free for border in borders]
        places = {"left": horizontal, "above": vertical}.get(scene.kind, horizontal + vertical)
    styles = list(itertools.product(range(3), repeat=len(objects)))
    rows = list(itertools.product(places, styles, backgrounds))
    return compositor.Layout(
        objects=torch.tensor([(objects + [-1])[:2]] * len(rows)),
        styles=torch.tensor([(*style, 0)[:2] for _, style, _ in rows]),
        tops=torch.tensor([place[0] for place, _, _ in rows]),
        lefts=torch.tensor([place[1] for place, _, _ in rows]),
        sizes=torch.tensor([place[2] for place, _, _ in rows]),
        backgrounds=torch.tensor([background for _, _, background in rows]),
    )


def blurred_and_noisy(caption: str) -> Tensor:
    """A few pictures near and far from the valid scenes of a caption (5, 3, 32, 32)."""
    rng = torch.Generator().manual_seed(3)
    real = compositor.paint(scenes.draw_layouts([scenes.parse_caption(caption)] * 2, rng))
    noise = torch.rand(3, 3, 32, 32, generator=rng)
    return torch.cat([real.lerp(noise[:2], 0.3), real.mean(0, keepdim=True), noise[2:], real.flip(3)[:1]])


@pytest.mark.parametrize("caption", CAPTIONS)
def test_nearest_scene_finds_the_minimum_over_all_painted_scenes(caption):
    images = blurred_and_noisy(caption)
    nearest = judges.nearest_scene(images, [caption] * len(images))
    layouts = every_layout(caption)
    painted = compositor.paint(layouts)
    for row, image in enumerate(images):
        errors = (painted - image).double().square().mean((1, 2, 3))
        assert nearest.psnr[row].item() == pytest.approx(-10 * errors.min().log10().item(), abs=1e-4)
        found = compositor.Layout(
            layouts.objects[:1],
            nearest.styles[row : row + 1],
            nearest.tops[row : row + 1],
            nearest.lefts[row : row + 1],
            nearest.sizes[row : row + 1],
            nearest.backgrounds[row : row + 1],
        )
        error = (compositor.paint(found)[0] - image).double().square().mean()
        assert error.item() == pytest.approx(errors.min().item(), rel=1e-5)  # the layout is the minimum's


def test_nearest_scene_recovers_real_scenes():
    drawn, layout, images = scenes.draw_batch(96, "train", seed=1)
    nearest = judges.nearest_scene(images, [scene.caption for scene in drawn])
    assert nearest.psnr.min() > 60
    assert torch.equal(nearest.sizes, layout.sizes)
    assert torch.equal(nearest.backgrounds, layout.backgrounds)
    for row, scene in enumerate(drawn):
        slots = range(1 if scene.kind == "one" else 2)
        true = [(layout.tops[row, k], layout.lefts[row, k], layout.styles[row, k]) for k in slots]
        found = [(nearest.tops[row, k], nearest.lefts[row, k], nearest.styles[row, k]) for k in slots]
        true, found = ([tuple(map(int, place)) for place in places] for places in (true, found))
        assert found == (sorted(true) if scene.kind == "two" else true)
        assert scene.kind != "one" or nearest.styles[row, 1] == -1


def test_two_of_a_kind_are_sorted_by_position():
    images = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    nearest = judges.nearest_scene(images, ["two dogs"] * 64)
    places = nearest.tops * compositor.IMAGE_SIZE + nearest.lefts
    assert (places[:, 0] < places[:, 1]).all()


def test_nearest_scene_punishes_what_the_caption_does_not_allow():
    rng = torch.Generator().manual_seed(0)
    images = compositor.paint(scenes.draw_layouts([scenes.parse_caption("a dog left of a cat")] * 8, rng))
    wrong = ["a cat left of a dog", "a dog above a cat", "two dogs", "a dog", "a dog left of a pig"]
    for caption in wrong:
        assert judges.nearest_scene(images, [caption] * 8).psnr.max() < 40, caption
    smeared = images.lerp(images.mean((2, 3), keepdim=True), 0.2)
    caption = "a dog left of a cat"
    assert (judges.nearest_scene(smeared, [caption] * 8).psnr < 40).all()


def test_nearest_scene_refuses_other_numbers_of_prompts():
    with pytest.raises(ValueError, match="1 prompts for 2 rows"):
        judges.nearest_scene(torch.zeros(2, 3, 32, 32), ["a dog"])


def test_diversity_equals_a_loop_over_pairs():
    features = torch.randn(3 * 4, 7, generator=torch.Generator().manual_seed(0))
    distances = judges.diversity(features, group_size=4)
    for prompt in range(3):
        group = features[prompt * 4 : prompt * 4 + 4]
        pairs = [(a - b).norm().item() for a, b in itertools.combinations(group, 2)]
        assert distances[prompt].item() == pytest.approx(sum(pairs) / 6, rel=1e-5)
    assert torch.equal(judges.diversity(features[:1].repeat(4, 1), 4), torch.zeros(1))


@pytest.mark.parametrize("group_size", [1, 5])
def test_groups_must_be_whole_and_have_pairs(group_size):
    with pytest.raises(ValueError, match=f"group_size {group_size} for 6 rows"):
        judges.diversity(torch.zeros(6, 2), group_size)


def nearest_of(rows: list[tuple]) -> judges.NearestScene:
    """A NearestScene from rows of (styles, size, tops, lefts, background)."""
    styles, sizes, tops, lefts, backgrounds = (torch.tensor(column) for column in zip(*rows, strict=True))
    return judges.NearestScene(torch.zeros(len(rows)), styles, sizes, tops, lefts, backgrounds)


def test_layout_entropy_counts_what_is_left_open():
    rows = [  # two dogs: left sprite in two styles, right in one; one layout, four backgrounds
        ((0, 2), 16, (0, 0), (0, 16), 0),
        ((0, 2), 16, (0, 0), (0, 16), 1),
        ((1, 2), 16, (0, 0), (0, 16), 2),
        ((1, 2), 16, (0, 0), (0, 16), 3),
        # a cat on a red background: one style, sizes 3 to 1, two places; the background says nothing
        ((1, -1), 16, (4, -1), (8, -1), 2),
        ((1, -1), 24, (4, -1), (8, -1), 3),
        ((1, -1), 16, (8, -1), (4, -1), 2),
        ((1, -1), 16, (8, -1), (4, -1), 2),
    ]
    entropy = judges.layout_entropy(
        nearest_of(rows), ["two dogs"] * 4 + ["a cat on a red background"] * 4, group_size=4
    )
    assert entropy["style"] == pytest.approx((math.log(2) / 2 + 0) / 2)
    assert entropy["position"] == pytest.approx((0 + math.log(2)) / 2)
    assert entropy["size"] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert entropy["background"] == pytest.approx(math.log(4))


def test_two_samples_differ_or_do_not():
    same, other = ((0, 2), 16, (0, 0), (0, 16), 0), ((1, 2), 16, (0, 4), (0, 16), 1)
    prompts = ["two dogs"] * 2 + ["two dogs on a white background"] * 2
    found = judges.layout_entropies(nearest_of([same, other, same, same]), prompts, 2)
    log2 = math.log(2)
    assert found["style"].tolist() == pytest.approx([log2 / 2, 0])  # one of two sprites
    assert found["position"].tolist() == pytest.approx([log2 / 2, 0])
    assert found["size"].isnan().all() and found["background"].isnan().tolist() == [False, True]
    assert found["background"][0].item() == pytest.approx(log2)


def test_layout_entropy_is_nan_where_nothing_is_open_and_refuses_mixed_groups():
    row = ((0, 2), 16, (0, 0), (0, 16), 0)
    entropy = judges.layout_entropy(nearest_of([row] * 2), ["two dogs on a white background"] * 2, 2)
    assert math.isnan(entropy["size"]) and math.isnan(entropy["background"]) and entropy["style"] == 0
    with pytest.raises(ValueError, match="prompts change inside a group"):
        judges.layout_entropy(nearest_of([row] * 2), ["two dogs", "two cats"], 2)


def test_layout_entropy_of_drawn_scenes_approaches_the_uniform_one():
    rng = torch.Generator().manual_seed(0)
    layout = scenes.draw_layouts([scenes.parse_caption("a boat")] * 128, rng)
    nearest = judges.nearest_scene(compositor.paint(layout), ["a boat"] * 128)
    entropy = judges.layout_entropy(nearest, ["a boat"] * 128, group_size=128)
    assert entropy["style"] == pytest.approx(math.log(3), abs=0.05)
    assert entropy["size"] == pytest.approx(math.log(2), abs=0.05)
    assert entropy["background"] == pytest.approx(math.log(8), abs=0.1)


def small_detector() -> Detector:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return Detector(widths=(8, 16), features=12).eval()


def test_kid_and_frechet_distance_see_a_difference():
    features = distances.DetectorFeatures(small_detector())
    drawn = [scenes.draw_batch(48, "train", seed=seed) for seed in (0, 1)]
    captions = [[scene.caption for scene in batch[0]] for batch in drawn]
    real, other, broken = (distances.read(features, x) for x in (drawn[0][2], drawn[1][2], drawn[1][2] * 0.1))
    assert distances.frechet_distance(real, real) == pytest.approx(0, abs=1e-4)
    near, far = (distances.frechet_distance(real, images) for images in (other, broken))
    assert far > 3 * near > 0
    same, different = (distances.kid(real, images, *captions) for images in (other, broken))
    assert different > 3 * abs(same)


def test_frechet_distance_matches_its_formula():
    features = distances.DetectorFeatures(small_detector())
    real, generated = (scenes.draw_batch(64, "train", seed=seed)[2] for seed in (0, 1))
    with torch.no_grad():
        a, b = (features(images).double() for images in (real, generated * 0.7))
    product = a.T.cov() @ b.T.cov()
    trace = torch.linalg.eigvals(product).sqrt().real.sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * trace
    found = distances.frechet_distance(*(distances.read(features, images) for images in (real, generated * 0.7)))
    assert found == pytest.approx(expected.item(), rel=1e-3)


def test_kid_is_the_mean_kernel_over_pairs_of_different_captions():
    features = distances.DetectorFeatures(small_detector())
    real, generated = (scenes.draw_batch(count, "train", seed=seed)[2] for count, seed in ((6, 0), (4, 1)))
    captions = ["a", "a", "b", "b", "c", "c"], ["a", "a", "b", "c"]
    read = [distances.read(features, images) for images in (real, generated)]
    sets = [rows.tolist() for rows in read]

    def mean(left, right):
        products = [
            (sum(x * y for x, y in zip(one, other, strict=True)) / 12 + 1) ** 3
            for one, text in zip(sets[left], captions[left], strict=True)
            for other, text2 in zip(sets[right], captions[right], strict=True)
            if text != text2
        ]
        return sum(products) / len(products)

    found = distances.kid(*read, *captions)
    assert found == pytest.approx(mean(0, 0) + mean(1, 1) - 2 * mean(0, 1), rel=1e-5)


def test_real_scenes_of_the_same_captions_are_at_no_distance_and_smeared_ones_are_far():
    features = distances.DetectorFeatures(judges.load_second_detector())
    captions = scenes.load_prompts("validation", 48)
    repeated = [caption for caption in captions for _ in range(4)]

    def drawn(seed):
        return scenes.real_pictures(repeated, torch.Generator().manual_seed(seed))

    def distance(images):
        return distances.kid(real, distances.read(features, images), repeated, repeated)

    real = distances.read(features, drawn(0))
    alike = torch.tensor([distance(drawn(seed)) for seed in range(1, 7)])
    assert abs(float(alike.mean())) < 2.5 * float(alike.std()) / len(alike) ** 0.5 + 1e-4
    smeared = functional.interpolate(functional.avg_pool2d(drawn(7), 4), scale_factor=4)
    assert distance(smeared) > 4 * float(alike.abs().max())


def test_kid_says_what_it_cannot_compare():
    rows = torch.zeros(4, 12)
    with pytest.raises(ValueError, match="all 8 images have one caption; expected at least two captions"):
        distances.kid(rows, rows, ["a dog"] * 4, ["a dog"] * 4)
    with pytest.raises(ValueError, match="got 3 captions for 4 images; give one caption an image"):
        distances.kid(rows, rows, ["a dog"] * 4, ["a cat"] * 3)


def test_detector_features_are_the_detectors():
    detector = small_detector()
    images = scenes.draw_batch(3, "train", seed=0)[2]
    features = distances.DetectorFeatures(detector)
    assert features.num_features == 12
    scaled, raw = features(images), detector.features(images)
    assert torch.allclose(scaled.square().mean(1), torch.ones(len(images)))
    assert torch.allclose(torch.cosine_similarity(scaled, raw), torch.ones(len(images)))


def test_surface_features_see_noise_that_hardly_changes_content():
    first = distances.SurfaceFeatures(small_detector())
    images = scenes.draw_batch(48, "train", seed=0)[2]
    assert first.num_features == 8 and first(images).shape == (48, 8)
    assert torch.allclose(first(images).square().mean(1), torch.ones(48))
    detector = judges.load_second_detector()
    real, other = (scenes.draw_batch(64, "train", seed=seed)[2] for seed in (0, 1))
    noisy = (other + 0.1 * torch.randn(other.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    surface, content = distances.SurfaceFeatures(detector), distances.DetectorFeatures(detector)

    def distance(features, generated):
        return distances.frechet_distance(*(distances.read(features, shown) for shown in (real, generated)))

    rise = [distance(features, noisy) / distance(features, other) for features in (surface, content)]
    assert rise[0] > 2 and rise[1] < 1.5
    assert distance(surface, images.flip(3)) < distance(surface, noisy)


def test_the_second_detector_is_another_network_that_knows_real_scenes():
    first, second = load_detector(), judges.load_second_detector()
    assert first.config["widths"] != second.config["widths"] and first.config["features"] != second.config["features"]
    drawn, _, images = scenes.draw_batch(512, "composition", seed=3)
    verdict = judges.verdict(second, images, [scene.caption for scene in drawn])
    assert all(answers.float().mean() >= 0.97 for answers in verdict.values())


def test_true_answers_are_right():
    drawn, layout, _ = scenes.draw_batch(300, "train", seed=2)
    counts, centers = scenes.answers(layout)
    verdict = judges.check_answers(counts, layout.backgrounds, centers, [scene.caption for scene in drawn])
    assert set(verdict) == {"counts", "color", "relation"}
    assert all(values.dtype == torch.bool and values.all() for values in verdict.values())


def answer(caption: str) -> tuple[Tensor, Tensor, Tensor]:
    layout = scenes.draw_layouts([scenes.parse_caption(caption)], torch.Generator().manual_seed(0))
    counts, centers = scenes.answers(layout)
    return counts, layout.backgrounds, centers


def passed(*answers: Tensor, caption: str) -> dict[str, bool]:
    return {key: value.item() for key, value in judges.check_answers(*answers, [caption]).items()}


@pytest.mark.parametrize("caption", ["a dog", "two dogs", "a dog and a cat", "a dog left of a cat"])
def test_a_wrong_count_is_wrong(caption):
    counts, colors, centers = answer(caption)
    dog, pig = scenes.OBJECTS.index("dog"), scenes.OBJECTS.index("pig")
    related = caption == "a dog left of a cat"  # a stray object does not disturb the relation of others
    counts[0, pig] = 1
    expected = {"counts": False, "color": True, "relation": related}
    assert passed(counts, colors, centers, caption=caption) == expected
    counts[0, pig] = 0
    counts[0, dog] = 3 - counts[0, dog]  # one for two, two for one
    expected = {"counts": False, "color": True, "relation": False}
    assert passed(counts, colors, centers, caption=caption) == expected


@pytest.mark.parametrize(
    ("caption", "swapped", "axis"),
    [("a dog left of a cat", "a cat left of a dog", 0), ("a dog above a cat", "a cat above a dog", 1)],
)
def test_a_swapped_relation_is_wrong(caption, swapped, axis):
    expected = {"counts": True, "color": True, "relation": False}
    assert passed(*answer(swapped), caption=caption) == expected
    counts, colors, centers = answer(caption)
    centers[..., axis] = 0.5  # in order along the other axis only
    assert passed(counts, colors, centers, caption=caption) == expected


def test_a_wrong_color_is_wrong_only_where_named():
    caption = "a dog on a red background"
    counts, colors, centers = answer(caption)
    assert passed(counts, colors, centers, caption=caption)["color"]
    assert not passed(counts, colors + 1, centers, caption=caption)["color"]
    assert passed(counts, colors + 1, centers, caption="a dog")["color"]


def test_verdict_reads_the_detector():
    """A detector whose heads say the true answers of one scene judges that scene right and others wrong."""
    caption = "a dog left of a cat on a red background"
    counts, colors, centers = answer(caption)
    detector = small_detector()
    with torch.no_grad():
        for head in (detector.counts_head, detector.color_head, detector.place_head):
            head.weight.zero_()
        detector.counts_head.bias.copy_(torch.nn.functional.one_hot(counts[0], 3).flatten())
        detector.color_head.bias.copy_(torch.arange(8) == colors)
        detector.place_head.bias.copy_(centers[0].clamp(0.01, 0.99).logit().flatten())
    prompts = [caption, "a cat left of a dog on a red background", "two pigs on a blue background"]
    verdict = judges.verdict(detector, torch.rand(3, 3, 32, 32), prompts)
    assert verdict["counts"].tolist() == [True, True, False]
    assert verdict["color"].tolist() == [True, True, False]
    assert verdict["relation"].tolist() == [True, False, False]
