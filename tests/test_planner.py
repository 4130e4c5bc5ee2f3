"""What a run will cost: passes as they are counted later, memory within a factor of what is taken, clear refusals."""

from dataclasses import replace

import psutil
import pytest
import torch
from conftest import share_of_twos, tiny_emoji

from speedrl_lab.adapters import add_lora
from speedrl_lab.config import SamplerConfig, TrainConfig
from speedrl_lab.generators import load_generator
from speedrl_lab.planner import GIB, free_memory, passes, plan
from speedrl_lab.presets import PRESETS
from speedrl_lab.rewards import build_rewards
from speedrl_lab.rl import train

CAPTIONS = ["a dog", "two cats"]
CLASSES = ["tench", "golden retriever"]
CONFIG = TrainConfig(
    sampler=SamplerConfig(steps=3, order="halton", schedule="power"), iterations=2, num_groups=2, group_size=8,
    micro_batch_size=16, quality_weights={"twos": 1.0}, speed_weight=0.0,
)  # fmt: skip
REWARDS = {"twos": share_of_twos}


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("emoji", {}),
        ("amused", {}),
        ("amused", {"gradient_checkpointing": True}),
        ("meissonic", {"lora_rank": 2}),
        ("maskgit", {"sampler": SamplerConfig(steps=3, schedule="power", guidance_scale=2.0)}),
    ],
)
def test_the_peak_is_what_training_takes(family, change, request, tokenizer, benchmark):
    """Tiny models: what is small beside activations in large ones, such as the sampler's books, is not here."""
    config = replace(CONFIG, **change)
    generator = tiny_emoji(tokenizer) if family == "emoji" else request.getfixturevalue("loaded")[family].copy()
    prompts = CLASSES if family == "maskgit" else CAPTIONS
    generator.encode(prompts)
    planned = plan(generator, config, REWARDS)
    taken = benchmark.peak(lambda: list(train(generator, prompts, REWARDS, config)), torch.device("cpu"))
    assert planned.fits and planned.held > 0
    assert taken / 1.3 < planned.needed - planned.held < taken * 1.3  # measured: 1.01 to 1.12 of what is taken


@pytest.mark.parametrize("change", [{}, {"inner_epochs": 2}, {"estimator": "critical"}, {"estimator": "coupled"}])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_passes_are_those_of_the_records(toy, change, guidance_scale):
    sampler = SamplerConfig(steps=3, schedule="power", guidance_scale=guidance_scale)
    config = replace(CONFIG, sampler=sampler, iterations=1, **change)
    (record,) = train(toy(), CAPTIONS, REWARDS, config)
    planned = passes(config, 4)
    assert planned["rollout"] == record["forwards"]
    assert sum(planned.values()) == record["passes"]


def test_passes_are_a_bound_where_steps_vary_and_a_frozen_network_is_not_updated(toy):
    config = replace(CONFIG, sampler=SamplerConfig(steps=4, schedule="paced"), iterations=1)
    (record,) = train(toy(pace=True), CAPTIONS, REWARDS, config)
    assert record["passes"] < sum(passes(config, 4).values())
    assert list(passes(replace(config, trained="schedule"), 4)) == ["rollout"]
    with pytest.raises(ValueError, match="steps=4: expected 1 to 3"):
        passes(config, 3)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("amused-256", 603_537_664), ("amused-512", 608_257_792), ("meissonic", 1_006_946_304), ("maskgit", 479_984_641)],
)
def test_published_sizes_are_planned_without_being_made(name, parameters):
    pytest.importorskip("diffusers")
    before = psutil.Process().memory_info().rss
    preset = PRESETS[name].train
    planned = plan(name, preset, list(preset.quality_weights), free=0, device="cuda")
    assert psutil.Process().memory_info().rss - before < GIB  # the weights alone are 2 to 4
    stays = planned.stays
    adapters = stays["gradients"]
    assert stays["policy"] == 2 * parameters + adapters  # bfloat16 below float32
    assert stays["optimizer"] == 2 * adapters and 0 < adapters < 0.05 * 4 * parameters
    assert "reference" not in stays and stays["codec"] > 4 * 70e6
    assert max(planned.peaks, key=planned.peaks.get).startswith(("update", "rollout", "decoding"))
    assert planned.needed < 78 * GIB, "a preset should fit into a GPU of 80 GB"
    with pytest.raises(MemoryError, match=r"^the run needs \d+\.\d\d GiB on cuda and 0.00 GiB can be had") as caught:
        planned.require_fit()
    assert "\n" not in str(caught.value)


def test_the_knobs_that_are_named_help(loaded):
    generator = loaded["amused"]
    base = plan(generator, CONFIG, free=0)
    with pytest.raises(MemoryError, match=r"most goes to: update.*Turn micro_batch_size=4, gradient_checkpoint"):
        base.require_fit()
    for knobs in ({"micro_batch_size": 4}, {"gradient_checkpointing": True}, {"lora_rank": 2}):
        assert plan(generator, replace(CONFIG, **knobs), free=0).needed < base.needed, knobs
    large = replace(CONFIG, num_groups=64, micro_batch_size=1)
    with pytest.raises(MemoryError, match=r"Turn num_groups=32, group_size=4"):
        plan(generator, large, free=0).require_fit()
    half = replace(CONFIG, lora_rank=2, policy_dtype="bfloat16")
    assert plan(generator, half, free=0).stays["policy"] < 0.6 * base.stays["policy"]


def test_what_is_there_already_is_not_wanted_twice(loaded):
    generator = loaded["maskgit"]
    planned = plan(generator, CONFIG, free=0)
    assert plan(generator, CONFIG, free=planned.needed - planned.held).fits
    assert not plan(generator, CONFIG, free=planned.needed - planned.held - 1).fits
    more = plan(generator, CONFIG, free=0, copies=1)
    assert more.stays["other copies of the policy"] == planned.stays["policy"]


def test_reward_models_are_counted_where_they_are(emoji):
    rewards = build_rewards(["clip", "detector", "speed"])
    planned = plan(emoji, CONFIG, rewards)
    assert 1e6 < planned.stays["reward models"] < 100e6
    named = plan(emoji, CONFIG, ["hpsv2.1", "pickscore:folder@cuda", "speed"], device="cpu")
    assert named.stays["reward models"] == 986_109_441 * 4
    assert "reward models" not in plan(emoji, CONFIG, {"speed": rewards["speed"]}).stays


def test_planning_changes_nothing(loaded):
    generator = loaded["meissonic"].copy()
    before = {name: value.clone() for name, value in generator.policy.state_dict().items()}
    random = torch.get_rng_state()
    plan(generator, replace(CONFIG, lora_rank=2, policy_dtype="bfloat16", gradient_checkpointing=True))
    after = generator.policy.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(random, torch.get_rng_state()) and not generator.gradient_checkpointing
    assert all(value.grad is None for value in generator.policy.parameters())


def test_an_adapter_that_is_there_is_planned_as_it_is(emoji):
    fresh = plan(emoji, replace(CONFIG, lora_rank=2))
    add_lora(emoji, 2)
    assert plan(emoji, CONFIG).stays == fresh.stays


def test_the_table_and_the_notebook_show_it(emoji):
    planned = plan(emoji, CONFIG)
    assert "passes in all" in str(planned) and "<table" in planned._repr_html_()
    assert str(sum(planned.passes.values()) * 2) in str(planned).replace(",", "")
    assert 0 < free_memory("cpu") <= psutil.virtual_memory().total


def test_other_names_and_missing_settings_are_refused(emoji):
    with pytest.raises(ValueError, match="no published size 'amused'; nearest: 'amused-"):
        plan("amused")
    with pytest.raises(ValueError, match="config=None: expected the TrainConfig"):
        plan(load_generator("tiny", device="cpu"))
