"""The settings: one name for each knob, presets, strict flat access."""

import inspect
import json
from dataclasses import FrozenInstanceError, fields, replace

import pytest

from speedrl_lab import config as config_module
from speedrl_lab.config import (
    DistillConfig,
    EvalConfig,
    PretrainConfig,
    RunConfig,
    SamplerConfig,
    TrainConfig,
    flat_fields,
    nearest,
)
from speedrl_lab.generators import load_generator
from speedrl_lab.presets import PRESETS


def test_a_knob_that_is_none_stays_as_the_preset_says():
    config = RunConfig.from_flat("smoke", iterations=None, speed_weight=None, seed=3)
    assert config.train.iterations == PRESETS["smoke"].train.iterations
    assert config.train.seed == 3


def test_an_unknown_knob_is_refused_even_if_it_is_none():
    with pytest.raises(TypeError, match="unknown parameter 'iteration'; nearest: 'iterations'"):
        RunConfig.from_flat("smoke", iteration=None)


@pytest.mark.parametrize("preset", PRESETS)
def test_json_gives_the_same_config_back(preset):
    config = RunConfig.from_flat(preset, seed=7)
    assert RunConfig.from_flat(**json.loads(config.to_json())) == config


def test_the_preset_comes_from_the_environment_where_none_is_given(monkeypatch):
    monkeypatch.setenv("SPEEDRL_PRESET", "smoke")
    assert RunConfig.from_flat("") == PRESETS["smoke"]
    assert RunConfig.from_flat("emoji") == PRESETS["emoji"]
    monkeypatch.setenv("SPEEDRL_PRESET", "smoek")
    with pytest.raises(ValueError, match="unknown preset 'smoek'; nearest: 'smoke'"):
        RunConfig.from_flat()


def test_names_are_unique_over_all_classes():
    nested = {"train", "sampler", "distillation", "evaluation", "pretrain"}
    classes = (RunConfig, TrainConfig, SamplerConfig, DistillConfig, EvalConfig, PretrainConfig)
    names = [field.name for owner in classes for field in fields(owner) if field.name not in nested]
    assert len(names) == len(set(names))
    assert set(flat_fields()) == set(names) == set(RunConfig().flat())


def test_each_knob_lands_in_its_class():
    config = RunConfig.from_flat(
        "smoke", device="cpu", speed_weight=0.2, steps=3, schedule="paced", budgets=[1, 3], depth=2,
        quality_weights={"clip": 1, "novelty": 0.5}, learning_rate=1,
    )  # fmt: skip
    assert config.device == "cpu" and config.preset == "smoke"
    assert config.train.speed_weight == 0.2 and config.train.quality_weights["novelty"] == 0.5
    assert config.train.sampler == replace(PRESETS["smoke"].train.sampler, steps=3, schedule="paced")
    assert config.evaluation.budgets == (1, 3) and config.pretrain.depth == 2
    assert type(config.train.learning_rate) is float
    assert PRESETS["smoke"].train.sampler.steps == 8  # presets stay


def test_flat_settings_round_trip_with_every_kind_of_knob():
    config = RunConfig.from_flat(
        "emoji", budgets=(2, 4), quality_weights={"clip": 1.0, "coherence": 0.5}, order="random",
        low_quality="clip", filter_quantile=0.2, greedy_pace=False, split="composition", num_groups=4,
    )  # fmt: skip
    assert RunConfig.from_flat(**config.flat()) == config
    assert RunConfig.from_flat(**json.loads(config.to_json())) == config


@pytest.mark.parametrize(
    "knobs, error, words",
    [
        ({"preset": "emjoi"}, ValueError, "unknown preset 'emjoi'; nearest: 'emoji' .one of smoke, sweep, "),
        ({"speed_wieght": 0.1}, TypeError, "unknown parameter 'speed_wieght'; nearest: 'speed_weight'"),
        ({"steps": 4.0}, TypeError, "steps=4.0 has type float, expected int"),
        ({"steps": True}, TypeError, "steps=True has type bool, expected int"),
        ({"steps": "4"}, TypeError, "steps='4' has type str, expected int"),
        ({"greedy_pace": "false"}, TypeError, "greedy_pace='false' has type str, expected bool"),
        ({"learning_rate": float("nan")}, TypeError, "learning_rate=nan"),
        ({"learning_rate": "fast"}, TypeError, "learning_rate='fast' has type str, expected float"),
        ({"budgets": 4}, TypeError, "budgets=4 has type int"),
        ({"budgets": [1, 2.5]}, TypeError, "budgets="),
        ({"quality_weights": "clip"}, TypeError, "quality_weights='clip' has type str"),
        ({"order": 3}, TypeError, "order=3 has type int"),
        ({"order": "haltom"}, ValueError, "order='haltom' is not known; nearest: 'halton'"),
        ({"low_quality": "dorp"}, ValueError, "low_quality='dorp' is not known; nearest: 'drop'"),
        ({"steps": 0}, ValueError, "steps=0: expected an integer of at least 1"),
        ({"temperature": 0}, ValueError, "temperature=0.0: expected a positive number"),
        ({"group_size": 1}, ValueError, "group_size=1: expected at least 2"),
        ({"num_groups": 0}, ValueError, "num_groups=0: expected at least 1"),
        ({"quality_weights": {}}, ValueError, "quality_weights={}: expected at least one reward name"),
        ({"filter_quantile": 1}, ValueError, "filter_quantile=1.0: expected a number in"),
        ({"budgets": []}, ValueError, "budgets=.*: expected step counts from 1"),
        ({"budgets": [0, 1]}, ValueError, "budgets=.*: expected step counts from 1"),
        ({"width": 40}, ValueError, "width=40: expected a multiple of 16"),
        ({"order": "confidence"}, ValueError, "schedule='paced' needs a model-independent order"),
        ({"order": "confidence", "schedule": "power", "speed_weight": 0.0, "revise": True}, ValueError,
         "revise=True needs a model-independent order"),
        ({"revise": True, "estimator": "critical"}, ValueError, "revise=True needs 'replay'"),
        ({"teacher_temperature": 0.0}, ValueError, "teacher_temperature=0.0: expected a positive number"),
        ({"stop_confidence": 0.0}, ValueError, "stop_confidence=0.0: expected a number above 0"),
        ({"speed_form": "hinge"}, ValueError, "speed_form='hinge' needs quality_floor"),
        ({"quality_floor": {"clip": 0.8}}, ValueError, "quality_floor acts with speed_form='hinge' only"),
        ({"speed_form": "multiplicative", "speed_weight": 0.0}, ValueError, "needs a speed_weight above 0"),
        ({"filter_quantile": 0.3}, ValueError, "filter_quantile and low_quality act together"),
        ({"order_factor": "token_only"}, ValueError, "order_factor='token_only' changes nothing without"),
        ({"quality_weights": {"clip": "1"}}, ValueError, "quality_weights=.*: expected a finite number for each name"),
        ({"quality_weights": {"clip": 1, "speed": 1}}, ValueError, "quality_weights holds 'speed'"),
        ({"weight_schedules": {"kl": [[0, "a"]]}}, ValueError, r"expected \[\[iteration, weight\], ...\]"),
        ({"trained": "head"}, ValueError, "trained='head' is not known; nearest: "),
        ({"trained": "schedule", "schedule": "power"}, ValueError, "schedule='power' leaves trained="),
        ({"trained": "schedule", "steps": 1}, ValueError, "steps=1 leaves the pace nothing to choose"),
        ({"trained": "schedule", "lora_rank": 2}, ValueError, "trained='schedule' leaves the policy as it is"),
        ({"trained": "schedule", "ema_decay": 0.9}, ValueError, "trained='schedule' leaves the policy as it is"),
        ({"schedule": "adaptive", "temperature": 0.8}, ValueError, "temperature=0.8: schedule='adaptive' chooses it"),
        ({"schedule": "adaptive", "guidance_scale": 2.0}, ValueError, "guidance_scale=2.0: schedule='adaptive'"),
        ({"schedule": "adaptive", "order": "confidence"}, ValueError, "schedule='adaptive' needs a model-independent"),
        ({"schedule": "adaptive", "estimator": "coupled"}, ValueError, "estimator='coupled' makes states without an"),
        ({"policy_dtype": "bfloat16"}, ValueError, "policy_dtype='bfloat16' is for weights that are not trained"),
        ({"policy_dtype": "float16"}, ValueError, "policy_dtype='float16' is not known; nearest: 'bfloat16'"),
        ({"trained": "schedule", "gradient_checkpointing": True}, ValueError, "gradient_checkpointing saves memory of"),
        ({"time_conditioning": "mask"}, ValueError, "time_conditioning='mask' is not known; nearest: 'mask_ratio'"),
        ({"generator": 3}, TypeError, "generator=3 has type int, expected str"),
        ({"save_every": 0}, ValueError, "save_every=0: expected at least 1"),
        ({"kl_estimator": "k4"}, ValueError, "kl_estimator='k4' is not known; nearest: 'k3'"),
    ],
)
def test_wrong_knobs_are_one_clear_line(knobs, error, words):
    with pytest.raises(error, match=words) as raised:
        RunConfig.from_flat(**{"preset": "emoji", **knobs})
    assert "\n" not in str(raised.value)


def test_paced_needs_an_order_known_beforehand():
    with pytest.raises(ValueError, match="schedule='paced' needs a model-independent order"):
        SamplerConfig(schedule="paced", order="confidence")


def test_settings_do_not_change_after_they_are_made():
    with pytest.raises(FrozenInstanceError):
        RunConfig().train.seed = 1


def test_every_field_is_described_in_the_source():
    source = inspect.getsource(config_module)
    for owner in (RunConfig, TrainConfig, SamplerConfig, DistillConfig, EvalConfig, PretrainConfig):
        for field in fields(owner):
            if field.name not in ("train", "distillation", "evaluation", "pretrain"):
                start = source.index(f"\n    {field.name}: ")
                assert '"""' in source[start : start + 200].split("\n")[2], field.name


def test_the_notebook_shows_what_differs_from_the_preset():
    text = RunConfig.from_flat("smoke", steps=3)._repr_markdown_()
    assert "preset `smoke`" in text and "- `steps` = `3` (preset: `8`)" in text
    assert "nothing changed" in RunConfig.from_flat("smoke")._repr_markdown_()


def test_the_nearest_name_looks_alike():
    assert nearest("cosin", ["linear", "cosine", "power"]) == "cosine"
    assert nearest("", ["linear"]) == "linear"


@pytest.mark.parametrize("preset", ["amused-256", "amused-512", "meissonic", "maskgit"])
def test_presets_of_published_models_train_adapters_and_want_a_place(preset):
    config = RunConfig.from_flat(preset)
    family = preset.partition("-")[0]
    assert config.generator == f"{family}:" and config.train.lora_rank > 0
    assert config.train.policy_dtype == "bfloat16" and config.train.sampler.guidance_scale > 1
    assert RunConfig.from_flat(preset, generator=f"{family}:somewhere").generator == f"{family}:somewhere"
    with pytest.raises(FileNotFoundError, match=f"generator '{family}:' names no f.*, then generator='{family}:<"):
        load_generator(config.generator)
