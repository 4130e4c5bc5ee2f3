"""Meissonic: recorded logits of its own code, and a tiny folder in the published layout from end to end."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, weights_of
from meissonic_fixtures import build_tiny_meissonic, change_config, fill
from published_fixtures import save_codec, save_text_encoder
from safetensors.torch import load_file, save_file
from torch import Tensor

from speedrl_lab.adapters import add_lora, has_adapter
from speedrl_lab.config import SamplerConfig, TrainConfig
from speedrl_lab.generator import StepInfo
from speedrl_lab.generators.meissonic import MeissonicGenerator, load_meissonic
from speedrl_lab.likelihood import trajectory_log_prob
from speedrl_lab.pace import PaceHead
from speedrl_lab.rl import train
from speedrl_lab.sampler import sample

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
RECORDED = np.load(GOLDEN / "meissonic_tiny.npz", allow_pickle=False)
KINDS, CONDITIONINGS = ("down", "flat"), ("step_index", "mask_ratio")
CPU, STEP = torch.device("cpu"), StepInfo(0, 4)
PROMPTS = ["a dog", "two cats on red", "a dog"]


def recorded(name: str) -> Tensor:
    return torch.from_numpy(RECORDED[name])


def settings(name: str):
    return json.loads(str(RECORDED[name]))


def make(kind: str, **changes):
    """The recorded network `down`, `flat` or `full`, empty."""
    from speedrl_lab.generators.meissonic_transformer import MeissonicTransformer

    return MeissonicTransformer(**settings(f"config_{kind}") | changes)


@pytest.fixture(scope="module")
def networks():
    return {kind: fill(make(kind)) for kind in KINDS}


def inputs(grid: str, time: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Recorded arguments of the network: grid `sq` or `ns`, time `ta` or `tb`."""
    timestep = recorded("timesteps")[["ta", "tb"].index(time)][None]
    text = (recorded(name).to(dtype) for name in ("text", "pooled"))
    return recorded(f"ids_{grid}"), *text, recorded("micro_conds"), timestep


def shapes(network) -> list[list]:
    return sorted([key, list(value.shape)] for key, value in network.state_dict().items())


def worst(given: Tensor, expected: Tensor) -> float:
    return float((given.float() - expected.float()).detach().abs().max())


# --- the network


@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_fill_are_the_recorded_ones(networks, kind):
    assert shapes(networks[kind]) == settings(f"keys_{kind}")
    state = networks[kind].state_dict()
    for index, (key, _) in enumerate(settings(f"keys_{kind}")):
        value = state[key].double()
        assert float(value.sum()) == pytest.approx(RECORDED[f"fill_sum_{kind}"][index], abs=1e-3)
        assert float(value.abs().sum()) == pytest.approx(RECORDED[f"fill_abs_sum_{kind}"][index], abs=1e-3)


def sinusoid_error(network) -> float:
    """How far this machine's sinusoid of 7000 is from the recorded one."""
    return worst(network.time_text_embed.time_proj(torch.tensor([7000.0])), recorded("stage_time_sinusoid"))


@pytest.mark.parametrize("time", ["ta", "tb"])
@pytest.mark.parametrize("grid", ["sq", "ns"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_recorded_ones(networks, kind, grid, time):
    # A maths library that rounds a frequency otherwise turns the phase of 7000 by up to 5e-4.
    tolerance = 2e-3 if time == "tb" and sinusoid_error(networks[kind]) > 1e-6 else 1e-5
    with torch.no_grad():
        logits = networks[kind](*inputs(grid, time))
    assert logits.shape == recorded(f"logits_{kind}_{grid}_{time}").shape  # (B, V, H, W)
    assert worst(logits, recorded(f"logits_{kind}_{grid}_{time}")) <= tolerance


def test_stages_are_the_recorded_ones(networks):
    network, seen = networks["down"], {}
    modules = {
        "cond_embed": network.cond_embed, "time_sinusoid": network.time_text_embed.time_proj,
        "temb": network.time_text_embed, "embed": network.embed, "context": network.encoder_proj_layer_norm,
        "down_block": network.down_block["downsample"], "project_to_hidden": network.project_to_hidden,
        "double": network.transformer_blocks[-1], "single": network.single_transformer_blocks[-1],
        "project_from_hidden": network.project_from_hidden,
    }  # fmt: skip
    hooks = [
        module.register_forward_hook(lambda _, given, result, name=name: seen.update({name: (given, result)}))
        for name, module in modules.items()
    ]
    with torch.no_grad():
        network(*inputs("sq", "tb"))
    for hook in hooks:
        hook.remove()
    stages = {name: result for name, (_, result) in seen.items() if name not in ("double", "single")}
    stages["cond_input"] = seen["cond_embed"][0][0]
    stages["double_text"], stages["double_image"] = seen["double"][1]
    stages["single"] = torch.cat(seen["single"][1], 1)  # text first
    stages["rope_cos"], stages["rope_sin"] = network.rotations(7, 4, 4)
    names = {name.removeprefix("stage_") for name in RECORDED.files if name.startswith("stage_")}
    assert names == set(stages)
    tolerance = 2e-3 if sinusoid_error(network) > 1e-6 else 1e-5
    off = {name: error for name in names if not (error := worst(stages[name], recorded("stage_" + name))) <= tolerance}
    assert off == {}


def test_the_published_size_has_the_published_keys():
    with torch.device("meta"):
        network = make("full")
        by_default = type(network)()
    assert shapes(by_default) == shapes(network)
    assert shapes(network) == settings("keys_full") and len(settings("keys_full")) == 867
    assert sum(parameter.numel() for parameter in network.parameters()) == 1_006_946_304
    published = {key: value for key, value in network.config.items() if key in settings("config_full")}
    assert published == settings("config_full")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float16, 0.02), (torch.bfloat16, 0.12)])
def test_other_number_formats_stay_close(dtype, tolerance):
    """Recorded for `ta`: 0.008 in float16, 0.06 in bfloat16."""
    from diffusers.models.normalization import RMSNorm

    network = fill(make("down")).to(dtype)
    with torch.no_grad():
        assert worst(network(*inputs("sq", "ta", dtype)), recorded("logits_down_sq_ta")) < tolerance
    norms = [module for name, module in network.named_modules() if ".norm_" in name and name.split(".")[-2] == "attn"]
    assert len(norms) == 2 * 4 + 3 * 2 and all(type(norm) is RMSNorm for norm in norms)  # float32 inside


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_round_the_time(networks, dtype):
    network = fill(make("down")).to(dtype)
    _, text, pooled, micro, _ = inputs("sq", "ta", dtype)
    with torch.no_grad():
        for time in (63.0, 800.0):  # float16 ends at 65504, bfloat16 has 62976 for 63000
            exact = networks["down"].time_and_text(pooled.float(), micro, torch.tensor([time]))
            assert worst(network.time_and_text(pooled, micro, torch.tensor([time])), exact) < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_rotary_positions_follow_the_config_not_the_picture(networks, kind):
    """The same picture, 6x10 tokens: a network that halves the grid counts 3x5 positions, the other 6x10."""
    rows, columns = (3, 5) if kind == "down" else (6, 10)
    seen = []
    hook = networks[kind].transformer_blocks[0].register_forward_hook(lambda _, given, __: seen.append(given[3]))
    with torch.no_grad():
        networks[kind](*inputs("ns", "ta"))
    hook.remove()
    cosines, sines = seen[0]
    assert cosines.shape == sines.shape == (7 + rows * columns, 16)
    assert worst(cosines[:7], torch.ones(7, 16)) == 0 and worst(sines[:7], torch.zeros(7, 16)) == 0  # text is at 0
    row, column = 2, 4
    angles = [0.0, 0.0]  # axes of 4, 6, 6 channels, each angle twice
    for position in (row, column):
        angles += [position / 10000 ** (pair / 3) for pair in range(3)]
    expected = torch.tensor(angles).repeat_interleave(2)
    at = 7 + row * columns + column
    assert worst(cosines[at], expected.cos()) < 1e-6 and worst(sines[at], expected.sin()) < 1e-6


def test_times_may_differ_between_rows(networks):
    ids, text, pooled, micro, _ = inputs("sq", "ta")
    with torch.no_grad():
        both = networks["down"](ids, text, pooled, micro, recorded("timesteps"))
    assert worst(both[:1], recorded("logits_down_sq_ta")[:1]) < 1e-5
    assert worst(both[1:], recorded("logits_down_sq_tb")[1:]) < 2e-3


def test_checkpointing_recomputes_both_kinds_of_block_for_the_same_gradients(networks):
    network, calls = fill(make("down")), []
    for block in (network.transformer_blocks[0], network.single_transformer_blocks[0]):
        block.register_forward_pre_hook(lambda module, *_: calls.append(type(module).__name__))
    gradients, counts = [], []
    for checkpointed in (False, True):
        network.zero_grad()
        if checkpointed:
            network.enable_gradient_checkpointing()
        network(*inputs("sq", "ta")).square().mean().backward()
        gradients.append({key: value.grad.clone() for key, value in network.named_parameters()})
        counts.append({name: calls.count(name) for name in calls})
        calls.clear()
    assert set(counts[0].values()) == {1} and set(counts[1].values()) == {2} and len(counts[1]) == 2
    assert all(worst(value, gradients[0][key]) <= 1e-6 for key, value in gradients[1].items())
    assert min(float(value.abs().max()) for value in gradients[0].values()) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooled_projection_dim": 24}, r"pooled_projection_dim=24: expected heads \* head_dim = 32"),
        ({"axes_dims_rope": [4, 4, 4]}, "expected even numbers that add up to head_dim = 16"),
        ({"guidance_embeds": True}, "guidance_embeds=True: no published Meissonic"),
        ({"upsample": False}, "downsample=True, upsample=False: the two must agree"),
    ],
)
def test_configs_that_are_no_meissonic_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make("down", **changes)


def test_odd_grids_are_refused_where_the_network_halves_them(networks):
    ids, *rest = inputs("sq", "ta")
    with pytest.raises(ValueError, match=r"grid \(7, 8\): this network halves it; expected even"):
        networks["down"](ids[:, :7], *rest)
    assert networks["flat"](ids[:, :7], *rest).shape == (2, 32, 7, 8)


# --- the generator


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build_tiny_meissonic(tmp_path_factory.mktemp("published") / "tiny")


@pytest.fixture
def generator(folder) -> MeissonicGenerator:
    return load_meissonic(folder, CPU)


@pytest.fixture
def broken(folder, tmp_path) -> Path:
    """A copy of the folder to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "broken"))


def half_masked(generator: MeissonicGenerator, count: int = 3) -> Tensor:
    num_tokens = generator.spec.num_tokens
    tokens = torch.randint(32, (count, num_tokens), generator=torch.Generator().manual_seed(0))
    tokens[:, : num_tokens // 2] = generator.spec.mask_id
    return tokens


def low_codes(images, prompts, trajectory) -> Tensor:
    """A toy reward: the share of codes below 16."""
    return (trajectory.tokens < 16).float().mean(1)


def test_a_published_folder_describes_itself(generator, folder):
    spec = generator.spec
    assert (spec.grid, spec.image_size) == ((8, 8), (32, 32))
    assert (spec.codebook_size, spec.mask_id, spec.conditioning) == (32, 39, "text")
    assert spec.name == f"meissonic:{folder}" and spec.time_input == "step_index"
    assert generator.describe() == {
        "family": "meissonic", "time_conditioning": "step_index", "text_encoder": "own", "negative_prompt": "",
    }  # fmt: skip


@pytest.mark.parametrize(("halved", "side"), [(True, 64), (False, 32)])
def test_the_layout_follows_from_the_config(halved, side):
    with torch.device("meta"):
        assert make("full", downsample=halved, upsample=halved).side == side


def test_any_picture_that_fits_the_grid_can_be_asked_for(folder, tmp_path):
    wide = load_meissonic(folder, CPU, image_size=(24, 40))
    assert (wide.spec.grid, wide.spec.image_size) == ((6, 10), (24, 40))
    assert wide.micro_conditions(1).tolist() == [[40.0, 24.0, 0.0, 0.0, 6.0]]  # width first
    trajectory = sample(wide, PROMPTS, SamplerConfig(steps=2), seed=0)
    assert wide.decode(trajectory.tokens).shape == (3, 3, 24, 40)
    flat = load_meissonic(build_tiny_meissonic(tmp_path / "flat", layout_1024=False), CPU, image_size=(20, 12))
    assert flat.spec.grid == (5, 3)
    assert flat.logits(half_masked(flat), flat.encode(PROMPTS), STEP).shape == (3, 15, 32)
    with pytest.raises(ValueError, match=r"image_size=\(20, 12\): expected multiples of 8 .* nearest: \(16, 16\)"):
        load_meissonic(folder, CPU, image_size=(20, 12))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_logits_are_the_networks_own_at_the_time_they_are_told(folder, conditioning):
    generator = load_meissonic(folder, CPU, time_conditioning=conditioning)
    assert generator.spec.time_input == generator.describe()["time_conditioning"] == conditioning
    tokens, cond, step = half_masked(generator), generator.encode(PROMPTS), StepInfo(1, 4)
    tokens[1, :48] = generator.spec.mask_id
    times = {"step_index": [2.0], "mask_ratio": [500.0, 750.0, 500.0]}[conditioning]  # T-1-i; 1000 * share
    assert generator.timestep(tokens, step).tolist() == times
    micro = torch.tensor([[32.0, 32.0, 0.0, 0.0, 6.0]]).repeat(3, 1)
    with torch.no_grad():
        expected = generator.policy(
            tokens.view(3, 8, 8), cond.tensors["text"], cond.tensors["pooled"], micro, torch.tensor(times)
        )
        logits = generator.logits(tokens, cond, step)
    assert logits.dtype == torch.float32 and logits.shape == (3, 64, 32)
    assert worst(logits, expected.flatten(2).transpose(1, 2)) < 1e-5
    rows = torch.tensor([0, 7, 64, 191, 7])
    assert worst(generator.logits(tokens, cond, step, rows), logits.flatten(0, 1)[rows]) < 1e-5


def test_the_step_moves_the_logits_only_where_it_is_told(folder):
    for conditioning, moved in (("step_index", True), ("mask_ratio", False)):
        generator = load_meissonic(folder, CPU, time_conditioning=conditioning)
        tokens, cond = half_masked(generator), generator.encode(PROMPTS)
        first, later = (generator.logits(tokens, cond, StepInfo(index, 4)) for index in (0, 3))
        assert (worst(first, later) > 1e-2) == moved


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_sampled_trajectories_replay(folder, conditioning, scale):
    generator = load_meissonic(folder, CPU, time_conditioning=conditioning, negative_prompt="blurry")
    sampler = SamplerConfig(steps=3, guidance_scale=scale)
    trajectory = sample(generator, PROMPTS, sampler, seed=0)
    assert int(trajectory.tokens.max()) < 32 and trajectory.forwards.tolist() == [3 if scale == 1.0 else 6] * 3
    with torch.no_grad():
        replayed = trajectory_log_prob(generator, PROMPTS, trajectory, sampler)
    assert torch.allclose(replayed, trajectory.log_prob.sum(1), atol=1e-3)
    images = generator.decode(trajectory.tokens)
    assert images.shape == (3, 3, 32, 32) and float(images.min()) >= 0 and float(images.max()) <= 1


@pytest.mark.parametrize(("conditioning", "lora"), [("step_index", 0), ("mask_ratio", 2)])
def test_two_iterations_of_training(folder, conditioning, lora, tmp_path):
    generator = load_meissonic(folder, CPU, time_conditioning=conditioning)
    generator.enable_gradient_checkpointing()
    config = TrainConfig(
        sampler=SamplerConfig(steps=3, schedule="paced"), iterations=2, num_groups=2, group_size=4, lora_rank=lora,
        learning_rate=1e-3, warmup_iterations=0, quality_weights={"low": 1.0}, micro_batch_size=8,
    )  # fmt: skip
    untouched = {key: value.clone() for key, value in generator.policy.state_dict().items()}
    records = list(train(generator, PROMPTS[:2], {"low": low_codes}, config))
    assert len(records) == 2 and all(np.isfinite(record["reward"]) for record in records)
    assert records[0]["kl"] == pytest.approx(0, abs=1e-5) and records[0]["gradient_norm"] > 0
    assert records[0]["ratio_deviation"] < 1e-3  # the replay is the rollout
    path = tmp_path / "policy.safetensors"
    generator.save_policy(path)
    assert sorted([key, list(value.shape)] for key, value in load_file(path).items()) == sorted(
        [key, list(value.shape)] for key, value in untouched.items()
    )
    loaded = load_meissonic(folder, CPU, path, time_conditioning=conditioning)
    tokens, cond = half_masked(generator), generator.encode(PROMPTS)
    after = generator.logits(tokens, cond, STEP)
    assert worst(loaded.logits(tokens, cond, STEP), after) < 1e-5
    assert worst(load_meissonic(folder, CPU, time_conditioning=conditioning).logits(tokens, cond, STEP), after) > 1e-4
    assert loaded.pace is not None


def test_lora_reaches_text_and_picture_in_both_kinds_of_block(generator):
    add_lora(generator, rank=2)
    assert has_adapter(generator.policy)
    adapted = {name.split(".lora_A")[0] for name, _ in generator.policy.named_parameters() if ".lora_A" in name}
    ends = {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    expected = {f"transformer_blocks.0.attn.{end}" for end in ends}
    expected |= {f"single_transformer_blocks.0.attn.{end}" for end in ("to_q", "to_k", "to_v")}
    assert adapted == expected


def test_saved_policies_are_what_the_published_layout_holds(generator, folder, broken, tmp_path):
    with torch.no_grad():
        for parameter in generator.policy.parameters():
            parameter.mul_(1.1)
    generator.pace = PaceHead().reset(0)
    generator.save_policy(tmp_path / "policy.safetensors", origin="a test")
    shutil.copy(tmp_path / "policy.safetensors", broken / "transformer" / "diffusion_pytorch_model.safetensors")
    again = load_meissonic(broken, CPU)
    assert torch.equal(weights_of(again), weights_of(generator)[: len(weights_of(again))])
    assert again.pace is None  # it lies beside the policy
    with_pace = load_meissonic(folder, CPU, policy=tmp_path / "policy.safetensors")
    assert torch.equal(weights_of(with_pace), weights_of(generator))


def test_another_text_encoder_can_be_taken(folder, broken, tmp_path):
    save_text_encoder(tmp_path / "other", 24, 32, seed=77)
    other = load_meissonic(folder, CPU, text_encoder=tmp_path / "other")
    own = load_meissonic(folder, CPU)
    assert other.describe()["text_encoder"] == str(tmp_path / "other")
    assert worst(other.encode(PROMPTS).tensors["text"], own.encode(PROMPTS).tensors["text"]) > 1e-2
    shutil.rmtree(broken / "text_encoder")
    borrowed = load_meissonic(broken, CPU, text_encoder=folder)  # a folder with a text_encoder inside
    assert worst(borrowed.encode(PROMPTS).tensors["text"], own.encode(PROMPTS).tensors["text"]) < 1e-6
    with pytest.raises(FileNotFoundError, match="text_encoder/config.json.*MeissonFlow/Meissonic"):
        load_meissonic(broken, CPU)
    with pytest.raises(FileNotFoundError, match="nothing lacks config.json.*laion/CLIP-ViT-H-14-laion2B-s32B-b79K"):
        load_meissonic(folder, CPU, text_encoder=tmp_path / "nothing")


def test_unknown_time_conditionings_are_refused(folder):
    with pytest.raises(ValueError, match="time_conditioning='mask' is not known; nearest: 'mask_ratio'"):
        load_meissonic(folder, CPU, time_conditioning="mask")


def test_folders_of_other_models_are_refused(broken):
    change_config(broken, _class_name="UVit2DModel", num_single_layers=None)
    with pytest.raises(ValueError, match="holds a UVit2DModel, expected Meissonic's Transformer2DModel"):
        load_meissonic(broken, CPU)


@pytest.mark.parametrize("side", ["too few", "too many"])
def test_networks_that_do_not_fit_their_config_are_refused(broken, side):
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    if side == "too few":
        save_file({key: value for key, value in load_file(weights).items() if "norm_q" not in key}, weights, {})
    else:
        change_config(broken, downsample=False, upsample=False)
    with pytest.raises(ValueError, match=r"transformer .*(missing|unexpected) keys") as raised:
        load_meissonic(broken, CPU)
    assert "\n" not in str(raised.value)


def test_parts_of_different_models_are_refused(broken):
    shutil.rmtree(broken / "vqvae")
    save_codec(broken / "vqvae", 16, seed=0)
    with pytest.raises(ValueError, match="codec has codes 16, the network expects 32"):
        load_meissonic(broken, CPU)
    shutil.rmtree(broken / "text_encoder")
    save_text_encoder(broken / "text_encoder", 16, 32, seed=0)
    save_codec(broken / "vqvae", 32, seed=0)
    with pytest.raises(ValueError, match="states of width 16, the network expects 24"):
        load_meissonic(broken, CPU)


def test_policies_of_another_network_are_refused(generator, tmp_path):
    path, before = tmp_path / "policy.safetensors", weights_of(generator)
    generator.save_policy(path)
    tensors = load_file(path)
    tensors["context_embedder.bias"] = tensors["context_embedder.bias"][:5]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match="does not fit the network in 1 of .*context_embedder.bias"):
        generator.load_policy(path)
    assert torch.equal(weights_of(generator), before)
