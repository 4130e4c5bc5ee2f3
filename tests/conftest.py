"""Two generators with random weights: the embedded one made tiny, and a toy that can be enumerated."""

import socket
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from speedrl_lab.generator import Cond, GeneratorSpec, MaskedGenerator, StepInfo
from speedrl_lab.generators import load_generator
from speedrl_lab.generators.emoji import WEIGHTS, EmojiGenerator
from speedrl_lab.networks import MaskedTransformer, Tokenizer
from speedrl_lab.pace import PaceHead
from speedrl_lab.weights import load_weights

GOLDEN = Path(__file__).parent / "golden"


@torch.no_grad()
def randomize(module: nn.Module, seed: int, std: float = 0.3) -> nn.Module:
    """Fill every parameter from a seed; fresh heads are zero and would make every check trivial."""
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        is_norm_scale = parameter.ndim == 1 and name.endswith("weight")
        parameter.copy_(is_norm_scale + torch.randn(parameter.shape, generator=rng) * std)
    return module


def tiny_emoji(tokenizer: Tokenizer, seed: int = 0) -> EmojiGenerator:
    """The embedded generator with a random transformer of one block and a fresh pace head."""
    policy = randomize(MaskedTransformer(width=32, depth=1).eval(), seed)
    return EmojiGenerator(policy, tokenizer, PaceHead().reset(seed))


class ToyPolicy(nn.Module):
    """A small network from 4 tokens and 2 prompt numbers to logits (B, 4, 3)."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4 * 5 + 2, 16), nn.Linear(16, 4 * 3)

    def forward(self, tokens: Tensor, text: Tensor) -> Tensor:
        seen = nn.functional.one_hot(tokens, 5).flatten(1).float()  # (B, 20)
        return self.last(self.first(torch.cat([seen, text], 1)).tanh()).unflatten(1, (4, 3))


class ToyGenerator:
    """2x2 tokens of 3 codes, the mask's id above them: all 81 outcomes can be enumerated."""

    lora_targets = ("first", "last")

    spec = GeneratorSpec(
        name="toy", grid=(2, 2), image_size=(2, 2), codebook_size=3, mask_id=4, conditioning="text",
        time_input="none",
    )  # fmt: skip

    def __init__(self, policy: ToyPolicy, pace: PaceHead | None = None):
        self.policy, self.pace, self.device = policy, pace, torch.device("cpu")

    def encode(self, prompts: Sequence[str]) -> Cond:
        return Cond({"text": torch.tensor([[1.0, len(prompt) / 10] for prompt in prompts])})

    def null(self, count: int) -> Cond:
        return Cond({"text": torch.zeros(count, 2)})

    def logits(self, tokens: Tensor, cond: Cond, step: StepInfo, rows: Tensor | None = None) -> Tensor:
        logits = self.policy(tokens, cond.tensors["text"])
        return logits if rows is None else logits.flatten(0, 1)[rows]

    def decode(self, tokens: Tensor) -> Tensor:
        return (tokens / 2).unflatten(1, (2, 2))[:, None].repeat(1, 3, 1, 1)

    def copy(self) -> "ToyGenerator":
        return ToyGenerator(deepcopy(self.policy), deepcopy(self.pace))

    def save_policy(self, path: Path | str, origin: str = "") -> None:
        save_file(dict(self.policy.state_dict()), path)


def make_toy(seed: int = 0, pace: bool = False) -> ToyGenerator:
    """A toy with random weights; a pace head that is not indifferent where asked for."""
    head = randomize(PaceHead(8), seed + 1, std=0.5) if pace else None
    return ToyGenerator(randomize(ToyPolicy(), seed, std=0.7), head)


def share_of_twos(images: Tensor, prompts: Sequence[str], trajectory) -> Tensor:
    """A reward for the toy: the share of tokens that are 2."""
    return (trajectory.tokens == 2).float().mean(1)


def weights_of(generator) -> Tensor:
    """All policy and pace weights in one vector."""
    modules = [generator.policy] + ([] if generator.pace is None else [generator.pace])
    return torch.cat([p.detach().flatten() for module in modules for p in module.parameters()])


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> dict[str, str]:
    """Names by which tiny published models of each family load; skips where their libraries are missing."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from maskgit_fixtures import build_tiny_maskgit
    from meissonic_fixtures import build_tiny_meissonic
    from published_fixtures import build_tiny_amused

    folder = tmp_path_factory.mktemp("published")
    builders = {"amused": build_tiny_amused, "meissonic": build_tiny_meissonic, "maskgit": build_tiny_maskgit}
    return {family: f"{family}:{build(folder / family)}" for family, build in builders.items()}


@pytest.fixture(scope="session")
def loaded(published: dict[str, str]) -> dict[str, MaskedGenerator]:
    """One of each, in main memory; tests take copies."""
    return {family: load_generator(name, device="cpu") for family, name in published.items()}


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_weights(WEIGHTS / "tokenizer.safetensors", "Tokenizer")


@pytest.fixture
def emoji(tokenizer: Tokenizer) -> EmojiGenerator:
    return tiny_emoji(tokenizer)


@pytest.fixture(autouse=True)
def whole_precision():
    """A test that trains may let products be bfloat16, where a CPU has them; the next one finds them as they were."""
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def toy() -> Callable[..., ToyGenerator]:
    return make_toy


@pytest.fixture
def offline(monkeypatch) -> None:
    """Fails the test that asks the network."""

    def refuse(*args):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def benchmark():
    """benchmarks/rl_update.py, whose plain replay is the slow way, and which counts memory."""
    import rl_update

    return rl_update
