"""MaskGIT against the published layout, numbers of the published code, and slow arithmetic."""

import json
import math
import pickle
import socket
from argparse import Namespace

import pytest
import torch
from maskgit_fixtures import (
    TINY,
    build_tiny_maskgit,
    filled,
    tiny_state,
    tiny_vq_state,
    transformer_shapes,
    vq_shapes,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional

import speedrl_lab as lab
from speedrl_lab.adapters import has_adapter
from speedrl_lab.generator import StepInfo, can_revise, guided_logits
from speedrl_lab.generators.llamagen_vq import LlamaGenVQ, vq_from
from speedrl_lab.generators.maskgit import class_index, class_names, load_maskgit
from speedrl_lab.generators.maskgit_transformer import MaskGitTransformer, published_sizes, transformer_from
from speedrl_lab.pace import PaceHead

CPU, STEP = torch.device("cpu"), StepInfo(0, 4)
SIZES = {"tiny": (384, 6, 6), "small": (512, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return build_tiny_maskgit(tmp_path_factory.mktemp("maskgit"))


@pytest.fixture
def generator(file):
    return load_maskgit(file, CPU)


def states(count: int = 3) -> torch.Tensor:
    """Tokens (B, 64) of which about half are masks."""
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(64, (count, 64), generator=rng)
    return torch.where(torch.rand(count, 64, generator=rng) < 0.5, 64, tokens)


# --- layout


@pytest.mark.parametrize("size, side, millions", [("tiny", 16, 23.0), ("small", 16, 69.3), ("base", 16, 142.2),
                                                  ("large", 24, 480.0)])  # fmt: skip
def test_full_size_transformers_have_the_published_names_shapes_and_counts(size, side, millions):
    width, depth, heads = SIZES[size]
    with torch.device("meta"):
        network = MaskGitTransformer(side, width, depth, heads)
    expected = transformer_shapes(side, width, depth, heads)
    assert {name: tuple(value.shape) for name, value in network.state_dict().items()} == expected
    assert round(sum(value.numel() for value in network.parameters()) / 1e6, 1) == millions
    hidden = {"tiny": 1024, "small": 1536, "base": 2048, "large": 2816}[size]
    assert network.transformer.layers[0].ff.w1.out_features == hidden
    assert network.transformer.layers[0].attn.wq.out_features == {"small": 510}.get(size, width)


def test_the_full_size_tokenizer_has_the_published_names_shapes_and_counts():
    with torch.device("meta"):
        network = LlamaGenVQ()
    assert {name: tuple(value.shape) for name, value in network.state_dict().items()} == vq_shapes()
    assert len(vq_shapes()) == 344
    assert sum(value.numel() for value in network.parameters()) == 71_883_403  # "72M"


@pytest.mark.parametrize("size", SIZES)
def test_heads_of_published_widths_are_known(size):
    width, _, heads = SIZES[size]
    shapes = transformer_shapes(4, width, 1, heads, codes=8)
    sizes = published_sizes({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    assert sizes == {"side": 4, "width": width, "depth": 1, "heads": heads, "codebook_size": 8,
                     "num_classes": 1000, "registers": 1}  # fmt: skip


def test_a_tiny_file_is_read_as_it_is(generator, file):
    spec = generator.spec
    assert (spec.name, spec.conditioning, spec.time_input) == ("maskgit", "class", "none")
    assert (spec.grid, spec.image_size, spec.codebook_size, spec.mask_id) == ((8, 8), (32, 32), 64, 64)
    for name, value in generator.policy.state_dict().items():
        assert torch.equal(value, tiny_state()[name]), name
    for name, value in generator.codec.state_dict().items():
        assert torch.equal(value, tiny_vq_state()[name]), name
    assert generator.policy.head.weight is generator.policy.tok_emb.weight
    assert generator.pace is None and not generator.policy.training and not generator.codec.training


# --- numbers


def test_logits_equal_those_of_the_published_code(generator):
    """Values of valeoai/Halton-MaskGIT f61b0a1 (MIT) with the weights of the fixture, float32."""
    tokens = (torch.arange(64) * 7 % 65)[None]
    logits = generator.logits(tokens, generator.encode(["golden retriever"]), STEP)[0]
    golden = [[4.2297850, 0.4132096, 0.0385989], [2.0852084, 1.4477267, -0.4135090], [0.0831784, 0.3524179, -0.3144711]]
    assert torch.allclose(logits[[0, 17, 63]][:, [0, 31, 63]], torch.tensor(golden), atol=1e-5)
    unguided = generator.logits(tokens, generator.null(1), STEP)[0, 5, [0, 31, 63]]
    assert torch.allclose(unguided, torch.tensor([2.1798391, 0.7696336, -0.3083045]), atol=1e-5)


def test_codec_equals_the_published_code(generator):
    """Values of FoundationVision/LlamaGen (MIT) with the weights of the fixture; its pixels are in [-1, 1]."""
    image = generator.decode((torch.arange(64) * 5 % 64)[None])[0]
    golden = torch.tensor([[0.1497461, 0.3149464, 0.0163632], [0.3625416, -0.3211589, -0.8080314]])
    assert torch.allclose(image[:, [3, 16], [29, 7]].T, golden * 0.5 + 0.5, atol=1e-5)
    pixels = torch.linspace(0, 40, 3 * 32 * 32).sin().view(1, 3, 32, 32)
    codes = generator.tokenize(pixels * 0.5 + 0.5).view(8, 8).tolist()
    assert codes[0] == [34, 34, 34, 34, 34, 34, 30, 36]
    assert codes[3] == [10, 10, 50, 32, 36, 32, 50, 7]
    assert codes[7] == [1, 30, 30, 36, 1, 1, 21, 52]


def rms(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def slow_logits(w: dict[str, torch.Tensor], tokens: torch.Tensor, label: int, heads: int) -> torch.Tensor:
    """Logits (N, V + 1) of one state (N,), position by position and head by head, float64."""
    w = {name: value.double() for name, value in w.items()}
    cond = w["cls_emb.weight"][label]
    gate = cond / (1 + (-cond).exp())  # SiLU
    x = [w["tok_emb.weight"][token] + w["pos_emb.weight"][place] for place, token in enumerate(tokens.tolist())]
    x = torch.stack([*x, w["reg_tokens.weight"][0]])  # the register comes last
    width = len(cond)
    for layer in range(len([name for name in w if name.endswith("ln1.weight")])):
        prefix = f"transformer.layers.{layer}."
        p = {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}
        six = p["mlp.1.weight"] @ gate + p["mlp.1.bias"]
        shift1, scale1, gate1, shift2, scale2, gate2 = (six[k * width : (k + 1) * width] for k in range(6))
        y = rms(x) * p["ln1.weight"] * (1 + scale1) + shift1
        q, k = rms(y @ p["attn.wq.weight"].T), rms(y @ p["attn.wk.weight"].T)  # all heads together
        v = y @ p["attn.wv.weight"].T
        size = v.shape[1] // heads
        parts = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = (q[:, part] @ k[:, part].T / math.sqrt(size)).exp()
            parts.append(scores / scores.sum(1, keepdim=True) @ v[:, part])
        x = x + gate1 * (torch.cat(parts, 1) @ p["attn.wo.weight"].T)
        y = rms(x) * p["ln2.weight"] * (1 + scale2) + shift2
        inner = y @ p["ff.w1.weight"].T
        inner = inner / (1 + (-inner).exp()) * (y @ p["ff.w3.weight"].T)
        x = x + gate2 * (inner @ p["ff.w2.weight"].T)
    shift, scale = (w["last_norm.mlp.1.weight"] @ gate + w["last_norm.mlp.1.bias"]).chunk(2)
    x = rms(x[:-1]) * w["last_norm.norm_final.weight"] + w["last_norm.norm_final.bias"]
    return (x * (1 + scale) + shift) @ w["tok_emb.weight"].T + w["head.bias"]


@pytest.mark.parametrize("width, heads", [(32, 2), (32, 5)])  # 5 heads of 6 channels leave two over
def test_transformer_equals_slow_arithmetic(width, heads):
    state = filled(transformer_shapes(side=3, width=width, depth=2, heads=heads, codes=20))
    network = transformer_from(state, heads)
    tokens = torch.tensor([[20, 3, 20, 0, 19, 20, 7, 7, 1], [20] * 9])
    logits = network(tokens, torch.tensor([999, 1000])).detach().double()
    for row, label in enumerate((999, 1000)):
        slow = slow_logits(state, tokens[row], label, heads)
        assert float((logits[row] - slow[:, :20]).abs().max()) < 1e-4
        assert float((slow[:, 20]).abs().max()) > 0.1  # the mask class, which is left out
    assert logits.shape == (2, 9, 20)


def slow_group_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    groups = x.reshape(len(x), 32, -1)
    centred = groups - groups.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return normal.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]


def test_decoder_equals_slow_arithmetic():
    w = {name: value.double() for name, value in tiny_vq_state().items()}

    def conv(name, x):
        return functional.conv2d(x, w[name + ".weight"], w[name + ".bias"], padding=w[name + ".weight"].shape[-1] // 2)

    def norm(name, x):
        return slow_group_norm(x, w[name + ".weight"], w[name + ".bias"])

    def residual(name, x):
        y = norm(name + ".norm1", x)
        y = norm(name + ".norm2", conv(name + ".conv1", y * y.sigmoid()))
        y = conv(name + ".conv2", y * y.sigmoid())
        return y + (conv(name + ".nin_shortcut", x) if name + ".nin_shortcut.weight" in w else x)

    def attention(name, x):
        y = norm(name + ".norm", x)
        q, k, v = (conv(f"{name}.{part}", y).flatten(2)[0] for part in "qkv")  # (C, HW)
        mixed = v @ (q.T @ k / math.sqrt(len(q))).softmax(1).T
        return x + conv(name + ".proj_out", mixed.view(x.shape))

    codes = torch.arange(12).view(1, 3, 4) * 5
    vectors = w["quantize.embedding.weight"]
    x = (vectors / vectors.norm(dim=1, keepdim=True))[codes].permute(0, 3, 1, 2)
    x = conv("decoder.conv_in", conv("post_quant_conv", x))
    x = residual("decoder.mid.2", attention("decoder.mid.1", residual("decoder.mid.0", x)))
    for level in range(3):
        for k in range(3):
            x = residual(f"decoder.conv_blocks.{level}.res.{k}", x)
            x = attention(f"decoder.conv_blocks.{level}.attn.{k}", x) if level == 0 else x
        if level < 2:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = conv(f"decoder.conv_blocks.{level}.upsample.conv", x)
    x = norm("decoder.norm_out", x)
    x = conv("decoder.conv_out", x * x.sigmoid())  # in [-1, 1], about
    decoded = vq_from(tiny_vq_state()).decode(codes)
    assert decoded.shape == (1, 3, 12, 16)
    assert torch.allclose(decoded.double(), (x / 2 + 0.5).clamp(0, 1), atol=1e-4)
    assert float(decoded.std()) > 0.2 and float(decoded.min()) == 0 and float(decoded.max()) == 1


def test_known_codes_come_back_from_their_vectors_whatever_their_length(generator):
    codebook = generator.codec.quantize
    codes = torch.arange(64)
    lengths = torch.rand(64, 1, generator=torch.Generator().manual_seed(0)) * 10 + 0.01
    assert torch.equal(codebook.nearest(codebook.lookup(codes) * lengths), codes)
    assert torch.allclose(codebook.lookup(codes).norm(dim=1), torch.ones(64))


def test_tokenizing_takes_the_code_of_the_largest_cosine(generator):
    images = torch.rand(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))  # more than one batch of the codec
    latents = []
    hook = generator.codec.quant_conv.register_forward_hook(lambda module, inputs, output: latents.append(output))
    codes = generator.tokenize(images)
    hook.remove()
    found = torch.cat(latents).permute(0, 2, 3, 1).reshape(10, 64, 1, 8)
    cosines = functional.cosine_similarity(found, generator.codec.quantize.embedding.weight, dim=-1)  # (B, N, V)
    assert codes.shape == (10, 64) and codes.dtype == torch.int64
    assert torch.allclose(cosines.gather(2, codes[..., None])[..., 0], cosines.amax(2), atol=1e-6)
    assert len(codes.unique()) > 20
    again = generator.decode(codes)
    assert again.shape == (10, 3, 32, 32) and torch.allclose(again[9:], generator.decode(codes[9:]), atol=1e-4)
    with pytest.raises(ValueError, match=r"images of shape \(1, 3, 16, 32\): expected \(B, 3, 32, 32\)"):
        generator.tokenize(images[:1, :, :16])


# --- the contract


def test_rows_are_slices_and_the_batch_does_not_matter(generator):
    tokens, cond = states(), generator.encode(["tench", "207", "teddy"])
    everything = generator.logits(tokens, cond, STEP)
    assert everything.shape == (3, 64, 64) and everything.dtype == torch.float32
    rows = torch.tensor([0, 7, 64, 191, 7])
    assert torch.allclose(generator.logits(tokens, cond, STEP, rows), everything.flatten(0, 1)[rows], atol=1e-5)
    order = torch.tensor([2, 0])
    assert torch.allclose(generator.logits(tokens[order], cond.index(order), STEP), everything[order], atol=1e-5)


def test_only_the_rows_asked_for_meet_the_head(generator, monkeypatch):
    seen, plain = [], functional.linear

    def watched(x, weight, bias=None):
        seen.append((x.shape, weight.shape))
        return plain(x, weight, bias)

    monkeypatch.setattr(functional, "linear", watched)
    generator.logits(states(), generator.encode(["0", "1", "2"]), STEP, torch.tensor([3, 4]))
    assert seen[-1] == ((2, 32), (64, 32))


def test_guidance_is_one_plus_the_published_weight(generator):
    tokens, cond, w = states(), generator.encode(["1", "2", "3"]), 0.5
    c, u = generator.logits(tokens, cond, STEP), generator.logits(tokens, generator.null(3), STEP)
    assert torch.allclose(guided_logits(generator, tokens, cond, 1 + w, STEP), (1 + w) * c - w * u, atol=1e-4)
    assert float((c - u).detach().abs().max()) > 0.1


def test_decode_refuses_masks_and_gives_no_gradient(generator):
    codes = torch.zeros(2, 64, dtype=torch.int64)
    assert not generator.decode(codes).requires_grad
    assert not any(value.requires_grad for value in generator.codec.parameters())
    codes[1, 3] = 64
    with pytest.raises(ValueError, match="cannot decode token 64: expected codes 0 to 63, no mask"):
        generator.decode(codes)


def test_a_copy_is_independent_and_stays_tied(generator):
    twin = generator.copy()
    assert twin.policy.head.weight is twin.policy.tok_emb.weight and twin.codec is generator.codec
    cond, before = generator.encode(["3"]), generator.logits(states(1), generator.encode(["3"]), STEP)
    with torch.no_grad():
        twin.policy.tok_emb.weight.add_(1)
    assert torch.equal(generator.logits(states(1), cond, STEP), before)


def test_checkpointed_gradients_equal_plain_ones(generator):
    plain, thrifty = generator, generator.copy()
    thrifty.enable_gradient_checkpointing()
    calls = []
    thrifty.policy.transformer.layers[0].ff.register_forward_hook(lambda *_: calls.append(1))
    for one in (plain, thrifty):
        one.logits(states(), one.encode(["1", "2", "3"]), STEP).square().mean().backward()
    assert len(calls) == 2  # forward, and again in the backward pass
    gradients = dict(thrifty.policy.named_parameters())
    for name, value in plain.policy.named_parameters():
        assert value.grad is not None and torch.equal(value.grad, gradients[name].grad), name
    assert float(gradients["reg_tokens.weight"].grad.abs().max()) > 0
    with torch.no_grad():  # sampling pays nothing
        thrifty.logits(states(), thrifty.encode(["1", "2", "3"]), STEP)
    assert len(calls) == 3


# --- classes


def test_names_and_indices_of_imagenet_classes():
    assert len(set(class_names())) == 1000
    known = {"tench": 0, "Golden Retriever": 207, " 207 ": 207, "tiger cat": 282, "hourglass": 604, "999": 999, "0": 0,
             "cardigan": 474, "Cardigan": 264}  # fmt: skip
    assert [class_index(prompt) for prompt in known] == list(known.values())


@pytest.mark.parametrize("prompt, nearest", [("golden retreiver", r"nearest: 'golden retriever' \(207\)"),
                                             ("1000", "0 to 999; nearest: 999"), ("-1", "nearest: 0"),
                                             ("CARDIGAN", "is not in ImageNet; nearest: .*expected a category"),
                                             ("", "is not in ImageNet")])  # fmt: skip
def test_unknown_classes_name_the_nearest(generator, prompt, nearest):
    with pytest.raises(ValueError, match=nearest):
        generator.encode(["tench", prompt])


def test_conditions_are_labels_and_null_is_one_more(generator):
    assert generator.encode(["tench", "999"]).tensors["labels"].tolist() == [0, 999]
    assert generator.null(2).tensors["labels"].tolist() == [1000, 1000]


# --- files


def test_saved_policies_have_published_names_and_load_again(generator, file, tmp_path):
    with torch.no_grad():
        generator.policy.head.bias.add_(1)
    generator.pace = PaceHead(8).reset(3)
    path = tmp_path / "new" / "policy.safetensors"
    generator.save_policy(path, origin="a test")
    assert sorted(item.name for item in path.parent.iterdir()) == ["policy.pace.safetensors", "policy.safetensors"]
    assert {name: tuple(value.shape) for name, value in load_file(path).items()} == transformer_shapes(**TINY)
    with safe_open(path, "pt") as opened:
        facts = opened.metadata()
    assert facts["family"] == "maskgit" and facts["origin"] == "a test" and json.loads(facts["config"]) == {"heads": 2}
    loaded = load_maskgit(file, CPU, policy=path)
    tokens, cond = states(), generator.encode(["1", "2", "3"])
    assert torch.equal(loaded.logits(tokens, cond, STEP), generator.logits(tokens, cond, STEP))
    assert torch.equal(loaded.pace.layers[0].weight, generator.pace.layers[0].weight)
    assert not can_revise(loaded)
    assert all(value.requires_grad for value in loaded.policy.parameters())
    generator.pace, generator.revises = None, True
    generator.save_policy(path)  # without the pace head of the earlier policy
    assert load_maskgit(file, CPU, policy=path).pace is None and can_revise(load_maskgit(file, CPU, policy=path))


def test_safetensors_and_a_single_name_of_the_tied_weight_are_read(generator, file, tmp_path):
    state = {name: value for name, value in tiny_state().items() if name != "head.weight"}
    save_file(state, tmp_path / "converted.safetensors", {"config": json.dumps({"heads": 2})})
    save_file(tiny_vq_state(), tmp_path / "vq.safetensors")
    loaded = load_maskgit(tmp_path / "converted.safetensors", CPU, vq=tmp_path / "vq.safetensors")
    tokens, cond = states(), generator.encode(["1", "2", "3"])
    assert torch.equal(loaded.logits(tokens, cond, STEP), generator.logits(tokens, cond, STEP))
    assert torch.equal(loaded.decode(tokens.clamp(max=63)), generator.decode(tokens.clamp(max=63)))


def test_loading_uses_neither_network_nor_random_numbers(file, monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    before = torch.get_rng_state()
    generator = load_maskgit(file, CPU)
    generator.logits(states(1), generator.encode(["tench"]), STEP)
    assert torch.equal(before, torch.get_rng_state())


def test_missing_files_are_named_with_their_repositories(file, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load_maskgit(tmp_path / "ImageNet_256_base.pth", CPU)
    message = str(caught.value)
    for part in ("ImageNet_256_base.pth", "llvictorll/Halton-Maskgit", "vq_ds16_c2i.pt", "FoundationVision/LlamaGen",
                 f"put both into {tmp_path}"):  # fmt: skip
        assert part in message
    assert "\n" not in message
    with pytest.raises(FileNotFoundError, match="missing .*other.pt .*LlamaGen") as caught:
        load_maskgit(file, CPU, vq=tmp_path / "other.pt")
    assert "Halton" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"no weights at .*nothing.safetensors"):
        load_maskgit(file, CPU, policy=tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.98])
@pytest.mark.parametrize("name", ["ImageNet_32_test.pth", "vq_ds16_c2i.pt"])
def test_truncated_files_are_refused_in_one_line(tmp_path, name, share):
    file = build_tiny_maskgit(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf"{name} is truncated or no file of weights") as caught:
        load_maskgit(file, CPU)
    assert "\n" not in str(caught.value)


class Trap:
    """Would write a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("plain", [False, True])
def test_unsafe_pickles_are_refused_and_not_run(tmp_path, plain):
    file, trap = build_tiny_maskgit(tmp_path), tmp_path / "sprung"
    payload = {"model_state_dict": {}, "args": Trap(trap)}
    if plain:
        file.write_bytes(pickle.dumps(payload, protocol=2))
    else:
        torch.save(payload, file)
    with pytest.raises(ValueError, match=r"ImageNet_32_test.pth .*(could run code|no file of weights)") as caught:
        load_maskgit(file, CPU)
    assert "\n" not in str(caught.value) and not trap.exists()


def test_settings_of_the_training_code_are_harmless(tmp_path):
    file = build_tiny_maskgit(tmp_path)
    torch.save({"model": tiny_vq_state(), "args": Namespace(lr=1e-4)}, tmp_path / "vq_ds16_c2i.pt")
    assert load_maskgit(file, CPU).codec.patch == 4


def broken(**changes) -> dict:
    """The checkpoint with tensors put in or, as None, taken out."""
    state = tiny_state() | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
    "payload, message",
    [
        ({"weights": {}}, "holds weights, config: expected a dict with 'model_state_dict'"),
        ([1], "holds list: expected a dict"),
        ({"model_state_dict": broken(pos_emb__weight=None)}, "has no 'pos_emb.weight'"),
        ({"model_state_dict": broken(pos_emb__weight=torch.zeros(63, 32))}, "63 rows: expected a square; nearest: 49"),
        ({"model_state_dict": broken(head__weight=torch.zeros(65, 32))}, "head.weight differs from tok_emb.weight"),
        ({"model_state_dict": broken(in_proj__weight=torch.zeros(1))}, "does not fit: .*in_proj.weight"),
        ({"model_state_dict": broken(head__bias=None)}, "does not fit: .*head.bias"),
        ({"model_state_dict": broken(cls_emb__weight=torch.zeros(11, 32))}, "knows 10 classes: expected 1000"),
    ],
)
def test_files_of_another_network_are_refused_in_one_line(tmp_path, payload, message):
    file = build_tiny_maskgit(tmp_path)
    torch.save(payload | {"config": {"heads": 2}} if isinstance(payload, dict) else payload, file)
    with pytest.raises(ValueError, match=message) as caught:
        load_maskgit(file, CPU)
    assert "\n" not in str(caught.value)


def test_unpublished_widths_need_their_heads_and_codebooks_must_agree(tmp_path):
    file = build_tiny_maskgit(tmp_path)
    torch.save({"model_state_dict": tiny_state()}, file)
    with pytest.raises(ValueError, match="width 32 is not published .*512: 6.* 'heads' must be in the file's config"):
        load_maskgit(file, CPU)
    file = build_tiny_maskgit(tmp_path)
    torch.save({"model": filled(vq_shapes(48, 8, 32, (1, 1, 2), 32))}, tmp_path / "vq_ds16_c2i.pt")
    with pytest.raises(ValueError, match="predicts 64 codes, the VQ has 48"):
        load_maskgit(file, CPU)


# --- sampling and training


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
@pytest.mark.parametrize("order", ["halton", "confidence"])
def test_replayed_log_probs_equal_the_sampled_ones(generator, order, guidance_scale):
    sampler = lab.SamplerConfig(steps=4, order=order, guidance_scale=guidance_scale)
    prompts = ["golden retriever", "golden retriever", "850"]
    trajectory = lab.sample(generator, prompts, sampler, seed=1)
    assert int(trajectory.tokens.max()) < 64 and int(trajectory.forwards[0]) == (4 if guidance_scale == 1 else 8)
    assert not torch.equal(trajectory.tokens[0], trajectory.tokens[1])
    with torch.no_grad():
        replayed = lab.trajectory_log_prob(generator, prompts, trajectory, sampler)
    if order == "halton":
        drawn = trajectory.log_prob.sum(1)
    else:
        drawn = trajectory.proposal_log_prob.sum((1, 2)) + trajectory.choice_log_prob.sum(1)
    assert torch.allclose(replayed, drawn, atol=1e-2, rtol=1e-5)
    assert generator.decode(trajectory.tokens).shape == (3, 3, 32, 32)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_two_iterations_of_training_move_the_policy(generator, file, tmp_path, lora_rank):
    def low_codes(images, prompts, trajectory):
        return (trajectory.tokens < 16).float().mean(1)

    config = lab.TrainConfig(
        sampler=lab.SamplerConfig(steps=3, schedule="power"), iterations=2, num_groups=2, group_size=3,
        quality_weights={"low": 1.0}, warmup_iterations=0, learning_rate=1e-3, lora_rank=lora_rank,
    )  # fmt: skip
    generator.enable_gradient_checkpointing()
    records = list(lab.train(generator, ["tench", "207", "teddy"], {"low": low_codes}, config))
    assert [record["iteration"] for record in records] == [1, 2]
    assert all(math.isfinite(record["gradient_norm"]) and record["gradient_norm"] > 0 for record in records)
    assert records[0]["ratio_deviation"] < 1e-3 and records[1]["kl"] > 0
    assert has_adapter(generator.policy) == (lora_rank > 0)
    generator.save_policy(tmp_path / "policy.safetensors")  # an adapter is merged
    tuned, base = load_maskgit(file, CPU, policy=tmp_path / "policy.safetensors"), load_maskgit(file, CPU)
    tokens, cond = states(), base.encode(["1", "2", "3"])
    before, inside, after = (one.logits(tokens, cond, STEP).detach() for one in (base, generator, tuned))
    assert torch.allclose(after, inside, atol=1e-4)
    assert float((after - before).abs().max()) > 1e-3
    assert torch.equal(tuned.codec.decoder.conv_out.weight, base.codec.decoder.conv_out.weight)
