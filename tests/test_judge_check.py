"""The judges notice what they are there to notice, and the check of the judges can tell."""

import math

import pytest
import torch
from conftest import tiny_emoji

from speedrl_lab import compositor, judge_check, judges, scenes
from speedrl_lab.evaluate import load_jury


@pytest.fixture(scope="module")
def table(tokenizer):
    return judge_check.check_judges(tiny_emoji(tokenizer), load_jury(), sets=3, captions=20)


def rates(table, unit: str) -> dict[tuple[str, str], float]:
    rows = table[table.unit == unit]
    return {(row.judge, row.breakage): row.rate for row in rows.itertuples()}


def test_one_row_a_judge_and_breakage(table):
    assert not table.duplicated(["judge", "unit", "breakage"]).any()
    assert set(table.breakage) == {"none", *judge_check.BREAKAGES}
    assert set(table.judge) == {*judge_check.ANSWERS, *judge_check.LESS_IS_WORSE, *judge_check.OF_SETS}
    assert (table.low <= table.rate).all() and (table.rate <= table.high).all()
    counts = table[table.judge == "accuracy"].set_index("breakage")["count"]
    assert counts["none"] == counts["smear"] == 3 * 20 * 2 and 0 < counts["swapped relation"] < counts["none"]
    assert (table[table.unit == "set"]["count"] == 3).all()
    assert not table[table.breakage == "none"].claimed.any()


def test_judges_leave_intact_scenes_alone(table):
    found = rates(table, "image")
    for judge in judge_check.ANSWERS:
        assert found[judge, "none"] <= 0.03, judge
    for judge in judge_check.LESS_IS_WORSE:
        assert found[judge, "none"] <= 0.15, judge


@pytest.mark.parametrize("end", ["", "2"])
def test_detectors_notice_what_is_wrong(table, end):
    found = rates(table, "image")
    assert found["accuracy" + end, "wrong count"] >= 0.97
    assert found["accuracy" + end, "wrong object"] >= 0.97
    assert found["relation" + end, "swapped relation"] >= 0.97
    assert found["color" + end, "wrong background"] >= 0.97
    assert found["accuracy" + end, "swapped relation"] <= 0.05  # not its task: it counts
    assert found["color" + end, "wrong object"] <= 0.05


def test_nearest_scenes_notice_every_kind_of_damage(table):
    found, pairs = rates(table, "image"), rates(table, "pair")
    assert 0.3 < pairs["psnr", "none"] < 0.7 and ("psnr", "one style") not in pairs
    for breakage in judge_check.CLAIMS["psnr"]:
        assert found["psnr", breakage] >= 0.6 and pairs["psnr", breakage] >= 0.9, breakage


def test_clip_notices_wrong_objects(table):
    found, pairs = rates(table, "image"), rates(table, "pair")
    for breakage in ("wrong count", "wrong object"):
        assert found["clip", breakage] >= 0.9, breakage
    assert pairs["clip", "wrong background"] >= 0.9


def test_judges_of_sets_notice_surfaces_and_sameness(table):
    found = rates(table, "set")
    for judge in ("kid_surface", "fd_surface"):
        assert found[judge, "noise"] == 1, judge
    for judge in ("diversity", "style_entropy", "position_entropy"):
        assert found[judge, "one picture"] == 1, judge
    assert found["style_entropy", "one style"] == 1


def test_broken_scenes_are_broken_as_they_say():
    sample = judge_check.draw_sample(24, seed=0)
    rng = torch.Generator().manual_seed(0)
    captions = [scene.caption for scene in sample.scenes]
    pictures = {name: breakage(sample, rng) for name, breakage in judge_check.PAINTED.items()}
    pictures |= {"noise": judge_check.noise(sample.images, rng), "smear": judge_check.smear(sample.images, rng)}
    for name, images in pictures.items():
        assert images.shape == sample.images.shape and images.min() >= 0 and images.max() <= 1, name
    nearest = {name: judges.nearest_scene(images, captions) for name, images in pictures.items()}
    assert nearest["one style"].psnr.min() > 60 and (nearest["one style"].styles <= 0).all()  # valid, but alike
    assert nearest["one picture"].psnr.min() > 60
    assert torch.equal(pictures["one picture"][0::2], pictures["one picture"][1::2])
    for name in ("wrong count", "wrong object", "noise", "smear", "mixed styles"):
        assert nearest[name].psnr.max() < 40, name
    related = torch.tensor([scene.kind in ("left", "above") for scene in sample.scenes])
    named = torch.tensor([scene.background is not None for scene in sample.scenes])
    for name, rows in (("swapped relation", related), ("wrong background", named)):
        assert nearest[name].psnr[rows].max() < 40 and nearest[name].psnr[~rows].min() > 60, name


def test_stray_tokens_are_a_tenth():
    tokens = torch.full((50, 64), 3)
    changed = judge_check.stray_tokens(tokens, 1000, torch.Generator().manual_seed(0))
    assert 0.08 < (changed != tokens).float().mean() < 0.12 and changed.min() >= 0 and changed.max() < 1000


def test_mixed_styles_are_halves_of_two_styles():
    layout = compositor.Layout(
        torch.tensor([[0, -1]]), torch.tensor([[0, 0]]), torch.tensor([[4, 0]]), torch.tensor([[8, 0]]),
        torch.tensor([16]), torch.tensor([2]),
    )  # fmt: skip
    scene = scenes.Scene("one", ("dog",), "red")
    image = compositor.paint(layout)
    mixed = judge_check.mixed_styles(judge_check.Sample([scene], layout, image), torch.Generator().manual_seed(0))
    assert torch.equal(mixed[..., :16], image[..., :16]) and not torch.equal(mixed[..., 16:24], image[..., 16:24])
    assert torch.equal(mixed[..., 24:], image[..., 24:])


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"), [(0, 10, 0.0, 0.2775), (10, 20, 0.2993, 0.7007), (5, 5, 0.5655, 1.0)]
)
def test_wilson_intervals(hits, count, low, high):
    """The bounds are the rates p at which the score (hits/n - p) / sqrt(p (1 - p) / n) is 1.96."""
    found = judge_check.wilson(hits, count)
    assert found == pytest.approx((low, high), abs=1e-3)
    for bound in found:
        if 0 < bound < 1:
            assert abs(hits / count - bound) / math.sqrt(bound * (1 - bound) / count) == pytest.approx(1.96, abs=1e-3)


def test_the_table_for_people_has_every_rate(table):
    text = judge_check.as_markdown(table)
    lines = text.splitlines()
    assert len(lines) == 2 + table.judge.nunique() + len(judge_check.LESS_IS_WORSE)
    assert lines[0].startswith("| judge | intact | wrong count |") and "`kid2`, sets" in text
    assert all(line.count("|") == lines[0].count("|") for line in lines)


def test_too_few_scenes_are_refused(tokenizer):
    with pytest.raises(ValueError, match="sets=1, captions=48: expected at least 2 sets"):
        judge_check.check_judges(tiny_emoji(tokenizer), load_jury(), sets=1)
