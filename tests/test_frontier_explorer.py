"""The frontier explorer, without a browser: every control changes what is seen; pictures are those that were judged."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_emoji

from speedrl_lab import frontier_explorer, gallery
from speedrl_lab.config import SamplerConfig
from speedrl_lab.contenders import Contender
from speedrl_lab.frontier_explorer import FrontierExplorer
from speedrl_lab.intervals import METRICS, SET_METRICS
from speedrl_lab.judges import nearest_scene

PROMPTS = ["a dog", "two cats on a red background", "a star left of a pig", "a key above a cake"]


@pytest.fixture(scope="module")
def field(tokenizer):
    """A base of one training and a policy of two, which is guided at 2 passes."""
    plain = {budget: SamplerConfig(steps=budget) for budget in (1, 2, 4)}
    guided = {1: SamplerConfig(steps=1, start_noise=0.4), 2: SamplerConfig(steps=1, guidance_scale=2.0)}
    return {
        "base": Contender("base", [tiny_emoji(tokenizer)], plain),
        "p": Contender("p", [tiny_emoji(tokenizer, 1), tiny_emoji(tokenizer, 2)], guided),
    }


@pytest.fixture(scope="module")
def samples(field):
    """A frame as `contenders.score` makes it, of drawn numbers: only PSNR is that of the pictures."""
    rng = np.random.default_rng(0)
    rows = [
        {"model": name, "budget": budget, "seed": seed, "training_seed": training, "prompt": prompt, "sample": sample,
         "steps": budget, "forwards": float(budget), "seconds_loop": budget / 50, "seconds_total": budget / 40 + 0.01,
         **{metric: rng.random() for metric in (*METRICS, *SET_METRICS)}}
        for name, contender in field.items() for budget in contender.samplers
        for training in range(len(contender.trainings)) for seed in range(2)
        for prompt in PROMPTS for sample in range(2)
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture
def board(samples, field, tmp_path):
    return FrontierExplorer(samples, field, tmp_path / "exports")


def seen(board: FrontierExplorer) -> dict[str, object]:
    """All that is on the screen."""
    return {"figure": json.loads(board.figure.to_json()), "equal": board.equal.value, "pictures": board.pictures.value}


OTHER = {
    "x": "seconds_loop", "judge": "kid2", "models": ("p",), "bands": False, "point": ("base", 4), "rank": "best",
    "draw": (1, 1),
}  # fmt: skip
CHANGES = {
    "x": {"figure", "equal"}, "judge": {"figure", "equal", "pictures"}, "models": {"figure"}, "bands": {"figure"},
    "point": {"figure", "pictures"}, "rank": {"pictures"}, "draw": {"pictures"},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_every_control_changes_what_is_seen_and_back(board, name):
    before, value = seen(board), board.controls[name].value
    board.controls[name].value = OTHER[name]
    after = seen(board)
    assert {part for part in before if before[part] != after[part]} == CHANGES[name]
    board.controls[name].value = value
    assert seen(board) == before


def test_no_control_is_left_out_of_the_tests_and_none_fails_silently(board):
    assert set(board.controls) == {*OTHER, "pinned", "format"}  # those two have tests of their own
    assert board._errors.outputs == ()
    board.controls["models"].value = ()
    assert not any(trace.visible for trace in board.figure.data[:-1])
    assert "choose a model beside the base" in board.equal.value


def test_the_figure_is_the_frontier_of_the_table(board):
    board.controls["judge"].value, board.controls["x"].value = "psnr", "seconds_total"
    lines = {trace.name: trace for trace in board.figure.data[1:-1:2]}
    rows = board.table[board.table.model == "base"]
    assert list(lines["base"].x) == list(rows.seconds_total) and list(lines["base"].y) == list(rows.psnr)
    assert "seconds per image" in board.figure.layout.xaxis.title.text and "dB" in board.figure.layout.yaxis.title.text
    model, budget = board.point
    ringed = board.table[(board.table.model == model) & (board.table.budget == budget)]
    assert list(board.figure.data[-1].x) == list(ringed.seconds_total)
    assert "Seconds per image, with decoding at equal PSNR to the nearest valid scene" in board.equal.value


class Points:
    """What plotly hands to a callback."""

    def __init__(self, *indices):
        self.point_inds = list(indices)


def test_hovering_shows_a_point_until_a_click_pins_one(board):
    base, policy = board.figure.data[1], board.figure.data[3]
    board._hovered(base, Points(2), None)
    assert board.point == ("base", 4)
    first = board.pictures.value
    board._clicked(policy, Points(0), None)
    assert board.point == ("p", 1) and board.controls["pinned"].value and board.pictures.value != first
    board._hovered(base, Points(1), None)
    assert board.point == ("p", 1), "pinned"
    board.controls["pinned"].value = False
    board._hovered(base, Points(1), None)
    assert board.point == ("base", 2)
    board._hovered(base, Points(), None)
    assert board.point == ("base", 2)
    for trace in board.figure.data[1:-1:2]:
        assert trace._click_callbacks and trace._hover_callbacks


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("html", b"<!doctype html>")])
def test_exports_are_files_of_their_kind_and_never_replaced(board, kind, start):
    board.controls["format"].value = kind
    board.controls["judge"].value = "psnr"
    board.export_button.click()
    first = board.folder / f"frontier-psnr-forwards.{kind}"
    assert first.read_bytes().startswith(start) and str(first) in board.exported.value
    content = first.read_bytes()
    if kind == "html":
        assert b"plotly-graph-div" in content and b"base at" in content
    board.export_button.click()
    assert (board.folder / f"frontier-psnr-forwards-2.{kind}").is_file() and first.read_bytes() == content
    assert not list(board.folder.glob("*.partial"))


def test_without_a_front_end_the_figure_is_a_picture(board):
    bundle = board._repr_mimebundle_()
    assert bundle["image/png"].startswith(b"\x89PNG") and "application/vnd.jupyter.widget-view+json" in bundle


def test_one_draw_cannot_be_chosen(samples, field, tmp_path):
    alone = samples[(samples.seed == 0) & (samples.training_seed == 0)]
    made = FrontierExplorer(alone, field, tmp_path)
    assert made.controls["draw"].disabled and "data:image/png" in made.pictures.value


def test_pictures_drawn_again_are_those_that_were_sampled(field, samples):
    """Whatever rows are asked for, and in whatever order."""
    rows = samples[samples.model == "p"].sample(9, random_state=0)
    pictures = gallery.redraw(field, rows)
    for picture, row in zip(pictures, rows.itertuples(), strict=True):
        generator, sampler = field["p"].trainings[row.training_seed], field["p"].samplers[row.budget]
        repeated = [prompt for prompt in PROMPTS for _ in range(2)]
        drawn = frontier_explorer.gallery.sample(generator, repeated, sampler, seed=row.seed)
        expected = generator.decode(drawn.tokens)[2 * PROMPTS.index(row.prompt) + row.sample]
        torch.testing.assert_close(picture, expected)
    with pytest.raises(ValueError, match="'p' at budget 3 is not among the models: base, p"):
        gallery.redraw(field, rows.assign(budget=3))


def test_worst_best_and_first(samples):
    part = samples[(samples.model == "base") & (samples.budget == 1)]
    assert gallery.chosen(part, "psnr", "worst", 3).psnr.tolist() == sorted(part.psnr)[:3]
    assert gallery.chosen(part, "kid", "best", 3).psnr.tolist() == sorted(part.psnr)[:-4:-1]
    assert gallery.chosen(part, "psnr", "first", 3).equals(part.head(3))
    ties = part.assign(accuracy=0.0)
    assert gallery.chosen(ties, "accuracy", "worst", 2).psnr.tolist() == sorted(part.psnr)[:2]
    with pytest.raises(ValueError, match="rank='last': expected worst, best, first"):
        gallery.chosen(part, "psnr", "last", 3)


def test_failures_are_the_worst_of_the_best_models(field, samples):
    table = pd.DataFrame({
        "model": ["a", "a", "b", "c"], "budget": [1, 4, 2, 8], "forwards": [1.0, 4.0, 2.0, 8.0],
        "accuracy": [0.1, 0.5, 0.6, 0.9], "kid": [0.4, 0.3, 0.2, 0.1],
    })  # fmt: skip
    assert gallery.best_models(table, 4) == [("b", 2), ("a", 4)]
    assert gallery.best_models(table, 8, 1, "kid") == [("c", 8)]
    figure = gallery.failures(field, samples, [("base", 2), ("p", 1)], count=3)
    (axes,) = figure.axes
    texts = [text.get_text() for text in axes.texts]
    worst = samples[(samples.model == "p") & (samples.budget == 1)].nsmallest(1, "psnr").iloc[0]
    assert len(axes.images) == 6 and "base\n2 passes" in texts and any(f"({worst.psnr:.1f} dB)" in t for t in texts)


def test_scores_under_the_pictures_are_theirs(field, samples):
    rows = samples[samples.model == "base"].head(2)
    pictures = gallery.redraw(field, rows)
    text = frontier_explorer.strip(rows, pictures, "accuracy")
    assert text.count("data:image/png") == 2 and f"{rows.accuracy.iloc[0]:.3g}, {rows.psnr.iloc[0]:.1f} dB" in text
    assert nearest_scene(pictures, list(rows.prompt)).psnr.shape == (2,)
