"""What a training run will cost: forward passes and peak memory, before it starts.

Nothing is allocated: the networks are repeated on the meta device, one rollout step, one decode and one micro-batch
of the update run there on shapes alone, and a mode watches how much is alive at once. What peaks one after another
counts once. Left out: what reward models need beside their weights, the allocator's fragments and the libraries'
own buffers, for which `MARGIN` is added.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from speedrl_lab.adapters import add_lora, has_adapter
from speedrl_lab.allocator import give_back
from speedrl_lab.config import TrainConfig
from speedrl_lab.footprint import decode_peak, rollout_peak, shadow, size_of, update_peak, values_of
from speedrl_lab.generator import MaskedGenerator
from speedrl_lab.likelihood import CRITICAL_SHARE
from speedrl_lab.loss import kept_bytes, scored_tokens
from speedrl_lab.precision import untrained
from speedrl_lab.rewards import Reward
from speedrl_lab.schedules import reveal_counts

MARGIN = 1.1
GIB = 2**30
REWARD_WEIGHTS = {
    "open_clip": 151_277_313 * 4,  # ViT-B-32; another model is counted once it is loaded
    "hpsv2.1": 986_109_441 * 4,  # ViT-H-14
    "pickscore": 986_109_441 * 4,  # ViT-H-14
    "imagereward": 447_000_000 * 4,  # BLIP with ViT-L-16; ImageReward.pt is 1.79 GB
    "aesthetic": 427_616_513 * 4,  # ViT-L-14
}
"""Bytes of the weights of rewards that are planned by name, float32 as they are loaded."""


@dataclass(frozen=True)
class Plan:
    """Passes and bytes of a run; `str` and notebooks show a table, `require_fit` refuses what cannot be.

    `passes` are those of one iteration, at most where the policy chooses its steps; a backward pass counts as
    two. `stays` holds what is in memory all the time, `peaks` what comes and goes, one after another; `held` is
    what the machine holds of it already, `free` what is free beside that, and `notes` says what to turn.
    """

    device: str
    passes: dict[str, int]
    iterations: int
    stays: dict[str, int]
    peaks: dict[str, int]
    held: int
    free: int
    knobs: tuple[str, ...]

    @property
    def needed(self) -> int:
        """Bytes at the highest point, with the margin."""
        return int(MARGIN * (sum(self.stays.values()) + max(self.peaks.values())))

    @property
    def fits(self) -> bool:
        return self.needed - self.held <= self.free

    def require_fit(self) -> None:
        """Raise MemoryError in one line: how much is wanted, how much there is, what to turn."""
        if self.fits:
            return
        largest = max(self.stays | self.peaks, key=(self.stays | self.peaks).get)
        raise MemoryError(
            f"the run needs {_gib(self.needed)} on {self.device} and {_gib(self.held + self.free)} can be had; most "
            f"goes to: {largest} ({_gib((self.stays | self.peaks)[largest])}). Turn {', '.join(self.knobs)}"
        )

    def table(self) -> pd.DataFrame:
        """Rows of passes and of memory, in GiB."""
        rows = [("passes an iteration", part, f"{count:,}") for part, count in self.passes.items()]
        rows += [("passes in all", f"{self.iterations} iterations", f"{sum(self.passes.values()) * self.iterations:,}")]
        rows += [("memory that stays", part, _gib(size)) for part, size in self.stays.items()]
        rows += [("highest of these", part, _gib(size)) for part, size in self.peaks.items()]
        margin = f"on {self.device}, with {MARGIN - 1:.0%} for what is not counted"
        rows += [("memory in all", margin, _gib(self.needed))]
        rows += [("can be had", "free now, and what is held of it already", _gib(self.held + self.free))]
        return pd.DataFrame(rows, columns=["what", "part", "amount"])

    def __str__(self) -> str:
        return self.table().to_string(index=False)

    def _repr_html_(self) -> str:
        return self.table().to_html(index=False)


def plan(
    generator: MaskedGenerator | str,
    config: TrainConfig | None = None,
    rewards: Mapping[str, Reward] | Sequence[str] = (),
    copies: int = 0,
    device: torch.device | str | None = None,
    free: int | None = None,
) -> Plan:
    """Estimate a run of `train` before it starts.

    Args:
        generator: one that is loaded, or the name of a preset of a published model, whose sizes are known.
        config: by default the preset's.
        rewards: as they are given to `train`, or names of models that are not loaded yet.
        copies: further copies of the policy that stay, such as the untouched base of a notebook.
        device: where it shall run; by default where the generator is, or CUDA where there is one.
        free: bytes that are free there; by default what the machine says.

    Raises ValueError for a name without published sizes, or where `config` is missing.
    """
    if isinstance(generator, str):
        from speedrl_lab.generators import resolve_device
        from speedrl_lab.generators.blank import blank_generator
        from speedrl_lab.presets import PRESETS

        name, generator = generator, blank_generator(generator)
        config, device = config or PRESETS[name].train, device or resolve_device("auto")
    if config is None:
        raise ValueError("config=None: expected the TrainConfig of the run; only a preset's name brings its own")
    device = torch.device(device or generator.device)
    if config.micro_batch_size == 0:
        config = replace(config, micro_batch_size=largest_micro_batch(generator, config, rewards, copies, device, free))
    blank = shadow(generator)
    policy = size_of(blank.policy.parameters())
    frozen = config.trained == "schedule"
    if config.lora_rank and not has_adapter(blank.policy):
        add_lora(blank, config.lora_rank)
    if config.gradient_checkpointing:
        blank.enable_gradient_checkpointing()
    originals = policy if config.policy_dtype == "bfloat16" else 0
    if originals:
        for value in untrained(blank.policy).values():
            value.data = value.data.bfloat16()
    adapted = has_adapter(blank.policy)
    trained = 0 if frozen else size_of(value for value in blank.policy.parameters() if value.requires_grad)
    height, width = blank.spec.image_size
    samples = config.num_groups * config.group_size
    stays = {
        "policy": size_of(blank.policy.parameters()),
        "reference": 0 if adapted or frozen else policy,
        "other copies of the policy": copies * policy,
        "gradients": trained,
        "optimizer": 2 * trained,
        "best weights and those of the rollout": 2 * trained,
        "average": trained if config.ema_decay else 0,
        "full precision of the weights": originals if device.type == "cpu" else 0,
        **{name: size_of(values_of(module)) for name, module in _others(generator).items()},
        "reward models": _reward_size(rewards, device),
        "pictures of a rollout": samples * 3 * height * width * 4,
    }
    peaks = {
        f"rollout ({samples} samples)": rollout_peak(blank, config),
        f"decoding ({samples} samples)": decode_peak(blank, samples),
        "optimizer step": trained,
        "checkpoint": (0 if originals else policy) + trained,
    }
    if not frozen:
        kept = kept_bytes(config, scored_tokens(config, blank.spec.num_tokens), blank.spec.codebook_size)
        peaks[f"update (micro-batches of {config.micro_batch_size})"] = update_peak(blank, config) + kept
    return Plan(
        device=str(device),
        passes=passes(config, blank.spec.num_tokens, blank.spec.codebook_size),
        iterations=config.iterations,
        stays={part: size for part, size in stays.items() if size},
        peaks={part: size for part, size in peaks.items() if size},
        held=_held(generator, rewards, device),
        free=free_memory(device) if free is None else free,
        knobs=_knobs(config, blank, device, peaks, sum(stays.values())),
    )


def largest_micro_batch(
    generator: MaskedGenerator,
    config: TrainConfig,
    rewards: Mapping[str, Reward] | Sequence[str] = (),
    copies: int = 0,
    device: torch.device | str | None = None,
    free: int | None = None,
) -> int:
    """What `micro_batch_size=0` stands for: of 64, 32, ... 1 rows, or all of fewer samples, the most that fit.

    1 where none fits. Arguments as those of `plan`.
    """
    samples = config.num_groups * config.group_size
    for size in (64, 32, 16, 8, 4, 2):
        tried = replace(config, micro_batch_size=size)
        if size < 2 * samples and plan(generator, tried, rewards, copies, device, free).fits:
            return size
    return 1


def passes(config: TrainConfig, num_tokens: int, codebook_size: int = 1) -> dict[str, int]:
    """Forward passes of one iteration, those of `record["forwards"]` and `record["passes"]`; at most, where steps
    vary. Raises ValueError for more steps than tokens."""
    sampler, samples = config.sampler, config.num_groups * config.group_size
    reveal_counts(num_tokens, sampler.steps)  # raises
    guided = 1 if sampler.guidance_scale == 1.0 and sampler.schedule != "adaptive" else 2
    states = {
        "replay": sampler.steps,
        "critical": -int(-sampler.steps * CRITICAL_SHARE // 1),
        "one_step": 1,
        "random_mask": 1,
        "coupled": 2,
    }[config.estimator]
    counted = {"rollout": samples * sampler.steps * guided}
    if config.trained == "policy":
        kept = kept_bytes(config, scored_tokens(config, num_tokens), codebook_size)
        references = 1 if kept else config.inner_epochs
        counted["update"] = samples * states * guided * (3 * config.inner_epochs + references)
    return counted


def free_memory(device: torch.device | str) -> int:
    """Bytes that a new process could take: of the GPU, or of main memory within the container's limit."""
    device = torch.device(device)
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    import psutil

    give_back()  # what a training before this one has freed
    free = psutil.virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return max(free, 0)


def _others(generator: MaskedGenerator) -> dict[str, nn.Module]:
    """Networks beside policy and pace head, under readable names."""
    return {
        name.replace("_", " "): module for name, module in vars(generator).items()
        if isinstance(module, nn.Module) and name not in ("policy", "pace")
    }  # fmt: skip


def _networks_of(reward: Any, seen: set[int]) -> Iterator[nn.Module]:
    """Networks that a reward function closes over, however deep."""
    if id(reward) in seen:
        return
    seen.add(id(reward))
    if isinstance(reward, nn.Module):
        yield reward
        return
    inside = [cell.cell_contents for cell in getattr(reward, "__closure__", None) or () if cell]
    inside += [part for part in (getattr(reward, "__self__", None), getattr(reward, "__wrapped__", None)) if part]
    for part in inside:
        if callable(part) or isinstance(part, nn.Module):
            yield from _networks_of(part, seen)


def _reward_size(rewards: Mapping[str, Reward] | Sequence[str], device: torch.device) -> int:
    """Weights of the reward models on a device: of loaded ones counted, of names as published."""
    if isinstance(rewards, Mapping):
        seen: set[int] = set()
        networks = [network for reward in rewards.values() for network in _networks_of(reward, seen)]
        unique = {id(value): value for network in networks for value in values_of(network)}
        return size_of(value for value in unique.values() if value.device.type == device.type)
    elsewhere = {name: name.partition("@")[2] for name in rewards}
    return sum(
        REWARD_WEIGHTS.get(name.partition("@")[0].partition(":")[0], 0)
        for name, place in elsewhere.items() if not place or place == str(device)
    )  # fmt: skip


def _held(generator: MaskedGenerator, rewards: Mapping[str, Reward] | Sequence[str], device: torch.device) -> int:
    """What of a run the device holds already."""
    networks = [value for value in vars(generator).values() if isinstance(value, nn.Module)]
    there = [value for network in networks for value in values_of(network) if value.device.type == device.type]
    return size_of(there) + (_reward_size(rewards, device) if isinstance(rewards, Mapping) else 0)


def _knobs(
    config: TrainConfig, generator: MaskedGenerator, device: torch.device, peaks: dict[str, int], stays: int
) -> tuple[str, ...]:
    """What would help, the most first."""
    frozen, highest = config.trained == "schedule", max(peaks, key=peaks.get)
    update = []
    if config.micro_batch_size > 1 and not frozen:
        update.append(f"micro_batch_size={max(1, config.micro_batch_size // 4)}")
    if hasattr(generator, "enable_gradient_checkpointing") and not config.gradient_checkpointing and not frozen:
        update.append("gradient_checkpointing=True")
    weights = ["lora_rank=16"] if not config.lora_rank and not frozen and generator.lora_targets else []
    if config.policy_dtype == "float32" and device.type == "cuda":
        weights.append("policy_dtype='bfloat16'")
    smaller = [f"num_groups={max(1, config.num_groups // 2)}"] if config.num_groups > 1 else []
    smaller += [f"group_size={config.group_size // 2}"] if config.group_size >= 4 else []
    first = update if highest.startswith("update") else smaller
    rest = smaller if first is update else update
    ordered = [*weights, *first, *rest] if stays > peaks[highest] else [*first, *weights, *rest]
    return tuple(ordered) or ("to a machine with more memory",)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
