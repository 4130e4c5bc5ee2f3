"""Figures show what they are given: patches, counts, scores, records."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from speedrl_lab import plots
from speedrl_lab.config import SamplerConfig
from speedrl_lab.generators.emoji import WEIGHTS, EmojiGenerator
from speedrl_lab.networks import MaskedTransformer
from speedrl_lab.pace import PaceHead
from speedrl_lab.sampler import sample
from speedrl_lab.schedules import reveal_counts
from speedrl_lab.weights import load_weights

PROMPTS = ["a dog", "two cats on a red background", "a key above a cake"]
RECORD = {"iteration": 1, "rewards": {"clip": 0.5, "speed": -0.1}, "steps": 4.0, "kl": 0.0, "diversity": 0.3}


@pytest.fixture(scope="module")
def generator():
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        policy = MaskedTransformer(width=32, depth=1).eval()
    tokenizer = load_weights(WEIGHTS / "tokenizer.safetensors", "Tokenizer")
    return EmojiGenerator(policy, tokenizer, PaceHead().reset(0))


def watched(generator, **settings):
    """A trajectory of PROMPTS and what `on_step` saw of it."""
    states = []
    return sample(generator, PROMPTS, SamplerConfig(**settings), seed=0, on_step=states.append), states


@pytest.mark.parametrize("schedule", ["cosine", "paced"])
def test_frames_agree_between_trajectory_and_observed_states(generator, schedule):
    trajectory, states = watched(generator, steps=5, schedule=schedule)
    film = plots.frames(trajectory, generator)
    assert film.shape == (int(trajectory.steps.max()) + 1, 3, 3, 32, 32)
    torch.testing.assert_close(film, plots.frames(states, generator))


def test_frames_show_known_patches_and_grey_ones(generator):
    trajectory, _ = watched(generator, steps=4, order="confidence")
    film, final = plots.frames(trajectory, generator), generator.decode(trajectory.tokens)
    for moment, row, position in np.ndindex(5, 3, 64):
        top, left = position // 8 * 4, position % 8 * 4
        patch = film[moment, row, :, top : top + 4, left : left + 4]
        if trajectory.reveal_step[row, position] < moment:
            assert torch.equal(patch, final[row, :, top : top + 4, left : left + 4])
        else:
            assert set(np.round(patch.unique().tolist(), 2)) == {0.58, 0.66}


def test_film_strip_keeps_start_and_end(generator):
    trajectory, _ = watched(generator, steps=20)
    (axes,) = plots.film_strip(trajectory, generator, PROMPTS, most=5).axes
    assert len(axes.images) == 5 * len(PROMPTS)
    assert all(image.get_interpolation() == "nearest" for image in axes.images)
    final = generator.decode(trajectory.tokens)[0].permute(1, 2, 0)
    assert np.allclose(axes.images[4].get_array(), final, atol=1e-6)
    texts = [text.get_text() for text in axes.texts]
    assert "start" in texts and "step 20" in texts and "a dog" in texts


def test_reveal_map_counts_steps_from_one(generator):
    trajectory, _ = watched(generator, steps=4)
    figure = plots.reveal_map(trajectory, (8, 8), PROMPTS)
    shown = figure.axes[1].images[0].get_array()
    assert np.array_equal(np.asarray(shown).ravel(), trajectory.reveal_step[1] + 1)


def test_tokens_per_step_sums_to_all_tokens(generator):
    trajectory, _ = watched(generator, steps=6)
    bars = plots.tokens_per_step(trajectory).axes[0].patches
    assert [bar.get_height() for bar in bars] == reveal_counts(64, 6).tolist()


def test_tokens_per_step_of_a_pace_averages_those_still_unmasking(generator):
    trajectory, _ = watched(generator, steps=64, schedule="paced")
    bars = plots.tokens_per_step(trajectory).axes[0].patches
    last = int(trajectory.steps.max()) - 1
    counts = trajectory.revealed(last).sum(1)
    assert len(bars) == last + 1
    assert bars[last].get_height() == pytest.approx(float(counts[counts > 0].double().mean()))


def test_image_grid_refuses_captions_that_do_not_match():
    with pytest.raises(ValueError, match="got 2 prompts for 3 images"):
        plots.image_grid(torch.rand(3, 3, 8, 8), ["a dog", "a cat"])
    axes = plots.image_grid(torch.rand(3, 3, 8, 8), ["a", "b", "c"], scores=[0.5, 2, 31.26], columns=2).axes[0]
    assert [text.get_text() for text in axes.texts] == ["a (0.5)", "b (2)", "c (31.3)"]


def test_curves_have_a_panel_for_each_reward_and_accept_both_forms():
    records = [RECORD | {"iteration": step, "rewards": {"clip": step / 10, "speed": -0.1}} for step in (1, 2)]
    from_list = plots.curves(records)
    titles = [axes.get_title(loc="left") for axes in from_list.axes]
    assert [title.split(":")[0] for title in titles[:2]] == ["reward", "reward"] and len(titles) == 5
    from_frame = plots.curves(pd.json_normalize(records))
    assert [axes.get_title(loc="left") for axes in from_frame.axes] == titles
    assert list(from_list.axes[0].lines[0].get_ydata()) == [0.1, 0.2]
    with pytest.raises(ValueError, match="no records"):
        plots.curves([])


def test_nothing_is_left_in_pyplot(generator):
    trajectory, _ = watched(generator, steps=2)
    plots.film_strip(trajectory, generator, PROMPTS)
    plots.tokens_per_step(trajectory)
    assert plt.get_fignums() == []
