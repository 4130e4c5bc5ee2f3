"""A compiled network computes what the network does: logits, gradients, samples, a run that is stopped and goes on."""

import os
import subprocess
import sys
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from conftest import randomize, share_of_twos, weights_of
from safetensors.torch import load_file
from test_enumeration import HALTON, excess, find

from speedrl_lab import networks, scenes, training
from speedrl_lab.adapters import adapter_off, add_lora
from speedrl_lab.compilation import compiled, require_compiler
from speedrl_lab.config import SamplerConfig, TrainConfig
from speedrl_lab.enumeration import enumerate_trajectories
from speedrl_lab.generator import StepInfo
from speedrl_lab.generators import load_generator
from speedrl_lab.generators.tiny import TinyGenerator
from speedrl_lab.likelihood import trajectory_log_prob
from speedrl_lab.networks import MaskedTransformer
from speedrl_lab.pace import PaceHead
from speedrl_lab.planner import plan
from speedrl_lab.rl import train
from speedrl_lab.runs import Run
from speedrl_lab.sampler import sample

PROMPTS = ["a dog", "two cats", "a frog left of a pig"]
CONFIG = TrainConfig(
    sampler=SamplerConfig(steps=2, schedule="linear"), iterations=3, num_groups=2, group_size=4, micro_batch_size=5,
    quality_weights={"twos": 1.0}, learning_rate=0.02, warmup_iterations=0, save_every=1,
)  # fmt: skip
ROOT = Path(__file__).parent.parent


def written(depth: int = 1) -> TinyGenerator:
    """2x2 tokens of 3 codes."""
    policy = MaskedTransformer((2, 2), (3,), len(scenes.WORDS), scenes.MAX_WORDS, width=32, depth=depth, heads=2)
    return TinyGenerator(randomize(policy.eval(), 0), randomize(PaceHead(width=8), 1))


def fused(depth: int = 1) -> TinyGenerator:
    """The same by torch.compile."""
    generator = written(depth)
    generator.policy.compiled = True
    return generator


@pytest.fixture(autouse=True, scope="module")
def compiler():
    try:
        require_compiler(torch.device("cpu"))
    except OSError as error:
        pytest.skip(str(error))


@pytest.fixture
def quick(monkeypatch):
    """The same graphs without kernels of their own: a compiler would take most of the time."""
    monkeypatch.setattr(networks, "compiled", cache(partial(torch.compile, dynamic=True, backend="aot_eager")))


def states(generator: TinyGenerator, count: int) -> tuple:
    """Tokens, some of them masks, and prompts."""
    rng = torch.Generator().manual_seed(count)
    tokens = torch.randint(generator.spec.mask_id + 1, (count, 4), generator=rng)
    return tokens, generator.encode([PROMPTS[row % 3] for row in range(count)]), StepInfo(0, 2)


def gradient(generator: TinyGenerator, count: int) -> torch.Tensor:
    """Of a sum that weights all logits, over what is trained."""
    logits = generator.logits(*states(generator, count), torch.arange(count * 4)).log_softmax(-1)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    trained = [value for value in generator.policy.parameters() if value.requires_grad]
    parts = torch.autograd.grad((logits * weights).sum(), trained, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def test_the_same_few_graphs_serve_any_number_of_rows(quick):
    from torch._dynamo.utils import counters

    plain, fast = written(depth=2), fused(depth=2)
    for count in (1, 3, 4, 8, 9, 21):
        for rows in (None, torch.arange(count * 4).flip(0)[::2]):
            with torch.no_grad():
                expected, found = (one.logits(*states(one, count), rows) for one in (plain, fast))
            assert torch.allclose(found, expected, atol=1e-4)
            assert torch.allclose(fast.logits(*states(fast, count), rows), expected, atol=1e-4)
        expected, found = gradient(plain, count), gradient(fast, count)
        assert (found - expected).norm() <= 1e-5 * expected.norm()
        if count == 3:  # one row has graphs of its own
            before = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == before


def test_replayed_trajectories_have_the_log_probability_of_the_network(quick):
    plain, fast = written(), fused()
    for sampler in (HALTON, SamplerConfig(steps=3, schedule="paced"), SamplerConfig(steps=2, order="confidence")):
        drawn = sample(fast, PROMPTS, sampler)
        found, expected = (trajectory_log_prob(one, PROMPTS, drawn, batch_size=2) for one in (fast, plain))
        assert torch.allclose(found, expected, atol=1e-4)


def test_what_inductor_makes_draws_the_enumerated_distribution_and_has_the_gradient_of_the_network():
    plain, fast = written(), fused()
    prompts = PROMPTS[:2] * 3000
    with torch.no_grad():
        outcomes = enumerate_trajectories(plain, PROMPTS[0], HALTON)
        drawn = sample(fast, prompts, HALTON, seed=1)
        assert torch.allclose(trajectory_log_prob(fast, prompts, drawn), drawn.log_prob.sum(1), atol=1e-4)
    first = find(drawn.select(torch.arange(0, len(prompts), 2)), outcomes)
    assert abs(excess(first, outcomes.log_prob)) < 4
    expected, found = gradient(plain, 6), gradient(fast, 6)
    assert (found - expected).norm() <= 1e-5 * expected.norm() > 0


def test_an_adapter_is_compiled_too(quick):
    pytest.importorskip("peft")
    plain, fast = written(), fused()
    for generator in (plain, fast):
        add_lora(generator, 2)
        randomize(generator.policy, 5)
    expected, found = gradient(plain, 6), gradient(fast, 6)
    assert (found - expected).norm() <= 1e-5 * expected.norm() > 0
    with torch.no_grad():
        on = [one.logits(*states(one, 6)) for one in (plain, fast)]
        with adapter_off(plain.policy), adapter_off(fast.policy):
            off = [one.logits(*states(one, 6)) for one in (plain, fast)]
    assert torch.allclose(*on, atol=1e-4) and torch.allclose(*off, atol=1e-4)
    assert not torch.allclose(on[0], off[0], atol=1e-2)


def test_copies_are_compiled_and_files_are_those_of_the_network(quick, tmp_path):
    plain, fast = written(), fused()
    twin = fast.copy()
    assert twin.policy.compiled and list(twin.policy.state_dict()) == list(plain.policy.state_dict())
    with torch.no_grad():
        twin.policy.code_head.bias.add_(1.0)
        assert torch.allclose(fast.logits(*states(fast, 2)), plain.logits(*states(plain, 2)), atol=1e-4)
    for name, generator in (("plain", plain), ("fast", fast)):
        generator.save_policy(tmp_path / name)
    files = [load_file(tmp_path / name) for name in ("plain", "fast")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    loaded = load_generator("tiny", "cpu", policy=tmp_path / "fast", compiled=True)
    assert loaded.policy.compiled and not load_generator("tiny", "cpu").policy.compiled


def test_a_run_learns_the_same_and_goes_on_bit_for_bit(quick, tmp_path):
    def trained(generator, folder: str, stop_after: int = 3) -> torch.Tensor:
        run = Run.open(tmp_path / folder, asdict(CONFIG), resume=True)
        for record in train(generator, PROMPTS, {"twos": share_of_twos}, CONFIG, run):
            if record["iteration"] == stop_after:
                break
        return weights_of(generator)

    whole = trained(fused(), "whole")
    trained(fused(), "parts", stop_after=2)
    assert torch.equal(trained(fused(), "parts"), whole)
    moved, expected = whole - weights_of(written()), trained(written(), "plain") - weights_of(written())
    assert (moved - expected).norm() < 0.05 * expected.norm()  # Adam divides by what may be small


def test_a_plan_counts_the_network_as_written():
    sizes = [plan(generator, CONFIG, device="cpu", free=2**30).peaks for generator in (written(), fused())]
    assert sizes[0] == sizes[1]


def test_the_knob_reaches_the_network_and_families_without_it_refuse(monkeypatch):
    class Reached(Exception):
        pass

    def load(*given):
        raise Reached(given[-1])

    monkeypatch.setattr(training, "load_generator", load)
    for value in (True, False):
        with pytest.raises(Reached, match=str(value)):
            training.run({"preset": "smoke", "compiled": value})
    for name in ("amused:folder", "meissonic:folder", "maskgit:file"):
        with pytest.raises(ValueError, match="compiled=True means nothing to generator") as caught:
            load_generator(name, compiled=True)
        assert "\n" not in str(caught.value)


def test_a_missing_compiler_is_one_line_before_anything_starts(tmp_path):
    command = [sys.executable, "-m", "speedrl_lab", "train", "preset=smoke", "generator=tiny", "compiled=True"]
    folders = dict.fromkeys(("TORCHINDUCTOR_CACHE_DIR", "SPEEDRL_OUTPUTS"), str(tmp_path))
    surroundings = os.environ | folders | {"CXX": "/no/such/compiler"}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=surroundings)
    lines = [line for line in ended.stderr.splitlines() if line.startswith("speedrl_lab:")]
    assert ended.returncode == 2 and ended.stdout == "" and "Traceback" not in ended.stderr
    assert len(lines) == 1 and "compiled=True needs a C++ compiler (g++, or the one that CXX names)" in lines[0]


def test_nothing_is_compiled_or_loaded_for_it_before_it_is_asked_for():
    code = (
        "import sys, speedrl_lab, speedrl_lab.generators.emoji, speedrl_lab.compilation\n"
        "sys.exit('torch._dynamo' in sys.modules or 'torch._inductor' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    assert compiled(abs) is compiled(abs)
