"""Widgets: the player shows the frame of its slider, the board draws rarely and logs plainly."""

import io

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from speedrl_lab import plots, widgets
from speedrl_lab.config import SamplerConfig, TrainConfig
from speedrl_lab.generators.emoji import WEIGHTS, EmojiGenerator
from speedrl_lab.networks import MaskedTransformer
from speedrl_lab.sampler import sample
from speedrl_lab.weights import load_weights

PROMPTS = ["a dog", "two cats on a red background"]


@pytest.fixture(scope="module")
def generator():
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        policy = MaskedTransformer(width=32, depth=1).eval()
    return EmojiGenerator(policy, load_weights(WEIGHTS / "tokenizer.safetensors", "Tokenizer"))


def record(iteration, **changes):
    rewards = {"clip": 0.5 + iteration / 100, "speed": -0.1}
    plain = {"steps": 4.0, "kl": 0.01, "diversity": 0.3, "seconds": 0.5, "warnings": []}
    return {"iteration": iteration, "rewards": rewards, **plain, **changes}


def shown(picture):
    return np.asarray(Image.open(io.BytesIO(picture.value)))


def test_player_shows_the_frame_of_its_slider(generator):
    states = []
    trajectory = sample(generator, PROMPTS, SamplerConfig(steps=4), seed=0, on_step=states.append)
    player = widgets.film_player(states, generator, PROMPTS)
    _, slider, back, forward, status = player.children[0].children
    pictures = [cell.children[0] for cell in player.children[1].children]
    film = plots.frames(trajectory, generator)
    for step in (3, 0, 4):
        slider.value = step
        for row, picture in enumerate(pictures):
            expected = (film[step, row] * 255).round().byte().permute(1, 2, 0).numpy()
            assert np.array_equal(shown(picture)[::4, ::4], expected)
    assert status.value == "4 of 4: 100% of the tokens known"
    forward.click()
    assert slider.value == 4
    back.click()
    assert slider.value == 3 and status.value.startswith("3 of 4")


def test_pictures_grow_by_whole_factors():
    pixels = torch.rand(3, 48, 48)
    large = np.asarray(Image.open(io.BytesIO(widgets.picture_png(pixels))))
    assert large.shape == (96, 96, 3)
    assert np.array_equal(large[::2, ::2], large[1::2, 1::2])


def test_board_without_a_notebook_prints_about_twenty_lines(capsys):
    board = widgets.Board(TrainConfig(iterations=100))
    for iteration in range(1, 101):
        board.update(record(iteration))
    board.close()
    lines = capsys.readouterr().out.splitlines()
    assert 20 <= len(lines) <= 22 and board.drawings == 0 and len(board.records) == 100
    assert lines[-1] == (
        "iteration 100 of 100: clip 1.500, speed -0.100, steps 4.00, KL 0.0100, diversity 0.300, 0.5 s"
    )


def test_board_goes_on_from_earlier_records():
    earlier = pd.json_normalize([record(iteration) for iteration in (1, 2, 3)])
    board = widgets.Board(TrainConfig(iterations=100), earlier)
    board.update(record(3, steps=2.0))
    board.update(record(4))
    assert [row["iteration"] for row in board.records] == [1, 2, 3, 4] and board.records[2]["steps"] == 2.0
    clip = plots.curves(board.records).axes[0].lines[0]
    assert np.allclose(clip.get_ydata(), [0.51, 0.52, 0.53, 0.54])


def test_board_says_each_kind_of_warning_once(capsys):
    board = widgets.Board(TrainConfig(iterations=100))
    for iteration in range(1, 10):
        board.update(record(iteration, warnings=[f"diversity 0.{iteration} is low", "reward 'speed' is silent"]))
    printed = capsys.readouterr().out
    assert printed.count("is low") == 1 and printed.count("is silent") == 1


def test_board_draws_at_most_once_a_second_and_in_place(monkeypatch):
    now, handles = [100.0], []

    class Handle:
        def __init__(self, picture):
            self.pictures = [picture]

        def update(self, picture):
            self.pictures.append(picture)

    def display(picture, display_id):
        assert display_id
        handles.append(Handle(picture))
        return handles[-1]

    monkeypatch.setattr(widgets, "get_ipython", object)
    monkeypatch.setattr(widgets, "display", display)
    monkeypatch.setattr(widgets.time, "monotonic", lambda: now[0])
    board = widgets.Board(TrainConfig(iterations=30))
    for iteration in range(1, 31):
        board.update(record(iteration))
        now[0] += 0.1
    assert board.drawings == 3
    board.close()
    (handle,) = handles
    assert board.drawings == len(handle.pictures) == 4
    assert handle.pictures[0].data != handle.pictures[-1].data
