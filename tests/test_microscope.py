"""Films say what was sampled and believed; the microscope shows it; GIF and page hold it."""

import base64
import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import tiny_emoji
from PIL import Image

from speedrl_lab import films, microscope, plots
from speedrl_lab.config import SamplerConfig
from speedrl_lab.generator import StepInfo
from speedrl_lab.networks import Tokenizer
from speedrl_lab.sampler import policy_logits, sample

PROMPTS = ["a dog", "two cats on a red background"]
KINDS = ("known", "guess", "order", "entropy", "confidence")
SETTINGS = {
    "confidence": SamplerConfig(steps=4, order="confidence", guidance_scale=2.0),
    "paced": SamplerConfig(steps=5, schedule="paced"),
}


def brightness(images, prompts, trajectory):
    return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def generator(tokenizer: Tokenizer):
    return tiny_emoji(tokenizer)


@pytest.fixture(scope="module")
def shown(generator):
    return [films.film(generator, PROMPTS, sampler, 3, brightness, name) for name, sampler in SETTINGS.items()]


@pytest.mark.parametrize("index", [0, 1], ids=SETTINGS)
def test_film_is_the_sample_of_that_seed(generator, shown, index):
    film, sampler = shown[index], SETTINGS[shown[index].title]
    trajectory = sample(generator, PROMPTS, sampler, 3)
    assert torch.equal(film.trajectory.tokens, trajectory.tokens) and len(film) == int(trajectory.steps.max())
    final = (generator.decode(trajectory.tokens) * 255).round().byte()
    assert torch.equal(film.previews[-1], final) and torch.equal(film.guesses[-1], final)
    assert (film.entropy.isnan() == film.confidence.isnan()).all()
    for step in range(len(film)):
        assert torch.equal(film.entropy[step].isnan(), film.known(step))


@pytest.mark.parametrize("index", [0, 1], ids=SETTINGS)
def test_beliefs_are_those_of_the_distribution_sampled(generator, shown, index):
    film, sampler = shown[index], SETTINGS[shown[index].title]
    cond, row, step = generator.encode(PROMPTS), 1, 1
    state = film.trajectory.state(step)
    probs = policy_logits(generator, state, cond, sampler, StepInfo(step, sampler.steps)).softmax(-1)
    position = int((~film.known(step)[row]).nonzero()[0])
    chances = probs[row, position].detach().double()
    entropy = -sum(float(p) * math.log(p) for p in chances if p > 0)
    assert float(film.entropy[step, row, position]) == pytest.approx(entropy, abs=1e-4)
    assert float(film.confidence[step, row, position]) == pytest.approx(float(chances.max()), abs=1e-5)
    guess = torch.where(film.known(step), film.trajectory.tokens, probs.argmax(-1))
    assert torch.equal(film.guesses[step], (generator.decode(guess) * 255).round().byte())


def test_credit_is_the_change_of_the_guess_and_sums_up(generator, shown):
    for film in shown:
        scores = film.guesses.float().mean((2, 3, 4)) / 255
        torch.testing.assert_close(film.credit, scores[1:] - scores[:-1], atol=3e-3, rtol=0)
        torch.testing.assert_close(film.credit.sum(0), film.score[-1] - film.score[0])
        assert float(film.credit.abs().max()) > 1e-3
    assert films.film(generator, PROMPTS, SamplerConfig(steps=2)).score.isnan().all()


def test_maps_show_what_is_known_in_grey(shown):
    for film in shown:
        for kind in ("entropy", "confidence", "order"):
            grey = [(films.picture(film, kind, moment, 0) == films.GREY).all(-1) for moment in range(len(film) + 1)]
            known = [film.known(moment)[0].unflatten(0, film.grid).numpy() for moment in range(len(film) + 1)]
            pairs = zip(grey, known, strict=True)
            assert all(np.array_equal(mine, ~there if kind == "order" else there) for mine, there in pairs)


def test_status_counts_tokens(shown):
    film = shown[0]
    assert films.status(film, 0, 0).startswith("0 of 4 steps, 0% known, entropy ")
    assert films.status(film, 9, 0).startswith("4 of 4 steps, 100% known, credit ")


def test_pictures_grow_by_whole_factors():
    pixels = np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8)
    large = films.enlarged(pixels, 128)
    assert large.shape == (96, 96, 3) and np.array_equal(large[::2, ::2], pixels)
    assert np.array_equal(large[::2, ::2], large[1::2, 1::2])


def test_gif_plays_every_moment(shown, tmp_path):
    path = films.write_gif(tmp_path / "film.gif", shown, seconds=0.2, width=64)
    with Image.open(path) as gif:
        assert gif.n_frames == max(map(len, shown)) + 1
        gif.seek(gif.n_frames - 1)
        assert gif.info["duration"] == 800
        last = np.asarray(gif.convert("RGB"), dtype=int)
    corner = last[18 : 18 + 64, 2 : 2 + 64]  # the first picture, below its line of text
    final = films.enlarged(films.picture(shown[0], "known", 99, 0), 64)
    assert np.abs(corner - final).mean() < 8  # 256 colours a frame


def test_page_holds_every_picture_and_needs_nothing_else(shown, tmp_path):
    page = films.write_html(tmp_path / "film.html", shown, "Two <films>").read_text()
    assert "://" not in page and "Two &lt;films&gt;" in page
    data = json.loads(re.search(r'id="films">(.*?)</script>', page, re.DOTALL)[1])
    for film, mine in zip(shown, data, strict=True):
        for row, sample_data in enumerate(mine["samples"]):
            for kind in KINDS:
                stored = [base64.b64decode(text) for text in sample_data[kind]]
                assert stored == [films.png(films.picture(film, kind, m, row)) for m in range(len(film) + 1)]
            assert len(sample_data["status"]) == len(film) + 1


def test_large_pictures_are_shrunk_in_films():
    assert films._pixels(torch.rand(2, 3, 512, 256)).shape == (2, 3, 256, 128)


@pytest.fixture
def scope(shown):
    return microscope.Microscope(shown)


def seen(scope):
    images = [image for panel in scope.panels for image in (panel.picture, *panel.maps.values())]
    return [scope.chart.value, *(image.value for image in images)]


def test_microscope_shows_the_moment_of_its_slider(scope, shown):
    for moment in (3, 0, scope.slider.max):
        scope.slider.value = moment
        for film, panel in zip(shown, scope.panels, strict=True):
            expected = films.enlarged(films.picture(film, "known", moment, 0), microscope.PICTURE_WIDTH)
            assert panel.picture.value == films.png(expected)
            assert panel.status.value == films.status(film, moment, 0)


@pytest.mark.parametrize("name,value", [("slider", 2), ("prompt", 1), ("view", "guess")])
def test_no_control_of_the_microscope_is_dead(scope, name, value):
    scope.slider.value = 1
    before = seen(scope)
    getattr(scope, name).value = value
    after = seen(scope)
    assert before != after
    if name != "view":
        assert before[0] != after[0], "the chart follows"


def test_buttons_step_and_stop_at_the_ends(scope):
    scope.back.click()
    assert scope.slider.value == 0
    scope.forward.click()
    scope.forward.click()
    assert scope.slider.value == 2
    scope.back.click()
    assert scope.slider.value == 1
    scope.slider.value = scope.slider.max
    scope.forward.click()
    assert scope.slider.value == scope.slider.max == scope.play.max


def test_microscope_refuses_films_of_other_prompts(generator, shown):
    other = films.film(generator, PROMPTS[:1], SamplerConfig(steps=2))
    with pytest.raises(ValueError, match="same prompts"):
        microscope.Microscope([shown[0], other])
    with pytest.raises(ValueError, match="got 0 films"):
        microscope.Microscope([])


def test_figures_work_without_a_front_end(generator, shown):
    sheet = microscope.contact_sheet(shown[0], most=3)
    assert len(sheet.axes[0].images) == 5 * 3
    chart = microscope.chart(shown)
    counts = [bar.get_height() for bar in chart.axes[0].containers[0]]
    assert counts == [int(shown[0].trajectory.revealed(step)[0].sum()) for step in range(4)]
    silent = films.film(generator, PROMPTS, SamplerConfig(steps=2))
    assert len(chart.axes) == 3 and len(microscope.chart([silent]).axes) == 2
    assert plots.png(chart)
