"""Tables of costs and judges: their shape, their intervals, and what real scenes score."""

import copy
import importlib
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_emoji

from speedrl_lab import distances, judges, scenes
from speedrl_lab.config import SamplerConfig

evaluate = importlib.import_module("speedrl_lab.evaluate")  # the package's name `evaluate` is the function

PROMPTS = [
    "a dog", "two cats on a red background", "a star left of a pig", "a key above a cake",
    "a boat and a ball", "two frogs",
]  # fmt: skip
PROMISED = [
    "model", "budget", "seed", "steps", "forwards", "seconds_loop", "seconds_total", "accuracy", "clip",
    "kid", "diversity",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def outputs(tmp_path_factory):
    """A cache of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("outputs")
        patch.setenv("SPEEDRL_OUTPUTS", str(folder))
        yield folder


@pytest.fixture(scope="module")
def frame(tokenizer) -> pd.DataFrame:
    """Two tiny random models, two budgets, two seeds, one row an image; the second is guided."""
    models = {"base": tiny_emoji(tokenizer), "other": tiny_emoji(tokenizer, seed=1)}
    samplers = {"other": SamplerConfig(guidance_scale=2.0)}
    return evaluate.score_samples(models, PROMPTS, [1, 3], 2, samplers)


def test_a_model_that_has_learned_to_revise_is_drawn_so(tokenizer, monkeypatch):
    drawn = []
    real = evaluate.sample

    def noted(generator, prompts, sampler, **settings):
        drawn.append((generator.revises, sampler.revise))
        return real(generator, prompts, sampler, **settings)

    monkeypatch.setattr(evaluate, "sample", noted)
    models = {"plain": tiny_emoji(tokenizer), "taught": tiny_emoji(tokenizer, seed=1)}
    models["taught"].revises = True
    evaluate.score_samples(models, PROMPTS, [2], 1, cache=False)
    assert set(drawn) == {(False, False), (True, True)}


@pytest.fixture
def no_sampling(monkeypatch):
    """From here on nothing may be sampled."""

    def refuse(*arguments, **settings):
        raise AssertionError("sampled again")

    return lambda: monkeypatch.setattr(evaluate, "sample", refuse)


def test_one_row_an_image(frame):
    assert len(frame) == 2 * 2 * 2 * len(PROMPTS) * evaluate.SAMPLES_PER_PROMPT
    sizes = frame.groupby(["model", "budget", "seed", "prompt", "sample"]).size()
    assert (sizes == 1).all()
    assert frame.kind[:2].tolist() == ["one", "one"] and set(frame.kind) == set(scenes.KINDS)
    open_only = ["size_entropy", "background_entropy"]
    assert frame.drop(columns=open_only).notna().all().all()
    assert (frame.size_entropy.notna() == (frame.kind == "one")).all()
    assert (frame.background_entropy.isna() == frame.prompt.str.contains("background")).all()
    assert not frame.cached.any() and (frame.training_seed == 0).all()


def test_each_column_is_its_judge(tokenizer, frame):
    """Recomputed from the samples with the judges themselves."""
    part = frame[(frame.model == "base") & (frame.budget == 3) & (frame.seed == 1)].reset_index()
    images, _ = evaluate.draw_pictures(tiny_emoji(tokenizer), list(part.prompt), SamplerConfig(steps=3), 1)
    jury, prompts = evaluate.load_jury(), list(part.prompt)
    real = evaluate.references(tuple(prompts), 1, jury)
    assert real.prompts == [prompt for prompt in dict.fromkeys(prompts) for _ in range(evaluate.REAL_PER_PROMPT)]
    for detector, end in ((jury.detector, ""), (jury.second, "2")):
        verdict = judges.verdict(detector, images, prompts)
        assert part["accuracy" + end].tolist() == verdict["counts"].tolist()
        assert part["relation" + end].tolist() == verdict["relation"].tolist()
        assert part["color" + end].tolist() == verdict["color"].tolist()
        seen = distances.read(distances.DetectorFeatures(detector), images)
        assert part["fd" + end][0] == pytest.approx(distances.frechet_distance(real.features[end], seen), rel=1e-4)
        expected = distances.kid(real.features[end], seen, real.prompts, prompts)
        assert part["kid" + end][0] == pytest.approx(expected, rel=1e-4)
    nearest = judges.nearest_scene(images, prompts)
    for name, value in judges.layout_entropy(nearest, prompts, 2).items():
        assert part[f"{name}_entropy"].mean() == pytest.approx(value)
    assert set(part.style_entropy.round(6)) <= {0.0, round(math.log(2) / 2, 6), round(math.log(2), 6)}
    assert (frame.fd != frame.fd2).all() and (frame.kid != frame.kid2).all()


def test_a_model_of_several_trainings(tokenizer):
    given = {"tuned": [tiny_emoji(tokenizer, seed=seed) for seed in (0, 1, 0)], "base": tiny_emoji(tokenizer)}
    frame = evaluate.score_samples(given, PROMPTS[:3], [1], 2)
    assert frame.groupby("model").training_seed.nunique().to_dict() == {"base": 1, "tuned": 3}
    psnr = frame[frame.seed == 0].groupby(["model", "training_seed"]).psnr.mean()
    assert psnr["tuned", 0] == psnr["tuned", 2] == psnr["base", 0] != psnr["tuned", 1]
    assert len(evaluate.summarize(frame)) == (3 + 1) * 2
    table = evaluate.frontier(frame).set_index("model")
    assert table.psnr["tuned"] == pytest.approx(psnr["tuned"].mean(), abs=1.0)
    with pytest.raises(ValueError, match="no generator given for 'tuned'"):
        evaluate.score_samples({"base": given["base"], "tuned": []}, PROMPTS[:3], [1], 2)


def without_labels(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.drop(columns=["model", "cached"])


def test_a_second_look_samples_nothing(tokenizer, frame, no_sampling):
    no_sampling()
    again = {"renamed": tiny_emoji(tokenizer), "other": tiny_emoji(tokenizer, seed=1)}  # a name is no content
    found = evaluate.score_samples(again, PROMPTS, [1, 3], 2, {"other": SamplerConfig(guidance_scale=2.0)})
    assert found.cached.all() and set(found.model) == {"renamed", "other"}
    pd.testing.assert_frame_equal(without_labels(found), without_labels(frame), check_exact=True)


def changed(tokenizer, what: str) -> dict:
    """The arguments of one cached set of `frame`, but for one thing."""
    generator, sampler, prompts, seeds = tiny_emoji(tokenizer), SamplerConfig(), PROMPTS, 2
    if what in ("policy", "pace", "tokenizer"):
        module = getattr(generator.copy() if what == "tokenizer" else generator, what)
        if what == "tokenizer":
            module = copy.deepcopy(module)
            generator.tokenizer = module
        with torch.no_grad():
            next(module.parameters()).view(-1)[0] += 1e-3
    elif what == "sampler":
        sampler = SamplerConfig(temperature=0.99)
    elif what == "prompts":
        prompts = [*PROMPTS[:-1], "two cats"]
    elif what == "seeds":
        seeds = 3
    return {
        "generators": {"base": generator}, "prompts": prompts, "budgets": [1], "seeds": seeds,
        "samplers": {"base": sampler},
    }  # fmt: skip


@pytest.mark.parametrize("what", ["policy", "pace", "tokenizer", "sampler", "prompts", "seeds", "judges", "code"])
def test_whatever_changes_misses_the_cache(tokenizer, frame, no_sampling, monkeypatch, what):
    no_sampling()
    evaluate.score_samples(**changed(tokenizer, "nothing"))
    if what == "judges":
        jury = copy.deepcopy(evaluate.load_jury())
        with torch.no_grad():
            jury.second.counts_head.bias[0] += 1e-3
        monkeypatch.setattr(evaluate, "load_jury", lambda device: jury)
    if what == "code":
        monkeypatch.setattr(evaluate, "CODE", [*evaluate.CODE, "an edit"])
    with pytest.raises(AssertionError, match="sampled again"):
        evaluate.score_samples(**changed(tokenizer, what))


def imported_by(module: str) -> set[str]:
    """Modules of the package that a module imports when it is loaded, and those that these import."""
    source = (evaluate.kept.PACKAGE / f"{module}.py").read_text()
    direct = {
        name for names in re.findall(r"^from speedrl_lab import (.+)$", source, re.M) for name in names.split(", ")
    }
    direct |= set(re.findall(r"^from speedrl_lab\.(\w+) import", source, re.M))
    return {module}.union(*(imported_by(name) for name in direct))


def test_all_code_that_decides_a_score_is_in_the_key():
    """What is left out holds no rule of sampling or judging: settings, contracts, files."""
    found = imported_by("sampler") | imported_by("judges") | imported_by("distances")
    assert {"noise", "schedules", "compositor"} <= found
    assert found - {*evaluate.DECIDING} <= {"config", "generator", "trajectory", "weights"}


def test_without_cache_everything_is_measured(tokenizer, frame, outputs):
    before = sorted((outputs / "cache" / "evaluation").iterdir())
    found = evaluate.score_samples({"base": tiny_emoji(tokenizer)}, PROMPTS, [1], 1, cache=False)
    assert not found.cached.any()
    evaluate.score_samples({"base": tiny_emoji(tokenizer)}, PROMPTS[:4], [1], 1, cache=False)
    assert sorted((outputs / "cache" / "evaluation").iterdir()) == before


def test_a_broken_cache_file_is_measured_again(tokenizer, outputs, no_sampling):
    arguments = {"generators": {"base": tiny_emoji(tokenizer, seed=7)}, "prompts": PROMPTS[:2], "seeds": 1}
    folder = outputs / "cache" / "evaluation"
    before = set(folder.iterdir())
    first = evaluate.score_samples(**arguments, budgets=[1])
    (path,) = set(folder.iterdir()) - before
    path.write_bytes(path.read_bytes()[:50])
    with pytest.warns(UserWarning, match="is broken .* computed again"):
        second = evaluate.score_samples(**arguments, budgets=[1])
    seconds = ["seconds_loop", "seconds_total"]
    assert second.drop(columns=seconds).equals(first.drop(columns=seconds)) and not second.cached.any()
    no_sampling()
    assert evaluate.score_samples(**arguments, budgets=[1]).cached.all()


def test_a_generator_without_content_is_judged_all_the_same(tokenizer, outputs):
    generator = tiny_emoji(tokenizer)
    generator.hook = lambda: None
    with pytest.warns(UserWarning, match="EmojiGenerator: a function has no fingerprint; its scores are not cached"):
        found = evaluate.score_samples({"base": generator}, PROMPTS[:2], [1], 1)
    assert len(found) == 4 and not found.cached.any()


def test_the_table_has_one_row_a_model_budget_and_seed(frame):
    table = evaluate.summarize(frame)
    assert set(PROMISED) <= set(table.columns)
    assert table.groupby(["model", "budget", "seed"]).size().tolist() == [1] * 8
    part = frame[(frame.model == "base") & (frame.budget == 3) & (frame.seed == 1)]
    row = table[(table.model == "base") & (table.budget == 3) & (table.seed == 1)].iloc[0]
    for name in ("accuracy", "clip", "psnr", "diversity", "kid"):
        assert row[name] == pytest.approx(part[name].mean())


def test_costs_are_steps_passes_and_seconds(frame):
    assert (frame.steps == frame.budget).all()
    assert (frame.forwards == frame.steps * np.where(frame.model == "other", 2, 1)).all()
    assert (frame.seconds_loop > 0).all() and (frame.seconds_total > frame.seconds_loop).all()


def test_scores_do_not_depend_on_the_other_models(tokenizer, frame):
    alone = evaluate.score_samples({"base": tiny_emoji(tokenizer)}, PROMPTS, [3], 1)
    together = frame[(frame.model == "base") & (frame.budget == 3) & (frame.seed == 0)]
    for name in ("accuracy", "clip", "psnr", "diversity"):
        assert np.allclose(alone[name], together[name], atol=1e-4)


def test_evaluate_is_score_samples_summarized(tokenizer):
    table = evaluate.evaluate({"base": tiny_emoji(tokenizer)}, PROMPTS[:2], budgets=[1], seeds=1)
    assert len(table) == 1 and set(PROMISED) <= set(table.columns)


def test_intervals_contain_the_mean(frame):
    table = evaluate.frontier(frame, draws=200)
    assert len(table) == 4
    for metric in (*evaluate.METRICS, *evaluate.SET_METRICS):
        assert table[metric].notna().all()
        assert (table[f"{metric}_low"] <= table[metric] + 1e-9).all(), metric
        assert (table[metric] <= table[f"{metric}_high"] + 1e-9).all(), metric
    assert (table.psnr_low < table.psnr_high).all()
    assert table.equals(evaluate.frontier(frame, draws=200))


def synthetic(values: np.ndarray, model: str = "base", budget: int = 4, seeds: int = 2) -> pd.DataFrame:
    """A frame in which every sample of a prompt has the value of the prompt."""
    rows = [
        {"model": model, "budget": budget, "seed": seed, "prompt": f"prompt {index}", "sample": sample}
        | dict.fromkeys(evaluate.COSTS, float(budget))
        | dict.fromkeys(evaluate.METRICS, value)
        | dict.fromkeys(evaluate.SET_METRICS, 0.1 * seed)
        for index, value in enumerate(values)
        for seed in range(seeds)
        for sample in range(4)
    ]
    return pd.DataFrame(rows)


def test_the_bootstrap_draws_whole_prompts():
    values = np.random.default_rng(0).random(100)
    row = evaluate.frontier(synthetic(values), draws=4000).iloc[0]
    width = row.accuracy_high - row.accuracy_low
    # Eight equal samples of a prompt are one observation, not eight.
    assert width == pytest.approx(2 * 1.96 * values.std() / math.sqrt(100), rel=0.1)
    assert row.accuracy == pytest.approx(values.mean())
    assert row.kid == pytest.approx(0.05)
    assert row.kid_high - row.kid == pytest.approx(2 * np.std([0.0, 0.1], ddof=1) / math.sqrt(2))


def test_paired_differences_are_narrower_than_unpaired_ones():
    values = np.random.default_rng(1).random(80)
    frame = pd.concat([synthetic(values), synthetic(values + 0.01, "tuned", 2)])
    mean, low, high = evaluate.paired_difference(frame, ("tuned", 2), ("base", 4), "accuracy")
    assert mean == pytest.approx(0.01) and low == pytest.approx(0.01) and high == pytest.approx(0.01)
    noisy = pd.concat([synthetic(values), synthetic(np.roll(values, 1), "tuned", 2)])
    mean, low, high = evaluate.paired_difference(noisy, ("tuned", 2), ("base", 4), "accuracy")
    assert mean == pytest.approx(0, abs=1e-9) and low < -0.02 and high > 0.02
    with pytest.raises(ValueError, match="share no prompts"):
        evaluate.paired_difference(frame, ("tuned", 3), ("base", 4), "accuracy")


def test_passes_at_quality_finds_the_cheapest_point_that_is_not_worse():
    table = pd.DataFrame(
        [
            ("base", 2, 4.0, 0.4, 0.3), ("base", 8, 16.0, 0.7, 0.1), ("base", 16, 32.0, 0.9, 0.05),
            ("tuned", 1, 1.0, 0.5, 0.2), ("tuned", 2, 2.0, 0.7, 0.2), ("tuned", 4, 4.0, 0.8, 0.08),
        ],
        columns=["model", "budget", "forwards", "accuracy", "kid"],
    )  # fmt: skip
    found = evaluate.passes_at_quality(table)
    assert found.model.tolist() == ["tuned"] * 3
    assert found.passes[:2].tolist() == [1.0, 2.0] and found.ratio[:2].tolist() == [4.0, 8.0]
    assert math.isnan(found.passes[2]) and math.isnan(found.ratio[2])
    by_kid = evaluate.passes_at_quality(table, "kid")  # less is better
    assert by_kid.passes[:2].tolist() == [1.0, 4.0] and math.isnan(by_kid.passes[2])
    with pytest.raises(ValueError, match="baseline 'bse' is not in the table; models: .*base"):
        evaluate.passes_at_quality(table, baseline="bse")


def test_real_scenes_satisfy_every_judge(tokenizer):
    prompts = scenes.load_prompts("test", 32)
    real = evaluate.judge_real(prompts)
    again = evaluate.judge_real(prompts, reconstruct=tiny_emoji(tokenizer))
    for end in ("", "2"):
        assert min(real["accuracy" + end], real["color" + end], real["relation" + end]) >= 0.97
        assert again["accuracy" + end] >= real["accuracy" + end] - 0.04
    assert real.psnr > 50 and 0.2 < real.style_entropy < math.log(2)
    assert again.psnr > 30
    assert again.diversity == pytest.approx(real.diversity, rel=0.1)


def test_random_models_do_not_satisfy_the_judges(frame):
    assert frame.accuracy.mean() < 0.2 and frame.psnr.mean() < 20


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"budgets": []}, "nothing to evaluate"),
        ({"seeds": 0}, "nothing to evaluate"),
        ({"prompts": ["a dog", "a dgo"]}, "unknown word 'dgo'"),
        ({"samplers": {"base": {1: SamplerConfig()}}}, "no sampler given for 'base' at budget 2; given: .1."),
        ({"budgets": [65]}, "steps=65: expected 1 to 64"),
    ],
)
def test_wrong_input_is_refused(emoji, arguments, words):
    arguments = {"prompts": PROMPTS[:2], "budgets": [1, 2], "seeds": 1, **arguments}
    with pytest.raises(ValueError, match=words):
        evaluate.score_samples({"base": emoji}, **arguments)


def test_a_model_may_have_settings_for_each_budget(emoji):
    chosen = {2: SamplerConfig(steps=1, guidance_scale=2.0), 3: SamplerConfig(steps=3, order="random")}
    frame = evaluate.score_samples({"base": emoji}, PROMPTS[:2], [2, 3], 1, {"base": chosen})
    assert frame.groupby("budget").steps.mean().tolist() == [1.0, 3.0]
    assert frame.groupby("budget").forwards.mean().tolist() == [2.0, 3.0]


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_batches_keep_the_rows_of_a_prompt_together(size):
    prompts = ["a", "b", "a", "c", "c", "a", "d", "b"]
    batches = evaluate.whole_batches(prompts, size)
    assert sorted(row for rows in batches for row in rows) == list(range(8))
    for name in "abcd":
        assert sum(any(prompts[row] == name for row in rows) for rows in batches) == 1
    assert all(len(rows) <= size or len({prompts[row] for row in rows}) == 1 for rows in batches)


def test_a_prompt_repeated_over_many_batches_gives_different_samples(emoji, monkeypatch):
    prompts = ["a dog", "two cats"] * 8 + ["a dog"] * 184 + ["a boat"]
    images, costs = evaluate.draw_pictures(emoji, prompts, SamplerConfig(steps=1), seed=0)
    dogs = images[[row for row, prompt in enumerate(prompts) if prompt == "a dog"]].flatten(1)
    assert len(dogs) == 192 > evaluate.BATCH_SIZE == 128
    assert torch.pdist(dogs).min() > 0.1
    assert len(costs["steps"]) == len(costs["forwards"]) == len(prompts)
    for size in (5, 1000):
        monkeypatch.setattr(evaluate, "BATCH_SIZE", size)
        again, _ = evaluate.draw_pictures(emoji, prompts, SamplerConfig(steps=1), seed=0)
        torch.testing.assert_close(again, images)


def test_a_repeated_prompt_counts_its_samples(emoji, monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH_SIZE", 4)
    frame = evaluate.score_samples({"base": emoji}, ["a dog", "two cats", "a dog", "a dog"], [1], 1)
    assert frame[frame.prompt == "a dog"]["sample"].tolist() == list(range(6))
    assert frame[frame.prompt == "a dog"].psnr.nunique() == 6


def test_the_global_generator_is_left_alone(emoji):
    before = torch.get_rng_state()
    evaluate.score_samples({"base": emoji}, PROMPTS[:2], [1], 1)
    assert torch.equal(before, torch.get_rng_state())
