"""Training on tiny models of every family: adapters, number formats, checkpointing, and the notebook end to end."""

from dataclasses import replace

import pytest
import torch
from conftest import tiny_emoji

from speedrl_lab import notebooks
from speedrl_lab.adapters import merged
from speedrl_lab.config import SamplerConfig, TrainConfig
from speedrl_lab.generator import StepInfo
from speedrl_lab.generators import load_generator
from speedrl_lab.learner import Learner
from speedrl_lab.precision import halve, make_whole
from speedrl_lab.reward_table import reward_table
from speedrl_lab.rl import check, train
from speedrl_lab.runs import Run
from speedrl_lab.selftest import selftest

FAMILIES = ["emoji", "amused", "meissonic", "maskgit"]
CONFIG = TrainConfig(
    sampler=SamplerConfig(steps=2, order="halton", schedule="power"), iterations=2, num_groups=1, group_size=4,
    learning_rate=1e-2, warmup_iterations=0, lora_rank=2, quality_weights={"low": 1.0}, speed_weight=0.0, save_every=1,
)  # fmt: skip


def share_of_low_codes(images, prompts, trajectory):
    return (trajectory.tokens < 16).float().mean(1)


REWARDS = {"low": share_of_low_codes}


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    pytest.importorskip("peft")
    return request.param


@pytest.fixture
def generator(family, request, tokenizer):
    return tiny_emoji(tokenizer) if family == "emoji" else request.getfixturevalue("loaded")[family].copy()


@pytest.fixture
def name(family, request) -> str:
    return family if family == "emoji" else request.getfixturevalue("published")[family]


@pytest.fixture
def prompts(generator) -> list[str]:
    return ["tench"] if generator.spec.conditioning == "class" else ["a dog"]


def weights(generator) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in generator.policy.named_parameters()}


@pytest.mark.parametrize("policy_dtype", ["float32", "bfloat16"])
def test_adapters_are_all_that_changes_and_the_file_holds_them_merged(
    generator, name, prompts, policy_dtype, tmp_path
):
    before = weights(generator)
    config = replace(CONFIG, policy_dtype=policy_dtype)
    run = Run.open(tmp_path / "run", {})
    records = list(train(generator, prompts, REWARDS, config, run))
    assert records[1]["kl"] > 0 and records[0]["kl"] < 1e-6
    assert max(record["ratio_deviation"] for record in records) < (0.3 if policy_dtype == "bfloat16" else 1e-3)
    after = weights(generator)
    untouched = {key.replace(".base_layer", ""): value for key, value in after.items() if "lora_" not in key}
    assert untouched.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in untouched.items())
    adapters = [value for key, value in after.items() if "lora_B" in key]
    assert adapters and all(value.dtype == torch.float32 and value.abs().max() > 0 for value in adapters)
    loaded = load_generator(name, device="cpu", policy=run.path / "policy.safetensors")
    assert type(loaded.policy) is type(generator.policy)
    tokens = torch.full((1, generator.spec.num_tokens), generator.spec.mask_id)
    tuned, saved = (one.logits(tokens, one.encode(prompts), StepInfo(0, 2)) for one in (generator, loaded))
    assert float((tuned - saved).detach().abs().max()) < 0.01 * float(tuned.detach().abs().max())
    changed = [key for key, value in merged(generator.policy).named_parameters() if not torch.equal(value, before[key])]
    assert 0 < len(changed) < len(before)


def test_bfloat16_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(generator, prompts, tmp_path):
    config = replace(CONFIG, policy_dtype="bfloat16", iterations=3)
    twin = generator.copy()
    whole = list(train(generator, prompts, REWARDS, config))
    run = Run.open(tmp_path / "run", {})
    fresh = twin.copy()
    next(iter(train(twin, prompts, REWARDS, config, run)))
    rest = list(train(fresh, prompts, REWARDS, config, run))
    assert [record["kl"] for record in rest] == [record["kl"] for record in whole][1:]
    left, right = weights(generator), weights(fresh)
    assert all(torch.equal(value, right[key]) for key, value in left.items())


def test_checkpointing_leaves_the_gradients_or_is_refused(generator, prompts, family):
    config = replace(CONFIG, gradient_checkpointing=True, iterations=1)
    if family == "emoji":
        with pytest.raises(ValueError, match="gradient_checkpointing=True: generator 'emoji' has none; lower micro_b"):
            check(generator, prompts, REWARDS, config)
        return
    plain = generator.copy()
    (record,) = train(generator, prompts, REWARDS, config)
    (expected,) = train(plain, prompts, REWARDS, replace(config, gradient_checkpointing=False))
    assert record["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-4)
    assert generator.gradient_checkpointing if family != "maskgit" else generator.policy.gradient_checkpointing


@pytest.mark.parametrize("trained", ["policy", "schedule"])
def test_the_self_test_passes_with_rounded_weights(generator, prompts, trained):
    config = replace(CONFIG, policy_dtype="bfloat16")
    if trained == "schedule":
        sampler = SamplerConfig(steps=3, schedule="paced")
        config = replace(config, trained="schedule", lora_rank=0, sampler=sampler)
    before = weights(generator)
    assert selftest(generator, config, prompts, REWARDS).passed.all()
    assert all(torch.equal(value, before[key]) for key, value in weights(generator).items())


def test_rounding_spares_adapters_and_is_undone(emoji):
    pytest.importorskip("peft")
    learner = Learner(emoji, replace(CONFIG, policy_dtype="bfloat16"))
    kinds = {key: value.dtype for key, value in emoji.policy.named_parameters()}
    assert {kind for key, kind in kinds.items() if "lora_" in key} == {torch.float32}
    assert {kind for key, kind in kinds.items() if "lora_" not in key} == {torch.bfloat16}
    assert all(value.dtype == torch.float32 for value in learner.state()["reference"].values())
    learner.finish()
    assert {value.dtype for value in emoji.policy.parameters()} == {torch.float32}
    network = torch.nn.Linear(3, 2)
    weight = network.weight.detach().clone()
    make_whole(network, halve(network))
    assert torch.equal(network.weight, weight)


def test_rewards_judge_what_the_judges_do_not_know(loaded):
    models = {"before": loaded["amused"], "after": loaded["amused"].copy()}
    sampler = SamplerConfig(steps=1, schedule="power")
    table = reward_table(models, ["a dog", "two cats", "a pig"], [1, 4], REWARDS, sampler, seeds=2, batch_size=2)
    assert len(table) == 8 and list(table.columns[:3]) == ["model", "budget", "seed"]
    assert (table.steps == table.budget).all() and (table.forwards == table.budget).all()
    assert table.low.between(0, 1).all() and (table.diversity > 0).all()
    assert (table.seconds_total > table.seconds_loop).all()
    same = table.pivot(index=["budget", "seed"], columns="model", values="low")
    assert (same.before == same.after).all() and same.before.nunique() > 1
    with pytest.raises(ValueError, match="nothing to score"):
        reward_table(models, [], [1], REWARDS, sampler)


@pytest.mark.slow
def test_the_notebook_trains_a_published_model(published, tmp_path, monkeypatch):
    monkeypatch.setenv("SPEEDRL_OUTPUTS", str(tmp_path / "outputs"))
    file = tmp_path / "prompts.txt"
    file.write_text("a dog\ntwo cats\na dog above a cat\na cat\n")
    executed = notebooks.run(
        "03_speed_rl", output=tmp_path / "nb", preset="smoke", generator=published["amused"], prompt_file=str(file),
        run="tiny", iterations=2, lora_rank=2, policy_dtype="bfloat16", gradient_checkpointing=True, steps=4,
        negative_prompt="blurry", quality_weights={"novelty": 1.0}, watched=["clip"],
    )  # fmt: skip
    card = (tmp_path / "outputs" / "tiny" / "card.md").read_text()
    assert executed.is_file() and "**negative_prompt**: blurry" in card and "reward novelty" in card
