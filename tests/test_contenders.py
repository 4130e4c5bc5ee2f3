"""Policies on a frontier: where their files are, what each is sampled with, what a second look costs."""

import pandas as pd
import pytest
import torch
from conftest import tiny_emoji

from speedrl_lab import contenders
from speedrl_lab.config import SamplerConfig
from speedrl_lab.evaluate import draw_pictures
from speedrl_lab.pace import head_for

PROMPTS = ["a dog", "two cats on a red background", "a star left of a pig"]


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEEDRL_OUTPUTS", str(tmp_path))
    return tmp_path


@pytest.fixture
def counted(monkeypatch):
    """What the search looked at: a `prompt_scores` that likes low temperatures and few steps."""
    seen = []

    def scores(generator, prompts, sampler, samples, detector):
        seen.append(sampler)
        return torch.tensor([[-sampler.temperature - sampler.steps / 100, 10.0]] * len(prompts))

    monkeypatch.setattr("speedrl_lab.search.prompt_scores", scores)
    monkeypatch.setattr(contenders, "prompt_scores", scores)
    return seen


def policy(outputs, name, text="x"):
    path = outputs / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def headed(tokenizer, kind, seed=0):
    generator = tiny_emoji(tokenizer, seed)
    generator.pace = None if kind == "none" else head_for(kind, seed)
    return generator


def test_policies_are_files_lists_of_files_or_run_folders(outputs):
    runs = [policy(outputs, f"rivals/sdtt-{seed}/policy.safetensors") for seed in range(2)]
    alone = policy(outputs, "weights/a,b=c.safetensors")
    found = contenders.read_policies([
        "rivals/sdtt-0", "sdtt=rivals/sdtt-0,rivals/sdtt-1/policy.safetensors", f"speed-rl, short={alone}",
    ])  # fmt: skip
    assert found == {"sdtt-0": runs[:1], "sdtt": runs, "speed-rl, short": [alone]}
    assert contenders.read_policies([]) == {}


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        (["sdtt=rivals/none"], FileNotFoundError, "policy 'sdtt': no file"),
        (["rivals/none"], ValueError, "no such run folder; expected name=file or name=file,file"),
        (["base=one"], ValueError, "the name 'base' is taken"),
        (["a=one", "a=one"], ValueError, "the name 'a' is taken"),
    ],
)
def test_a_wrong_policy_is_said_in_one_line(outputs, entries, error, message):
    policy(outputs, "one")
    with pytest.raises(error, match=message) as caught:
        contenders.read_policies(entries)
    assert "\n" not in str(caught.value)


def test_every_pool_costs_its_passes_and_offers_what_fairness_asks(emoji):
    one, four = contenders.fixed_pool(1), contenders.fixed_pool(4)
    assert {sampler.steps for sampler in one} == {1}
    assert {sampler.order for sampler in four} == {"confidence", "halton"}
    assert {s.temperature for s in four} == {1.0, 0.8, 0.6, 1.2}
    assert {s.first_temperature for s in four} == {1.0, 2.0, 3.0}
    assert {s.start_noise for s in one} == {s.start_noise for s in four} == {0.0, 0.03, 0.05, 0.4}
    assert {(s.guidance_scale, s.steps) for s in four} == {(1.0, 4), (2.0, 2)}
    assert all(sampler.guidance_scale == 1.0 for sampler in contenders.fixed_pool(3))
    assert not any(sampler.revise for sampler in (*one, *four))
    revising = contenders.fixed_pool(4, revises=True)
    assert all(sampler.revise for sampler in revising) and {s.schedule for s in revising} == {"cosine", "power"}
    own = contenders.own_pool("paced", 4, revises=True)
    assert all(sampler.revise for sampler in own)
    barely = [{s.start_noise for s in pool} for pool in (contenders.fixed_pool(1, revises=True), revising, own)]
    assert barely == 3 * [{0.0, 0.015, 0.03, 0.05, 0.1}]
    for passes, pool in ((1, one), (4, four), (4, revising)):
        for sampler in pool:
            assert draw_pictures(emoji, ["a dog"], sampler, seed=0)[1]["forwards"].tolist() == [passes]


@pytest.mark.parametrize(
    ("kind", "names"),
    [("none", ["p"]), ("paced", ["p", "p, own pace"]), ("adaptive", ["p"])],
)
def test_the_head_says_how_a_policy_is_sampled(tokenizer, counted, kind, names):
    trainings = [headed(tokenizer, kind, seed) for seed in (0, 1)]
    found = contenders.tuned_contenders("p", trainings, PROMPTS, [1, 4], own_steps=[3])
    assert [contender.name for contender in found] == names
    assert all(contender.trainings == trainings for contender in found)
    if kind != "adaptive":
        assert list(found[0].samplers) == [1, 4] and found[0].samplers[4].temperature == 0.6
    if kind != "none":
        own = found[-1].samplers
        assert list(own) == [3] and own[3].steps == 3 and own[3].schedule == kind
        assert own[3].temperature == (1.0 if kind == "adaptive" else 0.6)


def test_settings_name_every_sampler(emoji):
    samplers = {2: SamplerConfig(steps=2), 8: SamplerConfig(steps=4, guidance_scale=2.0)}
    table = contenders.settings({"base": contenders.Contender("base", [emoji], samplers)})
    assert table.model.tolist() == ["base", "base"] and table.trainings.tolist() == [1, 1]
    fields = [name for name in table if name not in ("model", "budget", "trainings")]
    read = {row["budget"]: SamplerConfig(**{name: row[name] for name in fields}) for row in table.to_dict("records")}
    assert read == samplers


def test_trainings_with_other_heads_are_refused(tokenizer, counted):
    mixed = [headed(tokenizer, "paced"), headed(tokenizer, "none")]
    with pytest.raises(ValueError, match="different pace heads: none, paced"):
        contenders.tuned_contenders("p", mixed, PROMPTS, [1])
    with pytest.raises(ValueError, match="at its own pace only; expected at least one own_steps"):
        contenders.tuned_contenders("p", [headed(tokenizer, "adaptive")], PROMPTS, [1], [])


def test_a_second_search_looks_at_nothing_new(tokenizer, counted):
    pools = {("passes", 1): contenders.fixed_pool(1)}
    first = contenders.searched(headed(tokenizer, "none"), PROMPTS, pools)
    spent = len(counted)
    more = pools | {("passes", 2): contenders.fixed_pool(2)}
    again = contenders.searched(headed(tokenizer, "none"), PROMPTS, more)
    assert again["passes", 1] == first["passes", 1] and list(again) == list(more)
    assert spent and set(counted[spent:]) == set(contenders.fixed_pool(2))
    spent = len(counted)
    assert contenders.searched(headed(tokenizer, "none"), PROMPTS, more) == again and len(counted) == spent
    contenders.searched(headed(tokenizer, "none", seed=1), PROMPTS, pools)
    other = len(counted)
    contenders.searched(headed(tokenizer, "none"), PROMPTS[:2], pools)
    assert len(counted) > other > spent
    spent = len(counted)
    contenders.searched(headed(tokenizer, "none"), PROMPTS, pools, least_diversity=5.0)
    assert len(counted) == spent  # another question about what was seen


def test_the_usual_bases_diversity_is_looked_at_once(tokenizer, counted):
    base = headed(tokenizer, "none")
    assert contenders.usual_diversity(base, PROMPTS, 4) == 10.0 == contenders.usual_diversity(base, PROMPTS, 4)
    assert counted == [contenders.usual_sampler(4)]


def test_the_base_stands_there_at_its_best_and_as_usual(emoji):
    base, usual = contenders.base_contenders(emoji, [1, 2, 4])
    assert list(base.samplers) == [1, 2, 3, 4, 5, 6, 8] and list(usual.samplers) == [4]
    assert usual.samplers[4] == SamplerConfig(steps=4, order="confidence", guidance_scale=3.0)
    assert len(contenders.base_contenders(emoji, [1], usual=False)) == 1
    with pytest.raises(ValueError, match=r"not searched at \[7, 14\] passes; known: \[1, 2"):
        contenders.base_contenders(emoji, [7])


def test_scores_of_a_field_have_the_budgets_and_trainings_of_each(tokenizer):
    field = {
        "base": contenders.Contender("base", [tiny_emoji(tokenizer)], {2: SamplerConfig(steps=2)}),
        "p": contenders.Contender(
            "p", [tiny_emoji(tokenizer, 1), tiny_emoji(tokenizer, 2)], {1: SamplerConfig(steps=1)}
        ),
    }
    frame = contenders.score(field, PROMPTS[:2], seeds=1)
    points = frame[["model", "budget", "training_seed"]].drop_duplicates().to_records(index=False).tolist()
    assert points == [("base", 2, 0), ("p", 1, 0), ("p", 1, 1)]
    times = contenders.timed(field, PROMPTS[:2], repeats=2)
    assert (times.seconds_total >= times.seconds_loop).all() and (times.seconds_loop > 0).all()
    timed = contenders.with_seconds(frame, times)
    assert list(timed.columns) == list(frame.columns)
    pd.testing.assert_frame_equal(
        timed.drop(columns=["seconds_loop", "seconds_total"]), frame.drop(columns=["seconds_loop", "seconds_total"])
    )
    assert set(timed[timed.model == "p"].seconds_loop) == set(times[times.model == "p"].seconds_loop)
    with pytest.raises(ValueError, match="no time of 'p' at budget 1"):
        contenders.with_seconds(frame, times[times.model == "base"])


def test_times_are_medians_of_turns_that_all_take_in_both_directions(tokenizer, monkeypatch):
    order, clock = [], iter([1.0, 10.0, 20.0, 3.0, 5.0, 90.0])

    def drawn(generator, prompts, sampler, seed):
        order.append(sampler.steps)
        seconds = next(clock)
        return None, {"seconds_loop": seconds / 2, "seconds_total": seconds}

    monkeypatch.setattr(contenders, "draw_pictures", drawn)
    samplers = {budget: SamplerConfig(steps=budget) for budget in (2, 1)}
    contender = contenders.Contender("p", [tiny_emoji(tokenizer)], samplers)
    times = contenders.timed({"p": contender}, PROMPTS, repeats=3).set_index("budget")
    assert order == [1, 2, 2, 1, 1, 2]
    assert times.seconds_total.to_dict() == {1: 3.0, 2: 20.0} and times.seconds_loop[1] == 1.5
    assert times.spread[1] == pytest.approx(4.0)


def test_a_field_is_made_of_weights_files(outputs, tokenizer, counted, monkeypatch):
    made = {outputs / name: headed(tokenizer, "none", seed) for seed, name in enumerate(("a", "b"))}
    monkeypatch.setattr(contenders, "load_generator", lambda family, device, file: made[file])
    field = contenders.field_of(tiny_emoji(tokenizer), {"p": list(made)}, PROMPTS, [1, 2], usual=False)
    assert list(field) == ["base", "p"] and field["p"].trainings == list(made.values())
    with pytest.raises(ValueError, match="two policies would share a name"):
        paced = headed(tokenizer, "paced")
        monkeypatch.setattr(contenders, "load_generator", lambda family, device, file: paced)
        contenders.field_of(tiny_emoji(tokenizer), {"p": [outputs], "p, own pace": [outputs]}, PROMPTS, [1])
