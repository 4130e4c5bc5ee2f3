"""What makes sampling fast changes no sample: the loop written plainly draws the same tokens."""

import pytest
import torch
from conftest import randomize
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from speedrl_lab import noise
from speedrl_lab.config import SamplerConfig
from speedrl_lab.draws import fixed_orders, start_tokens
from speedrl_lab.generator import Cond, StepInfo, guided_logits, prepared
from speedrl_lab.generators import FAMILIES, load_generator
from speedrl_lab.networks import CHUNK, MaskedTransformer, _gelu
from speedrl_lab.pace import PaceHead, head_for
from speedrl_lab.sampler import sample
from speedrl_lab.schedules import reveal_counts

CAPTIONS = ["a dog", "two cats on a red background", "a dog", "a dog", "a star left of a pig"]
CLASSES = ["tench", "7", "tench", "tench", "golden retriever"]
PLAIN = [
    SamplerConfig(steps=1),
    SamplerConfig(steps=3, order="confidence", choice_temperature=2.0, temperature=0.8, first_temperature=1.5),
    SamplerConfig(steps=3, order="random", schedule="linear", guidance_scale=2.5),
    SamplerConfig(steps=2, order="confidence", guidance_scale=3.0, choice_temperature=0.0),
    SamplerConfig(steps=2, start_noise=0.5, guidance_scale=2.0),
    SamplerConfig(steps=3, schedule="linear", revise=True, guidance_scale=2.0, temperature=0.9),
]
VARYING = [
    SamplerConfig(steps=4, schedule="paced", guidance_scale=2.0),
    SamplerConfig(steps=4, schedule="adaptive"),
    SamplerConfig(steps=4, schedule="random_budget"),
    SamplerConfig(steps=4, schedule="threshold", stop_confidence=0.3),
]


def label(sampler: SamplerConfig) -> str:
    return f"{sampler.order}-{sampler.schedule}-{sampler.steps}-{sampler.guidance_scale}"


@pytest.fixture(params=FAMILIES)
def generator(request):
    family = request.param
    if family == "emoji":
        return request.getfixturevalue("emoji")
    if family == "tiny":
        return load_generator("tiny", device="cpu")
    return request.getfixturevalue("loaded")[family].copy()


def prompts_of(generator) -> list[str]:
    return CLASSES if generator.spec.conditioning == "class" else CAPTIONS


def gumbel(uniforms: Tensor) -> Tensor:
    return -(-uniforms.log()).log()


@torch.no_grad()
def written_plainly(generator, prompts: list[str], sampler: SamplerConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens and log-probabilities (B, N): all positions of all samples at every step, guidance as a second pass."""
    spec, keys = generator.spec, noise.row_keys(seed, prompts)
    sizes = (spec.num_tokens, spec.codebook_size, spec.mask_id)
    tokens = torch.full((len(prompts), spec.num_tokens), spec.mask_id)
    log_prob = torch.zeros(tokens.shape)
    order = None if sampler.order == "confidence" else fixed_orders(generator, sampler, keys)
    counts = reveal_counts(spec.num_tokens, sampler.steps, sampler.schedule, sampler.power).tolist()
    for step, count in enumerate(counts):
        shown = tokens if step else start_tokens(*sizes, sampler.start_noise, keys)
        info = StepInfo(step, sampler.steps)
        logits = generator.logits(shown, generator.encode(prompts), info)
        if sampler.guidance_scale != 1:
            free = generator.logits(shown, generator.null(len(prompts)), info)
            logits = free + sampler.guidance_scale * (logits - free)
        temperature = sampler.temperature * (1 if step else sampler.first_temperature)
        log_probs = (logits / temperature).log_softmax(-1)  # (B, N, V)
        cumulative = log_probs.exp().cumsum(-1)
        target = noise.uniforms(keys, noise.TOKEN, step, spec.num_tokens)[..., None] * cumulative[..., -1:]
        drawn = torch.searchsorted(cumulative, target).clamp(max=spec.codebook_size - 1)  # (B, N, 1)
        chosen = log_probs.gather(-1, drawn).squeeze(-1)
        if order is None:
            level = sampler.choice_temperature * (1 - (step + 1) / sampler.steps)
            scores = chosen + level * gumbel(noise.uniforms(keys, noise.CHOICE, step, spec.num_tokens))
            places = scores.masked_fill(tokens != spec.mask_id, -torch.inf).topk(count, dim=1).indices
        else:
            places = order[:, 0 if sampler.revise else sum(counts[:step]) : sum(counts[: step + 1])]
        tokens = tokens.scatter(1, places, drawn.squeeze(-1).gather(1, places))
        log_prob = log_prob.scatter(1, places, chosen.gather(1, places))
    return tokens, log_prob


@pytest.mark.parametrize("sampler", PLAIN, ids=label)
def test_tokens_are_those_of_the_loop_written_plainly(generator, sampler):
    prompts = prompts_of(generator)
    if sampler.steps > generator.spec.num_tokens:
        pytest.skip("fewer tokens than steps")
    trajectory = sample(generator, prompts, sampler, seed=3)
    tokens, log_prob = written_plainly(generator, prompts, sampler, seed=3)
    assert torch.equal(trajectory.tokens, tokens)
    assert torch.allclose(trajectory.log_prob, log_prob, atol=1e-4, rtol=1e-5)
    assert len(tokens[[0, 2, 3]].unique(dim=0)) > 1  # what is shared is the pass, not the sample


class Plain:
    """A generator without `prepare`, whose pool of prompts is as it was encoded."""

    prepare = None

    def __init__(self, generator):
        self.generator = generator

    def __getattr__(self, name):
        return getattr(self.generator, name)


@pytest.mark.parametrize("sampler", VARYING, ids=label)
def test_varying_schedules_are_the_same_alone_and_without_shared_passes(generator, sampler):
    """A sample alone shares its first pass with nobody."""
    generator.pace = randomize(head_for("adaptive" if sampler.schedule == "adaptive" else "paced", 0), 5, std=0.1)
    prompts = prompts_of(generator)
    together = sample(generator, prompts, sampler, seed=1)
    alone = sample(generator, [prompts[-1]], sampler, seed=1)
    again = sample(Plain(generator), prompts, sampler, seed=1)
    for name in ("tokens", "reveal_step", "steps", "forwards"):
        assert torch.equal(getattr(together, name)[-1:], getattr(alone, name)), name
        assert torch.equal(getattr(together, name), getattr(again, name)), name


def test_prepared_prompts_give_the_same_logits(generator):
    prompts, spec = prompts_of(generator), generator.spec
    cond = generator.encode(prompts).cat(generator.null(1))
    tokens = torch.randint(spec.codebook_size, (4, spec.num_tokens), generator=torch.Generator().manual_seed(0))
    tokens[:, ::2] = spec.mask_id
    rows = torch.tensor([5, 1, 0, 1])
    with torch.no_grad():
        ready = prepared(generator, cond).index(rows)
        expected = generator.logits(tokens, cond.index(rows), StepInfo(1, 4))
        found = generator.logits(tokens, ready, StepInfo(1, 4))
    assert len(ready) == 4 and torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def test_shared_rows_are_numbers_alone():
    plain = Cond({"text": torch.arange(6.0).view(3, 2)})
    ready = plain.shared()
    rows = torch.tensor([2, 0])
    assert ready.index(rows).tensors is ready.tensors and len(ready.index(rows)) == 2
    assert torch.equal(ready.index(rows).take("text"), plain.index(rows).take("text"))
    assert torch.equal(ready.index(rows).cat(ready).take("text"), plain.index(rows).cat(plain).take("text"))
    assert torch.equal(ready.repeat_interleave(2).take("text"), plain.repeat_interleave(2).take("text"))
    one = Cond({"text": torch.ones(1, 2)}).shared().index(torch.zeros(5, dtype=torch.int64))
    assert one.take("text").shape == (5, 2)


@pytest.mark.parametrize("rows", [None, torch.tensor([0, 3, 9, 9, 11])])
def test_one_unconditional_pass_serves_equal_rows(toy, rows):
    generator = toy()
    cond, tokens = generator.encode(["a dog", "two cats", "a pig"]), torch.full((3, 4), 4)
    plain, alike = (guided_logits(generator, tokens, cond, 2.0, StepInfo(0, 2), rows, alike=same) for same in (0, 1))
    assert plain.shape == alike.shape and torch.allclose(plain, alike, atol=1e-5)
    assert torch.allclose(guided_logits(generator, tokens, cond, 2.0, StepInfo(0, 2), rows, generator.null(1)), plain)


class Waiting(TorchDispatchMode):
    """Collects operations that make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else []
        masked = any(index is not None and index.dtype == torch.bool for index in indices)
        if masked or name in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampler", PLAIN, ids=label)
def test_a_fixed_schedule_never_waits_for_the_device(emoji, sampler):
    with Waiting() as waiting:
        sample(emoji, CAPTIONS, sampler)
    assert waiting.found == []
    with Waiting() as waiting:  # the test can fail
        sample(emoji, CAPTIONS, SamplerConfig(steps=3, schedule="threshold"))
    assert waiting.found


def test_numbers_at_positions_are_columns_of_all():
    keys = noise.row_keys(7, CAPTIONS)
    everything = noise.uniforms(keys, noise.TOKEN, 2, 64)
    places = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(row))[:9] for row in range(5)])
    assert torch.equal(noise.uniforms_at(keys, noise.TOKEN, 2, places), everything.gather(1, places))
    bits = everything.double() * 2**23 - 0.5  # no number was rounded
    assert torch.equal(bits, bits.round()) and int(bits.min()) >= 0 and int(bits.max()) < 2**23


@pytest.mark.parametrize("count", [1, CHUNK, 2 * CHUNK + 3])
def test_the_network_in_parts_is_the_network(count):
    network = randomize(MaskedTransformer(width=32, depth=2).eval(), 0, std=0.1)
    rng = torch.Generator().manual_seed(0)
    tokens, words = (torch.randint(high, (count, length), generator=rng) for high, length in ((1001, 64), (65, 12)))
    rows = torch.randint(count * 64, (50,), generator=rng)
    whole = network(tokens, words)  # with gradient: in one part, and the library's GELU
    with torch.no_grad():
        assert torch.allclose(network(tokens, words), whole, atol=1e-5)
        assert torch.allclose(network(tokens, words, rows), whole.flatten(0, 1)[rows], atol=1e-5)
    assert torch.allclose(network(tokens, words, rows), whole.flatten(0, 1)[rows], atol=1e-5)


def test_gelu_without_gradient_is_the_librarys():
    x = torch.linspace(-30, 30, 10_001)
    with torch.no_grad():
        assert torch.allclose(_gelu(x), functional.gelu(x, approximate="tanh"), atol=1e-6)


def test_a_generator_need_not_prepare(emoji):
    emoji.pace = PaceHead().reset(0)
    assert prepared(Plain(emoji), cond := emoji.encode(CAPTIONS)) is cond
