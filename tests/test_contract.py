"""What every generator adapter must hold; one set of tests over all of them."""


import pytest
import torch

from speedrl_lab import scenes
from speedrl_lab.config import DistillConfig, SamplerConfig, TrainConfig
from speedrl_lab.distill import check as check_distillation
from speedrl_lab.generator import MaskedGenerator, StepInfo
from speedrl_lab.generators import FAMILIES, describe_generator, load_generator, prompts_for
from speedrl_lab.pace import PaceHead
from speedrl_lab.rl import check
from speedrl_lab.sampler import sample

STEP = StepInfo(0, 4)
CAPTIONS = ["a dog", "two cats on a red background", "a star left of a pig"]
CLASSES = ["tench", "golden retriever", "7"]


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def generator(family, request) -> MaskedGenerator:
    """A small random generator of each family, with a pace head."""
    if family == "emoji":
        return request.getfixturevalue("emoji")
    if family == "tiny":
        return load_generator("tiny", device="cpu")
    generator = request.getfixturevalue("loaded")[family].copy()
    generator.pace = PaceHead().reset(0)
    return generator


@pytest.fixture
def prompts(generator) -> list[str]:
    return CLASSES if generator.spec.conditioning == "class" else CAPTIONS


@pytest.fixture
def name(family, request) -> str:
    """What `load_generator` is asked for."""
    return request.getfixturevalue("published")[family] if FAMILIES[family] else family


def half_masked(generator, count: int = 3) -> torch.Tensor:
    """States (B, N) in which every other position is known."""
    spec = generator.spec
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(spec.codebook_size, (count, spec.num_tokens), generator=rng)
    tokens[:, ::2] = spec.mask_id
    return tokens


def test_spec_fits_the_grid_and_the_picture(generator):
    spec = generator.spec
    assert spec.num_tokens == spec.grid[0] * spec.grid[1]
    assert spec.mask_id >= spec.codebook_size
    assert spec.conditioning in ("text", "class")
    assert spec.time_input in ("none", "step_index", "mask_ratio")
    codes = torch.zeros(2, spec.num_tokens, dtype=torch.int64)
    assert generator.decode(codes).shape == (2, 3, *spec.image_size)


def test_logits_are_float32_over_the_codes_without_the_mask(generator, prompts):
    logits = generator.logits(half_masked(generator), generator.encode(prompts), STEP)
    assert logits.shape == (3, generator.spec.num_tokens, generator.spec.codebook_size)
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    assert float(logits.detach().std()) > 0.1  # else the other tests would hold trivially


def test_rows_are_a_slice_of_all_logits(generator, prompts):
    tokens, cond = half_masked(generator), generator.encode(prompts)
    rows = torch.tensor([0, 7, generator.spec.num_tokens, 3 * generator.spec.num_tokens - 1, 7])
    everything = generator.logits(tokens, cond, STEP).flatten(0, 1)
    assert torch.allclose(generator.logits(tokens, cond, STEP, rows), everything[rows], atol=1e-4)


def test_logits_draw_no_random_numbers(generator, prompts):
    tokens, cond = half_masked(generator), generator.encode(prompts)
    before = torch.get_rng_state()
    first, second = (generator.logits(tokens, cond, STEP) for _ in range(2))
    assert torch.equal(first, second)
    generator.decode(tokens.clamp(max=generator.spec.codebook_size - 1))
    assert torch.equal(before, torch.get_rng_state())


def test_rows_of_a_batch_do_not_see_each_other(generator, prompts):
    tokens, cond = half_masked(generator), generator.encode(prompts)
    together = generator.logits(tokens, cond, STEP)
    order = torch.tensor([2, 0, 1])
    permuted = generator.logits(tokens[order], cond.index(order), STEP)
    assert torch.allclose(permuted, together[order], atol=1e-4)
    alone = generator.logits(tokens[1:2], generator.encode(prompts[1:2]), STEP)
    assert torch.allclose(alone, together[1:2], atol=1e-4)


def test_prompts_and_known_tokens_matter(generator, prompts):
    tokens, cond = half_masked(generator), generator.encode(prompts)
    logits = generator.logits(tokens, cond, STEP)
    other = generator.logits(tokens, generator.encode(prompts[::-1]), STEP)
    assert float((logits - other)[0].detach().abs().max()) > 1e-3
    changed = tokens.clone()
    changed[0, 1] = (changed[0, 1] + 1) % generator.spec.codebook_size
    seen = generator.logits(changed, cond, STEP)
    assert float((logits - seen)[0, 0].detach().abs().max()) > 1e-4
    assert torch.allclose(seen[1:], logits[1:], atol=1e-4)


def test_gradients_reach_the_policy_alone(generator, prompts):
    logits = generator.logits(half_masked(generator), generator.encode(prompts), STEP)
    logits.square().mean().backward()
    missing = [name for name, p in generator.policy.named_parameters() if p.grad is None]
    assert not missing
    assert all(p.grad is None for p in generator.pace.parameters())
    others = {id(p) for p in generator.policy.parameters()} | {id(p) for p in generator.pace.parameters()}
    frozen = [module for module in vars(generator).values() if isinstance(module, torch.nn.Module)]
    rest = [p for module in frozen for p in module.parameters() if id(p) not in others]
    assert (rest or generator.spec.name == "tiny") and not any(p.requires_grad for p in rest)
    assert not any(value.requires_grad for value in generator.encode(prompts).tensors.values())


def test_null_rows_are_alike_and_unlike_any_prompt(generator, prompts):
    null, cond = generator.null(3), generator.encode(prompts)
    assert len(null) == 3 and null.tensors.keys() == cond.tensors.keys()
    for name, value in null.tensors.items():
        assert value.shape == cond.tensors[name].shape and value.dtype == cond.tensors[name].dtype
        assert torch.equal(value[0], value[2])
    tokens = half_masked(generator)[:1].repeat(3, 1)
    unguided = generator.logits(tokens, null, STEP)
    guided = generator.logits(tokens, cond, STEP)
    assert float((unguided - guided).detach().abs().amax((1, 2)).min()) > 1e-3


def test_saved_policies_load_again(generator, name, prompts, tmp_path):
    with torch.no_grad():
        generator.pace.layers[2].bias.copy_(torch.arange(7.0))
    path = tmp_path / "policy.safetensors"
    generator.save_policy(path, origin="a test")
    # Published families keep the pace head apart, so that their own class can read the policy.
    assert {file.name for file in tmp_path.iterdir()} - {"policy.pace.safetensors"} == {"policy.safetensors"}
    loaded = load_generator(name, device="cpu", policy=path)
    tokens, cond = half_masked(generator), generator.encode(prompts)
    before, after = generator.logits(tokens, cond, STEP), loaded.logits(tokens, loaded.encode(prompts), STEP)
    # Half-precision storage: relative rounding of 2**-11 a weight.
    assert float((before - after).detach().abs().max()) < 0.01 * float(before.detach().abs().max())
    assert torch.equal(loaded.pace.layers[2].bias, torch.arange(7.0))
    assert loaded.spec == generator.spec


def test_decoded_pictures_lie_in_the_unit_range(generator):
    spec = generator.spec
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(spec.codebook_size, (4, spec.num_tokens), generator=rng)
    images = generator.decode(codes)
    assert images.dtype == torch.float32 and not images.requires_grad
    assert float(images.min()) >= 0 and float(images.max()) <= 1
    assert float(images.std()) > 0.01


@pytest.mark.parametrize("offset", [None, -1])
def test_decode_refuses_what_is_no_code(generator, offset):
    bad = generator.spec.mask_id if offset is None else offset
    codes = torch.zeros(2, generator.spec.num_tokens, dtype=torch.int64)
    codes[1, 3] = bad
    with pytest.raises(ValueError, match=f"cannot decode token {bad}"):
        generator.decode(codes)


def test_pictures_become_codes(generator):
    spec = generator.spec
    images = torch.rand(3, 3, *spec.image_size, generator=torch.Generator().manual_seed(0))
    codes = generator.tokenize(images)
    assert codes.shape == (3, spec.num_tokens) and codes.dtype == torch.int64
    assert int(codes.min()) >= 0 and int(codes.max()) < spec.codebook_size
    assert torch.equal(codes, generator.tokenize(images))
    assert torch.equal(codes[1:2], generator.tokenize(images[1:2]))


def test_tokenized_pictures_come_back(emoji):
    """Of the codec that is trained; random ones lose everything."""
    generator, spec = emoji, emoji.spec
    images = scenes.draw_batch(8, "test", seed=0)[2]
    codes = generator.tokenize(images)
    assert codes.shape == (8, spec.num_tokens) and codes.dtype == torch.int64
    assert int(codes.min()) >= 0 and int(codes.max()) < spec.codebook_size
    error = (generator.decode(codes) - images).square().mean()
    assert float(error) < 0.01 < float(images.var())


def test_a_copy_is_independent(generator, prompts):
    copy = generator.copy()
    tokens, cond = half_masked(generator), generator.encode(prompts)
    before, bias = generator.logits(tokens, cond, STEP).detach(), generator.pace.layers[2].bias.detach().clone()
    with torch.no_grad():
        for parameter in [*copy.policy.parameters(), *copy.pace.parameters()]:
            parameter.add_(1.0)
    assert torch.equal(generator.logits(tokens, cond, STEP).detach(), before)
    assert torch.equal(generator.pace.layers[2].bias, bias)
    assert not torch.allclose(copy.logits(tokens, cond, STEP).detach(), before)


def test_unknown_names_and_devices_are_refused():
    with pytest.raises(ValueError, match="unknown generator 'emojis'; nearest: 'emoji'"):
        load_generator("emojis")
    with pytest.raises(ValueError, match="device='cuda:77' cannot be used"):
        load_generator("emoji", device="cuda:77")


def test_missing_policy_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights at .*nothing.safetensors"):
        load_generator("emoji", device="cpu", policy=tmp_path / "nothing.safetensors")


def test_loading_uses_neither_network_nor_random_numbers(name, offline):
    before = torch.get_rng_state()
    load_generator(name, device="cpu")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("missing", "repository", "file"),
    [
        ("amused:{}/amused-512", "amused/amused-512", "transformer/config.json"),
        ("meissonic:{}/none", "MeissonFlow/Meissonic", "text_encoder/model.safetensors"),
        ("maskgit:{}/none.pth", "llvictorll/Halton-Maskgit", "vq_ds16_c2i.pt of repository FoundationVision/LlamaGen"),
    ],
)
def test_missing_checkpoints_say_what_to_get_and_where_it_goes(published, missing, repository, file, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load_generator(missing.format(tmp_path), device="cpu")
    message = str(caught.value)
    assert repository in message and file in message and str(tmp_path) in message and "\n" not in message
    assert "nothing is fetched" in message


@pytest.mark.parametrize("asked", ["amused", "amused:", "meissonic:", "maskgit:"])
def test_a_name_without_a_place_says_what_to_get(asked):
    with pytest.raises(FileNotFoundError, match=r"names no f.* repository .*, then generator='") as caught:
        load_generator(asked)
    assert "\n" not in str(caught.value)


def test_settings_that_mean_nothing_are_refused_and_others_arrive(published):
    for asked, setting, value in (
        ("emoji", "negative_prompt", "blurry"),
        (published["amused"], "time_conditioning", "mask_ratio"),
        (published["amused"], "text_encoder", "folder"),
        (published["maskgit"], "negative_prompt", "blurry"),
    ):
        with pytest.raises(ValueError, match=f"{setting}='{value}' means nothing to generator"):
            load_generator(asked, device="cpu", **{setting: value})
    told = {"negative_prompt": "blurry", "time_conditioning": "mask_ratio"}
    described = describe_generator(load_generator(published["meissonic"], device="cpu", **told))
    assert described.items() >= told.items() and described["text_encoder"] == "own"


def test_a_run_card_can_name_every_generator(generator, family):
    described = describe_generator(generator)
    assert described["family"] == family and described["parameters"] > 100
    assert ("negative_prompt" in described) == (family in ("amused", "meissonic"))


def test_prompts_to_train_on_and_prompts_to_look_at(loaded, emoji, tmp_path):
    trained, shown = prompts_for(emoji)
    assert len(trained) > len(shown) > 100 and not set(trained) & set(shown)
    classes, kept = prompts_for(loaded["maskgit"])
    assert (len(classes), len(kept)) == (900, 100) and not set(classes) & set(kept)
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"prompt {number}" for number in range(12)))
    assert prompts_for(loaded["amused"], str(file))[1] == ["prompt 0", "prompt 10"]
    file.write_text("a dog")
    assert prompts_for(loaded["amused"], str(file)) == (["a dog"], ["a dog"])
    with pytest.raises(ValueError, match="needs prompts: give prompt_file="):
        prompts_for(loaded["amused"])


@pytest.mark.parametrize("asked", ["amused:somewhere", "meissonic:somewhere"])
def test_missing_libraries_are_named_with_what_installs_them(asked, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs diffusers and transformers.*pip install 'speedrl_lab\[real\]'"):
        load_generator(asked, device="cpu")


def test_a_policy_in_bfloat16_samples_and_decodes_and_is_not_trained(family, published, loaded, prompts):
    if not FAMILIES[family]:
        with pytest.raises(ValueError, match="policy_dtype='bfloat16' means nothing to generator"):
            load_generator(family, device="cpu", policy_dtype="bfloat16")
        return
    with pytest.raises(ValueError, match="policy_dtype='bfloat' is not known; nearest: 'bfloat16'"):
        load_generator(published[family], device="cpu", policy_dtype="bfloat")
    half, whole = load_generator(published[family], device="cpu", policy_dtype="bfloat16"), loaded[family]
    assert describe_generator(half)["policy_dtype"] == "bfloat16" and "policy_dtype" not in describe_generator(whole)
    tokens, cond = half_masked(whole), whole.encode(prompts)
    exact, rounded = (one.logits(tokens, cond, STEP).detach() for one in (whole, half))
    assert rounded.dtype == torch.float32  # what is drawn from
    assert 0 < float((rounded - exact).abs().mean()) < 0.1 * float(exact.std())
    drawn = sample(half, prompts, SamplerConfig(steps=2))
    pictures = [one.decode(drawn.tokens) for one in (whole, half)]
    assert pictures[1].dtype == torch.float32
    assert 0 < float((pictures[0] - pictures[1]).abs().mean()) < 0.02
    assert torch.equal(*(one.tokenize(pictures[0]) for one in (whole, half)))  # the codec itself is whole
    with pytest.raises(ValueError, match="the policy is bfloat16, which rounds small steps away: load it with"):
        config = TrainConfig(quality_weights={"novelty": 1.0}, speed_weight=0.0, num_groups=2)
        check(half, prompts, {"novelty": None}, config)
    with pytest.raises(ValueError, match="the policy is bfloat16"):
        check_distillation(half, prompts, DistillConfig(), SamplerConfig(schedule="power"))
