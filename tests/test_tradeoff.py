"""Steps against speed weights: which runs count, who is sampled how, and intervals against known spreads."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from speedrl_lab import scenes, tradeoff
from speedrl_lab.config import RunConfig, SamplerConfig
from speedrl_lab.evaluate import draw_pictures
from speedrl_lab.generators import load_generator
from speedrl_lab.generators.emoji import WEIGHTS

TUNED = WEIGHTS / "speed_rl.safetensors"
PROMPTS = tradeoff.balanced(scenes.load_prompts("test"), 14)
WEIGHT_STEPS = {0.0: 6.0, 0.3: 4.0, 1.0: 2.0}


def add_run(root, speed_weight, seed, **knobs):
    """A finished run with the committed policy, as a sweep of 03_speed_rl leaves it."""
    folder = root / f"speed_weight={speed_weight},seed={seed}" / "run"
    folder.mkdir(parents=True)
    knobs = {"steps": 3, "schedule": "paced"} | knobs
    config = RunConfig.from_flat("smoke", speed_weight=speed_weight, seed=seed, **knobs)
    (folder / "config.json").write_text(config.to_json())
    (folder / tradeoff.POLICY).symlink_to(TUNED)
    return folder


def made_up(spread=1.0):
    """A frame as `score_paces` makes it; at weight 0.3 relations take 2 steps more than single objects."""
    rng = np.random.default_rng(1)
    own = {prompt: rng.normal() * spread for prompt in PROMPTS}
    rows = []
    for weight, steps in WEIGHT_STEPS.items():
        for seed, prompt, sample in np.ndindex(3, len(PROMPTS), 2):
            prompt = PROMPTS[prompt]
            kind = scenes.parse_caption(prompt).kind
            extra = {"one": -1, "left": 1, "above": 1}.get(kind, 0) * (weight == 0.3)
            value = steps + extra + own[prompt] + (seed - 1) / 10
            scores = {"accuracy": 0.9, "clip": 0.8, "psnr": value * 3, "diversity": 15.0}
            rows.append([weight, seed, prompt, kind, sample, value, value, *scores.values()])
    return pd.DataFrame(rows, columns=list(tradeoff.COLUMNS))


@pytest.fixture(scope="module")
def samples() -> pd.DataFrame:
    return made_up()


def test_trials_are_the_finished_runs_by_weight_and_seed(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEEDRL_OUTPUTS", str(tmp_path))
    for weight, seed in ((1.0, 0), (0.0, 1), (0.0, 0)):
        add_run(tmp_path / "mine", weight, seed)
    (add_run(tmp_path / "mine", 1.0, 1) / tradeoff.POLICY).unlink()  # not finished
    runs = tradeoff.trials("mine")
    assert runs[["speed_weight", "seed"]].to_numpy().tolist() == [[0, 0], [0, 1], [1, 0]]
    assert runs.path[2] == tmp_path / "mine" / "speed_weight=1.0,seed=0" / "run"
    assert (runs.steps == 3).all() and (runs.preset == "smoke").all()


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([], "no finished run"),
        ([{"schedule": "power"}], "schedule='power'; expected 'paced'"),
        ([{}, {"speed_weight": 1.0, "kl_weight": 0.5}], r"differ in kl_weight \(0.01, 0.5\)"),
        ([{}, {"name": "again"}], "twice"),
    ],
)
def test_trials_that_are_no_comparison_are_refused(tmp_path, others, message):
    for knobs in others:
        knobs = {"speed_weight": 0.0, "seed": 0} | knobs
        add_run(tmp_path / knobs.pop("name", "first"), **knobs)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        tradeoff.trials(tmp_path)


def test_policies_are_sampled_as_they_were_trained_but_greedily():
    config = RunConfig.from_flat("emoji", steps=6, order="random", temperature=0.8)
    sampler = tradeoff.own_sampler(config.flat())
    assert sampler.greedy_pace and not config.train.sampler.greedy_pace
    assert (sampler.steps, sampler.order, sampler.schedule, sampler.temperature) == (6, "random", "paced", 0.8)


def test_balanced_prompts_are_the_first_of_each_kind():
    given = ["a dog", "a dog and a cat", "a cat", "two dogs", "a dog left of a cat", "a dog above a cat", "two cats"]
    assert tradeoff.balanced(given, 1) == ["a dog", "two dogs", "a dog and a cat", *given[4:6]]
    for wrong in (0, 2):
        with pytest.raises(ValueError, match=f"per_kind={wrong}: expected 1 to 1"):
            tradeoff.balanced(given, wrong)


def test_scores_are_one_row_an_image_at_the_policy_s_own_pace(tmp_path):
    for seed in (0, 1):
        add_run(tmp_path, 0.5, seed)
    prompts = tradeoff.balanced(scenes.load_prompts("test"), 1)
    frame = tradeoff.score_paces(tradeoff.trials(tmp_path), prompts, "cpu")
    assert list(frame.columns) == list(tradeoff.COLUMNS) and frame.notna().all().all()
    assert len(frame) == 2 * 2 * len(prompts) and (frame.speed_weight == 0.5).all()
    first, second = (part.drop(columns="seed").reset_index(drop=True) for _, part in frame.groupby("seed"))
    pd.testing.assert_frame_equal(first, second)  # the same policy and the same random numbers
    repeated = [prompt for prompt in prompts for _ in range(2)]
    sampler = SamplerConfig(steps=3, schedule="paced", greedy_pace=True)
    _, costs = draw_pictures(load_generator("emoji", "cpu", TUNED), repeated, sampler, seed=0)
    assert first.steps.tolist() == costs["steps"].tolist() and first.prompt.tolist() == repeated
    assert first.steps.between(1, 3).all()


def test_summary_has_means_and_seed_ranges(samples):
    table = tradeoff.summary(samples).set_index("speed_weight")
    for weight, row in table.iterrows():
        part = samples[samples.speed_weight == weight]
        assert row.steps == pytest.approx(part.steps.mean()) and row.psnr == pytest.approx(part.psnr.mean())
        assert row.steps_most - row.steps_least == pytest.approx(0.2) and row.seeds == 3
        assert row.steps_least == pytest.approx(part[part.seed == 0].steps.mean())


def test_intervals_are_those_of_means_over_prompts(samples):
    """Against the normal approximation; the steps of a prompt spread, samples and seeds of it do not count."""
    row = tradeoff.summary(samples, draws=20000).iloc[0]
    values = samples[samples.speed_weight == 0].groupby("prompt").steps.mean()
    width = 2 * 1.96 * values.std(ddof=0) / len(values) ** 0.5
    assert row.steps_high - row.steps_low == pytest.approx(width, rel=0.05)
    again = tradeoff.summary(pd.concat([samples, samples]), draws=20000).iloc[0]
    assert again.steps_low == pytest.approx(row.steps_low) and again.gap_high == pytest.approx(row.gap_high)


def test_the_gap_between_hard_and_easy_is_resampled_independently(samples):
    row = tradeoff.summary(samples, draws=20000).iloc[1]
    by_prompt = samples[samples.speed_weight == 0.3].groupby(["kind", "prompt"]).steps.mean()
    easy, hard = by_prompt["one"], pd.concat([by_prompt["left"], by_prompt["above"]])
    assert row.gap == pytest.approx(hard.mean() - easy.mean()) == row.hard - row.easy
    width = 2 * 1.96 * (easy.var(ddof=0) / len(easy) + hard.var(ddof=0) / len(hard)) ** 0.5
    assert row.gap_high - row.gap_low == pytest.approx(width, rel=0.05)


def test_without_spread_the_gap_is_exact():
    table = tradeoff.summary(made_up(spread=0.0), draws=100)
    assert table[["gap_low", "gap", "gap_high"]].to_numpy() == pytest.approx(np.array([[0] * 3, [2] * 3, [0] * 3]))


def test_steps_by_kind_groups_relations():
    kinds = tradeoff.steps_by_kind(made_up(spread=0.0), draws=100)
    middle = kinds[kinds.speed_weight == 0.3].set_index("scene")
    assert middle.steps.to_dict() == pytest.approx(
        {"one object": 3, "two of a kind": 4, "two objects": 4, "relation": 5}
    )
    assert middle.prompts.tolist() == [14, 14, 14, 28]


def test_missing_kinds_are_named(samples):
    with pytest.raises(ValueError, match="no prompt with one object"):
        tradeoff.summary(samples[samples.kind != "one"])


def test_samples_come_back_from_their_file(tmp_path, samples):
    samples.round(4).to_csv(tmp_path / "samples.csv", index=False)
    pd.testing.assert_frame_equal(tradeoff.load_samples(tmp_path / "samples.csv"), samples.round(4))
    samples.drop(columns="psnr").to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(ValueError, match="no column 'psnr'"):
        tradeoff.load_samples(tmp_path / "other.csv")
    with pytest.raises(FileNotFoundError, match="no missing.csv"):
        tradeoff.load_samples(tmp_path / "missing.csv")


def test_figure_shows_means_seeds_and_weights(samples):
    overall, by_kind, *qualities = tradeoff.figure(samples).axes
    table = tradeoff.summary(samples)
    means, dots = overall.lines
    assert list(means.get_ydata()) == table.steps.tolist() and len(dots.get_xdata()) == 9
    assert sorted(set(dots.get_xdata())) == [0, 1, 2]
    assert [text.get_text() for text in overall.get_xticklabels()] == ["0", "0.3", "1"]
    assert [text.get_text() for text in by_kind.get_legend().texts] == list(tradeoff.SCENES)
    assert len(qualities) == 4
    for axes in qualities:
        assert [text.get_text() for text in axes.texts] == ["0", "0.3", "1"]
        assert list(axes.lines[1].get_xdata()) == table.steps.tolist()
    assert plt.get_fignums() == []
