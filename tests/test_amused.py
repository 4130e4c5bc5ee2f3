"""aMUSEd: a tiny folder in the published layout against diffusers' own classes, and what training needs."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from published_fixtures import build_tiny_amused
from safetensors.torch import load_file, save_file
from torch import Tensor

from speedrl_lab.adapters import add_lora, has_adapter
from speedrl_lab.config import SamplerConfig, TrainConfig
from speedrl_lab.generator import StepInfo, can_revise
from speedrl_lab.generators.amused import AmusedGenerator, load_amused
from speedrl_lab.likelihood import trajectory_log_prob
from speedrl_lab.pace import PaceHead
from speedrl_lab.parity import sample_parity
from speedrl_lab.rl import train
from speedrl_lab.runs import Run
from speedrl_lab.sampler import sample

diffusers = pytest.importorskip("diffusers")
CPU, STEP = torch.device("cpu"), StepInfo(0, 4)
PROMPTS = ["a dog", "two cats on red", "a dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build_tiny_amused(tmp_path_factory.mktemp("published") / "tiny")


@pytest.fixture(scope="module")
def flat(tmp_path_factory) -> Path:
    """The 256-pixel layout, without resampling."""
    return build_tiny_amused(tmp_path_factory.mktemp("published") / "flat", resampling=False)


@pytest.fixture
def generator(folder) -> AmusedGenerator:
    return load_amused(folder, CPU)


@pytest.fixture
def broken(folder, tmp_path) -> Path:
    """A copy of the folder to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "broken"))


def half_masked(generator: AmusedGenerator, count: int = 3) -> Tensor:
    tokens = torch.randint(32, (count, 64), generator=torch.Generator().manual_seed(0))
    tokens[:, ::2] = generator.spec.mask_id
    return tokens


def reference_logits(generator: AmusedGenerator, tokens: Tensor, prompts: list[str]) -> Tensor:
    """What UVit2DModel itself computes, (B, N, V)."""
    cond = generator.encode(prompts).tensors
    micro = torch.tensor([[32.0, 32.0, 0.0, 0.0, 6.0]]).expand(len(tokens), -1)
    return generator.policy(tokens.unflatten(1, (8, 8)), cond["text"], cond["pooled"], micro).flatten(2).transpose(1, 2)


# --- parity


@pytest.mark.parametrize(
    ("layout", "guidance_scale", "negative", "steps"),
    [("folder", 10.0, "", 5), ("folder", 3.0, "a bad cat", 4), ("folder", 1.0, "", 4), ("flat", 6.0, "", 3)],
)
def test_parity_mode_paints_what_the_published_pipeline_paints(layout, guidance_scale, negative, steps, request):
    path = request.getfixturevalue(layout)
    generator = load_amused(path, CPU, negative_prompt=negative)
    pipeline = diffusers.AmusedPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)

    def published(output_type: str) -> Tensor:
        return pipeline(
            PROMPTS, num_inference_steps=steps, guidance_scale=guidance_scale, negative_prompt=[negative] * 3,
            generator=torch.Generator().manual_seed(7), output_type=output_type,
        ).images  # fmt: skip

    rng = torch.Generator().manual_seed(7)
    tokens = sample_parity(generator, generator.encode(PROMPTS), steps, rng, guidance_scale)
    assert torch.equal(tokens, published("latent").flatten(1))
    assert tokens.unique(dim=0).shape[0] == 3
    torch.testing.assert_close(generator.decode(tokens), published("pt"), atol=1e-5, rtol=0)  # another layout


def test_a_negative_prompt_matters(folder, generator):
    other = load_amused(folder, CPU, negative_prompt="a bad cat")
    tokens = half_masked(generator)
    difference = generator.logits(tokens, generator.null(3), STEP) - other.logits(tokens, other.null(3), STEP)
    assert float(difference.detach().abs().max()) > 0.01
    assert torch.equal(other.null(2).tensors["text"], other.encode(["a bad cat"] * 2).tensors["text"])


@pytest.mark.parametrize("layout", ["folder", "flat"])
def test_logits_are_those_of_the_network(layout, request):
    generator = load_amused(request.getfixturevalue(layout), CPU)
    tokens = half_masked(generator)
    logits = generator.logits(tokens, generator.encode(PROMPTS), STEP)
    assert logits.shape == (3, 64, 32) and float(logits.detach().std()) > 0.1
    assert torch.allclose(logits, reference_logits(generator, tokens, PROMPTS), atol=1e-5)


def test_rows_are_a_slice_of_all_logits(generator):
    tokens, cond = half_masked(generator), generator.encode(PROMPTS)
    rows = torch.tensor([0, 7, 64, 191, 7])
    everything = reference_logits(generator, tokens, PROMPTS).flatten(0, 1)
    assert torch.allclose(generator.logits(tokens, cond, STEP, rows), everything[rows], atol=1e-5)


def test_a_half_precision_network_gives_float32_logits(generator):
    tokens, cond = half_masked(generator), generator.encode(PROMPTS)
    before = generator.logits(tokens, cond, STEP)
    generator.policy.to(torch.bfloat16)
    after = generator.logits(tokens, cond, STEP)
    assert after.dtype == torch.float32
    assert 0 < float((after - before).detach().abs().max()) < 0.3


def test_gradient_checkpointing_leaves_the_gradients(generator):
    tokens, cond = half_masked(generator), generator.encode(PROMPTS)
    twin = generator.copy()
    twin.enable_gradient_checkpointing()
    assert not generator.gradient_checkpointing
    rows = torch.arange(0, 192, 3)
    for one, expected in ((generator, 2), (twin, 4)):  # two blocks, once and twice
        passes = []
        for block in one.policy.transformer_layers:
            block.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        one.logits(tokens, cond, STEP, rows).log_softmax(-1)[:, 3].sum().backward()
        assert len(passes) == expected
    for (name, first), second in zip(generator.policy.named_parameters(), twin.policy.parameters(), strict=True):
        assert first.grad is not None and torch.allclose(first.grad, second.grad, atol=1e-6), name


# --- conditions and codec


def test_a_prompt_is_encoded_once(generator, monkeypatch):
    seen = []
    monkeypatch.setattr(
        generator, "_encode_batch",
        lambda prompts, encode=generator._encode_batch: (seen.extend(prompts), encode(prompts))[1],
    )  # fmt: skip
    first, second = generator.encode(PROMPTS), generator.encode(["a cat", "a dog"])
    assert seen == ["a dog", "two cats on red", "a cat"]
    assert first.tensors["text"].shape == (3, 77, 16) and first.tensors["pooled"].shape == (3, 24)
    assert torch.equal(first.tensors["text"][2], second.tensors["text"][1])
    assert not first.tensors["text"].requires_grad


def test_the_cache_of_prompts_is_bounded(generator, monkeypatch):
    monkeypatch.setattr("speedrl_lab.generators.published.MAX_CACHED", 2)
    cond = generator.encode(["a", "b", "c", "d"])
    assert len(cond) == 4 and list(generator._encoded) == ["c", "d"]
    assert torch.allclose(generator.encode(["a"]).tensors["pooled"][0], cond.tensors["pooled"][0], atol=1e-5)
    with pytest.raises(TypeError, match=r"expected a list of strings; nearest: \['a dog'\]"):
        generator.encode("a dog")


def test_width_comes_first_in_the_micro_conditions(generator):
    spec = replace(generator.spec, image_size=(32, 64))
    wide = AmusedGenerator(spec, generator.policy, generator.codec, generator.tokenizer, generator.text_encoder)
    assert wide.micro_conditions(2).tolist() == [[64.0, 32.0, 0.0, 0.0, 6.0]] * 2


def test_pictures_of_codes_are_tokenized_as_the_codec_does(generator):
    images = torch.rand(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    codes = generator.tokenize(images)
    latents = generator.codec.encode(images).latents
    assert torch.equal(codes.flatten(), generator.codec.quantize(latents)[2][2])
    assert codes.shape == (10, 64) and codes.unique().numel() > 3
    with pytest.raises(ValueError, match=r"images of shape \(2, 3, 16, 16\): expected \(B, 3, 32, 32\)"):
        generator.tokenize(images[:2, :, :16, :16])
    with pytest.raises(ValueError, match="cannot decode token 39: expected codes 0 to 31"):
        generator.decode(torch.full((1, 64), 39))


def test_decoding_in_parts_changes_nothing(generator):
    codes = torch.randint(32, (10, 64), generator=torch.Generator().manual_seed(0))
    together = generator.decode(codes)
    alone = torch.cat([generator.decode(row[None]) for row in codes])
    assert torch.allclose(together, alone, atol=1e-5)


# --- policy files


def test_a_saved_policy_is_a_published_file(generator, tmp_path, folder):
    path = tmp_path / "tuned" / "policy.safetensors"
    with torch.no_grad():
        generator.policy.embed.conv.weight.add_(0.1)
    generator.revises = True
    generator.save_policy(path, origin="a test")
    assert [file.name for file in path.parent.iterdir()] == ["policy.safetensors"]
    fresh = diffusers.UVit2DModel.from_config(diffusers.UVit2DModel.load_config(folder / "transformer"))
    fresh.load_state_dict(load_file(path), strict=True)
    for name, value in generator.policy.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name
    loaded = load_amused(folder, CPU, policy=path)
    assert can_revise(loaded) and not can_revise(load_amused(folder, CPU))
    tokens, cond = half_masked(generator), generator.encode(PROMPTS)
    assert torch.equal(loaded.logits(tokens, cond, STEP), generator.logits(tokens, cond, STEP))
    # In place of the published file it makes a folder that diffusers itself reads.
    published = Path(shutil.copytree(folder, tmp_path / "copy")) / "transformer" / "diffusion_pytorch_model.safetensors"
    shutil.copy(path, published)
    weights = diffusers.UVit2DModel.from_pretrained(published.parent).embed.conv.weight
    assert torch.equal(weights, generator.policy.embed.conv.weight)


def test_lora_is_merged_into_the_file(generator, tmp_path, folder):
    pytest.importorskip("peft")
    add_lora(generator, rank=2)
    with torch.no_grad():
        for name, value in generator.policy.named_parameters():
            if "lora_B" in name:
                value.fill_(0.05)
    generator.save_policy(tmp_path / "policy.safetensors")
    assert has_adapter(generator.policy)
    loaded = load_amused(folder, CPU, policy=tmp_path / "policy.safetensors")
    tokens, cond = half_masked(generator), generator.encode(PROMPTS)
    tuned, plain = generator.logits(tokens, cond, STEP), load_amused(folder, CPU).logits(tokens, cond, STEP)
    assert torch.allclose(loaded.logits(tokens, cond, STEP), tuned, atol=1e-4)
    assert float((tuned - plain).detach().abs().max()) > 0.01


def test_a_pace_head_travels_beside_the_policy(generator, tmp_path, folder):
    path = tmp_path / "policy.safetensors"
    generator.pace = PaceHead(8).reset(0)
    with torch.no_grad():
        generator.pace.layers[2].bias.copy_(torch.arange(7.0))
    generator.save_policy(path)
    assert {file.name for file in tmp_path.iterdir()} == {"policy.safetensors", "policy.pace.safetensors"}
    loaded = load_amused(folder, CPU, policy=path)
    assert torch.equal(loaded.pace.layers[2].bias, torch.arange(7.0))
    copy = loaded.copy()
    assert copy.pace is not loaded.pace and copy.policy is not loaded.policy and copy.codec is loaded.codec
    generator.pace = None
    generator.save_policy(path)
    assert load_amused(folder, CPU, policy=path).pace is None


def test_wrong_policy_files_are_refused_in_one_line(generator, tmp_path):
    before = generator.policy.embed.conv.weight.detach().clone()
    path = tmp_path / "policy.safetensors"
    with pytest.raises(FileNotFoundError, match="no weights at .*policy.safetensors"):
        generator.load_policy(path)
    generator.save_policy(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated or not a safetensors file") as caught:
        generator.load_policy(path)
    assert "\n" not in str(caught.value)
    tensors = {name: value.clone() for name, value in generator.policy.state_dict().items()}
    tensors["embed.conv.weight"] = torch.zeros(16, 8, 1, 1)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"1 of \d+ tensors, such as embed.conv.weight: shape \(16, 8, 1, 1\)"):
        generator.load_policy(path)
    del tensors["embed.conv.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match="such as embed.conv.weight: shape missing"):
        generator.load_policy(path)
    save_file(tensors, path, {"family": "meissonic"})
    with pytest.raises(ValueError, match="holds a policy of 'meissonic', expected 'amused'"):
        generator.load_policy(path)
    assert torch.equal(generator.policy.embed.conv.weight, before)


# --- folders


def test_a_folder_loads_without_network_and_without_touching_the_global_state(folder, offline):
    state = torch.get_rng_state()
    generator = load_amused(folder, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    spec = generator.spec
    assert (spec.name, spec.grid, spec.image_size) == (f"amused:{folder}", (8, 8), (32, 32))
    assert (spec.codebook_size, spec.mask_id, spec.time_input) == (32, 39, "none")
    frozen = [*generator.codec.parameters(), *generator.text_encoder.parameters()]
    assert not any(value.requires_grad for value in frozen) and not generator.policy.training


def test_missing_files_are_named(broken, tmp_path):
    (broken / "vqvae" / "config.json").unlink()
    (broken / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load_amused(broken, CPU)
    message = str(caught.value)
    assert "vqvae/config.json, text_encoder/model.safetensors" in message and "\n" not in message
    assert "amused/amused-256" in message and str(broken) in message and "transformer" not in message
    with pytest.raises(FileNotFoundError, match="transformer/config.json, .*amused/amused-512"):
        load_amused(tmp_path / "nowhere-512", CPU)


@pytest.mark.parametrize("part", ["transformer", "vqvae", "text_encoder"])
def test_truncated_files_are_refused_in_one_line(broken, part):
    (weights,) = (broken / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"{part} cannot be read as") as caught:
        load_amused(broken, CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("part", "key"), [("transformer", "embed.conv.weight"), ("text_encoder", "projection")])
def test_incomplete_weights_are_refused(broken, part, key):
    (weights,) = (broken / part).glob("*.safetensors")
    tensors = {name: value.clone() for name, value in load_file(weights).items() if key not in name}
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{part} does not fit .*: 1 missing keys, such as .*{key}"):
        load_amused(broken, CPU)


def test_other_families_are_refused(broken):
    config = broken / "transformer" / "config.json"
    config.write_text(config.read_text().replace("UVit2DModel", "Transformer2DModel"))
    with pytest.raises(ValueError, match="transformer holds a Transformer2DModel, expected aMUSEd's UVit2DModel"):
        load_amused(broken, CPU)


def test_half_precision_and_sharded_files_load(broken, folder):
    plain = load_amused(folder, CPU)
    plain.policy.half().save_pretrained(broken / "transformer", variant="fp16")
    (broken / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    half = load_amused(broken, CPU).policy
    assert half.dtype == torch.float32
    assert torch.equal(half.embed.conv.weight, plain.policy.embed.conv.weight.float())
    shutil.rmtree(broken / "transformer")
    plain.policy.save_pretrained(broken / "transformer", max_shard_size="50KB")
    assert len(list((broken / "transformer").glob("*.safetensors"))) > 1
    assert torch.equal(load_amused(broken, CPU).policy.embed.conv.weight, half.embed.conv.weight)


class Exploit:
    """What a hostile pickle does: run code when it is read."""

    def __reduce__(self):
        return Path.touch, (Path("exploited"),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("part", "name", "key"),
    [("transformer", "diffusion_pytorch_model.bin", "policy"), ("text_encoder", "pytorch_model.bin", "text_encoder")],
)
def test_pickles_load_only_without_code(broken, tmp_path, monkeypatch, part, name, key):
    monkeypatch.chdir(tmp_path)
    (weights,) = (broken / part).glob("*.safetensors")
    tensors = load_file(weights)
    weights.unlink()
    pickled = broken / part / name
    torch.save(tensors, pickled)
    loaded = getattr(load_amused(broken, CPU), key).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    for hostile in (lambda: torch.save({**tensors, "x": Exploit()}, pickled),
                    lambda: pickled.write_bytes(pickle.dumps({**tensors, "x": Exploit()}))):  # fmt: skip
        hostile()
        with pytest.raises(ValueError, match=f"{part} cannot be read as") as caught:
            load_amused(broken, CPU)
        assert "\n" not in str(caught.value) and not Path("exploited").exists()


# --- the project's own loops


def share_of_low_codes(images: Tensor, prompts: list[str], trajectory) -> Tensor:
    return (trajectory.tokens < 8).float().mean(1)


def test_the_sampler_and_its_log_probability(generator):
    sampler = SamplerConfig(steps=4, order="halton", guidance_scale=2.0)
    trajectory = sample(generator, PROMPTS, sampler, seed=0)
    assert int(trajectory.tokens.max()) < 32 and not torch.equal(trajectory.tokens[0], trajectory.tokens[2])
    alone = sample(generator, PROMPTS[:1], sampler, seed=0)
    assert torch.equal(alone.tokens[0], trajectory.tokens[0])
    replayed = trajectory_log_prob(generator, PROMPTS, trajectory, sampler)
    assert torch.allclose(replayed, trajectory.log_prob.sum(1), atol=1e-3)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_two_iterations_of_training(folder, tmp_path, lora_rank):
    generator = load_amused(folder, CPU)
    generator.enable_gradient_checkpointing()
    before = generator.policy.transformer_layers[0].attn1.to_q.weight.detach().clone()
    config = TrainConfig(
        sampler=SamplerConfig(steps=3, order="halton", schedule="paced"), iterations=2, num_groups=1, group_size=2,
        learning_rate=1e-3, quality_weights={"low": 1.0}, speed_weight=0.0, warmup_iterations=0, lora_rank=lora_rank,
    )  # fmt: skip
    run = Run.open(tmp_path / "run", {})
    records = list(train(generator, PROMPTS[:1], {"low": share_of_low_codes}, config, run))
    assert [record["iteration"] for record in records] == [1, 2]
    assert all(record["ratio_deviation"] < 1e-3 for record in records) and records[1]["kl"] > 0
    tuned = load_amused(folder, CPU, policy=run.path / "policy.safetensors")
    assert tuned.pace is not None
    assert not torch.equal(tuned.policy.transformer_layers[0].attn1.to_q.weight, before)


# --- the published sizes


@pytest.mark.parametrize(("side", "resampling", "count"), [(16, False, 603_537_664), (32, True, 608_257_792)])
def test_published_sizes(side, resampling, count):
    """Configs of amused-256 and amused-512, as on their model cards."""
    with torch.device("meta"):
        network = diffusers.UVit2DModel(
            hidden_size=1024, use_bias=False, cond_embed_dim=768, micro_cond_encode_dim=256, micro_cond_embed_dim=1280,
            encoder_hidden_size=768, vocab_size=8256, codebook_size=8192, in_channels=768, block_out_channels=768,
            num_res_blocks=3, downsample=resampling, upsample=resampling, block_num_heads=12, num_hidden_layers=22,
            num_attention_heads=16, intermediate_size=2816, sample_size=side,
        )  # fmt: skip
    assert sum(value.numel() for value in network.parameters()) == count
