"""What the benchmarks share: seconds in turns, peak memory, floating-point operations, generators of full size."""

import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from speedrl_lab.generator import Cond, MaskedGenerator
from speedrl_lab.generators import load_generator, resolve_device
from speedrl_lab.generators.blank import NAMES, WORDS, blank_generator

EMBEDDED = ("emoji", "tiny")
SIZES = (*EMBEDDED, *NAMES)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""`cpu` counts what this process computed, all threads together: for one thread beside other work."""


def seconds(action: Callable[[], object], device: torch.device, clock: str = "wall") -> float:
    """Time of one call."""
    wait(device)
    began = CLOCKS[clock]()
    action()
    wait(device)
    return CLOCKS[clock]() - began


def in_turns(
    actions: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, clock: str = "wall"
) -> dict[str, float]:
    """Median seconds of each action: one call to warm up, then they take turns."""
    for action in actions.values():
        action()
    turns = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            turns[name].append(seconds(action, device, clock))
    return {name: statistics.median(values) for name, values in turns.items()}


def peak_megabytes(action: Callable[[], object], device: torch.device) -> float:
    """Of one call: what CUDA allocated at most; on a CPU the largest resident size of the process so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    action()
    wait(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def peak_flops(device: torch.device, dtype: torch.dtype, clock: str = "wall", size: int = 2048) -> float:
    """Floating-point operations a second of the machine's best of several square products."""
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: left @ right, device, clock) for _ in range(8))


def flops(action: Callable[[], object]) -> int:
    """Floating-point operations of products, convolutions and attentions in one call."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


def full_size(name: str) -> MaskedGenerator:
    """A generator to measure: an embedded one, or a published size with random weights and random conditions.

    The policy is bfloat16 on a GPU, float32 on a CPU.
    """
    device = resolve_device("auto")
    if name in EMBEDDED:
        return load_generator(name, device=str(device))
    generator = blank_generator(name)
    for part in (generator.policy, generator.codec):
        part.to_empty(device=device)
        with torch.no_grad():
            for at, value in enumerate(part.parameters()):
                rng = torch.Generator(device).manual_seed(at)
                value.fill_(1.0) if value.ndim == 1 else value.uniform_(-0.03, 0.03, generator=rng)
            for value in part.buffers():
                value.zero_()
    if device.type == "cuda":
        generator.policy.bfloat16()
    if name == "maskgit":
        generator.policy.tie()
        return generator
    sizes, (kind, *_) = generator.text_encoder.config, type(generator).__bases__
    encoded = type("Encoded", (kind,), {"encode": lambda self, prompts: random_conditions(prompts, sizes, device)})
    return encoded(generator.spec, generator.policy, generator.codec, None, torch.nn.Identity())


def random_conditions(prompts: Sequence[str], sizes: Any, device: torch.device) -> Cond:
    """Of the widths of a text encoder's config; the text of a prompt is the seed."""
    rows = []
    for prompt in prompts:
        rng = torch.Generator().manual_seed(sum(prompt.encode()))
        shapes = {"text": (WORDS, sizes.hidden_size), "pooled": (sizes.projection_dim,)}
        rows.append({part: torch.randn(shape, generator=rng) for part, shape in shapes.items()})
    return Cond({part: torch.stack([row[part] for row in rows]).to(device) for part in rows[0]})


def prompts_of(generator: MaskedGenerator, batch: int, group: int) -> list[str]:
    """`batch` prompts, each `group` times in a row."""
    if generator.spec.conditioning == "class":
        known = [str(number) for number in range(1000)]
    elif generator.spec.name in EMBEDDED:
        from speedrl_lab.prompts import load_prompts

        known = load_prompts("validation")
    else:
        known = [f"prompt {number}" for number in range(batch)]
    return [known[row // group] for row in range(batch)]
