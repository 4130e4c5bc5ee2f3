"""The gradient of one Speed-RL update, ours beside the replay that one would write first.

    OMP_NUM_THREADS=1 python benchmarks/rl_update.py                 # the embedded generator, every case
    OMP_NUM_THREADS=1 python benchmarks/rl_update.py --compiled      # ours by torch.compile, the plain one as before
    python benchmarks/rl_update.py --generator amused-256 --case power-2-lora --groups 1 --group-size 2 --repeats 1

The plain replay holds a second full copy of the network as its reference, and at every step scores every sample with
logits at all N positions, of which it keeps those revealed there; one step of the whole batch is in memory at once.
Both get the same rollout, the same weights and the same stored log-probabilities, and take turns in one process.
Printed: images a second (median of the turns), their ratio; bytes at the highest, weights and gradients among them;
relative distance of the two gradients. Published sizes have random weights and random encoded prompts.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from measure import CLOCKS, full_size, prompts_of, seconds
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from speedrl_lab.config import SamplerConfig, TrainConfig
from speedrl_lab.generator import MaskedGenerator, StepInfo
from speedrl_lab.generators import load_generator, resolve_device
from speedrl_lab.learner import Learner
from speedrl_lab.loss import RolloutLoss
from speedrl_lab.objective import clipped_surrogate, kl_penalty
from speedrl_lab.pace import head_for
from speedrl_lab.sampler import policy_logits, sample
from speedrl_lab.trajectory import Trajectory

KL_WEIGHT = 0.01
NAMES = ("amused-256", "amused-512", "meissonic")
CASES = {
    "power-4": {"sampler": SamplerConfig(steps=4, schedule="power")},
    "power-8": {"sampler": SamplerConfig(steps=8, schedule="power")},
    "paced-8": {"sampler": SamplerConfig(steps=8, schedule="paced")},
    "paced-8-tuned": {"sampler": SamplerConfig(steps=8, schedule="paced")},
    "paced-8-lora": {"sampler": SamplerConfig(steps=8, schedule="paced"), "lora_rank": 16},
    "paced-8-epochs-4": {"sampler": SamplerConfig(steps=8, schedule="paced"), "inner_epochs": 4},
    "power-2-lora": {"sampler": SamplerConfig(steps=2, schedule="power"), "lora_rank": 16},
    "guided-12-lora": {"sampler": SamplerConfig(steps=12, schedule="paced", guidance_scale=10.0), "lora_rank": 16},
}
EMBEDDED = ("power-4", "power-8", "paced-8", "paced-8-tuned", "paced-8-lora", "paced-8-epochs-4")


@dataclass
class Work:
    """A rollout with made-up advantages, and all that scores it."""

    learner: Learner
    config: TrainConfig
    prompts: list[str]
    trajectory: Trajectory
    advantage: Tensor
    compiled: bool = False
    """Whether ours runs by torch.compile."""

    @property
    def policy(self) -> nn.Module:
        return self.learner.generator.policy


def ours(work: Work) -> None:
    """Gradients of all inner epochs, as the learner makes them; the weights stay."""
    work.policy.compiled = work.compiled
    kept = torch.ones_like(work.advantage, dtype=torch.bool)
    loss = RolloutLoss(
        work.learner.generator, work.learner.anchored, work.config, work.prompts, work.trajectory, 0,
        work.config.micro_batch_size,
    )  # fmt: skip
    for _ in range(work.config.inner_epochs):
        work.policy.zero_grad()
        loss.backward(work.advantage, kept, KL_WEIGHT)


def plain(work: Work, reference: MaskedGenerator) -> None:
    """The same gradients: every step, every sample, every position, the reference again in each epoch."""
    generator, config, trajectory = work.learner.generator, work.config, work.trajectory
    sampler, cond = config.sampler, generator.encode(work.prompts)
    work.policy.compiled = False
    for _ in range(config.inner_epochs):
        work.policy.zero_grad()
        for step in range(int(trajectory.steps.max())):
            state, info, here = trajectory.state(step), StepInfo(step, sampler.steps), trajectory.revealed(step)
            log_probs = policy_logits(generator, state, cond, sampler, info).log_softmax(-1)  # (B, N, V)
            with torch.no_grad():
                anchor = policy_logits(reference, state, cond, sampler, info).log_softmax(-1)
            chosen = log_probs.gather(-1, trajectory.tokens[..., None]).squeeze(-1)  # (B, N)
            advantage = work.advantage[:, None].expand_as(chosen)
            value, _, _ = clipped_surrogate(chosen, trajectory.log_prob, advantage, config.clip_range)
            kl = kl_penalty(log_probs[here], anchor[here], trajectory.tokens[here], config.kl_estimator)
            loss = -(value * here).sum() + KL_WEIGHT * kl.sum()
            (loss / trajectory.tokens.numel()).backward()


def prepare(name: str, case: str, options: argparse.Namespace) -> tuple[Work, MaskedGenerator]:
    """The work of a case, and a second copy of the network with its starting weights."""
    config = TrainConfig(
        num_groups=options.groups, group_size=options.group_size, micro_batch_size=options.micro_batch_size,
        kl_estimator=options.kl_estimator, seed=0, **CASES[case],
    )  # fmt: skip
    tuned = "data/weights/speed_rl.safetensors" if case.endswith("tuned") else None
    generator = load_generator(name, policy=tuned) if name == "emoji" else full_size(name)
    generator.policy.float()  # gradients are compared
    if config.sampler.schedule == "paced" and generator.pace is None:
        generator.pace = head_for("paced", 0).to(generator.device)
    reference = generator.copy()
    if options.compiled:
        generator.compile()
    learner = Learner(generator, config)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():  # away from the reference, so that the KL has a gradient
        for value in learner.generator.policy.parameters():
            if value.requires_grad:
                noise = torch.randn(value.shape, generator=rng).to(value)
                value.add_(noise * (0.01 * value.std() if value.numel() > 1 and value.std() > 0 else 1e-3))
    chosen = prompts_of(generator, options.groups * options.group_size, options.group_size)
    trajectory = replace(sample(generator, chosen, config.sampler), pace=None)  # the head is the same work for both
    advantage = torch.randn(len(chosen), generator=rng).to(generator.device)
    return Work(learner, config, chosen, trajectory, advantage, options.compiled), reference


def peak(work: Callable[[], None], device: torch.device) -> int:
    """Bytes that come and go, at the highest."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def weights(*networks: nn.Module | None) -> int:
    return sum(value.numel() * value.element_size() for net in networks if net for value in net.parameters())


def gradient(work: Work) -> Tensor:
    return torch.cat([value.grad.flatten() for value in work.policy.parameters() if value.grad is not None])


def measure(name: str, case: str, options: argparse.Namespace) -> str:
    """One row of the table."""
    work, copy = prepare(name, case, options)
    device, learner = work.learner.generator.device, work.learner
    own = learner.reference.policy if learner.reference else None
    found, highest = {}, {}
    turns = {"ours": lambda: ours(work), "plain": lambda: plain(work, copy)}
    for key, turn in turns.items():
        work.policy.zero_grad(set_to_none=True)
        stays = weights(work.policy, own if key == "ours" else copy.policy)
        highest[key] = stays + peak(turn, device)  # a warm-up as well; gradients are made inside
        found[key] = gradient(work)
    distance = float((found["ours"] - found["plain"]).norm() / found["plain"].norm())
    del found
    times = {key: [] for key in turns}
    for _ in range(options.repeats):
        for key, turn in turns.items():
            times[key].append(seconds(turn, device, options.clock))
    rate = {key: len(work.prompts) / statistics.median(column) for key, column in times.items()}
    ratio = rate["ours"] / rate["plain"]
    steps = float(work.trajectory.steps.float().mean())
    return (
        f"| {name} {case} | {steps:.2f} | {rate['ours']:.2f} | {rate['plain']:.2f} | {ratio:.2f} "
        f"| {highest['ours'] / 2**20:.0f} | {highest['plain'] / 2**20:.0f} "
        f"| {highest['ours'] / highest['plain']:.2f} | {distance:.1e} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generator", default="emoji", choices=("emoji", *NAMES))
    parser.add_argument("--case", nargs="*", choices=CASES, default=list(EMBEDDED))
    parser.add_argument("--groups", type=int, default=12)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--micro-batch-size", type=int, default=32)
    parser.add_argument("--kl-estimator", default="exact")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--matmul-precision", choices=("highest", "medium"), default="highest")
    options = parser.parse_args()
    if options.compiled and options.generator in NAMES:
        parser.error(f"--compiled: {options.generator} has no compiled form; expected emoji")
    torch.set_float32_matmul_precision(options.matmul_precision)
    size = f"{options.groups} x {options.group_size} samples, micro-batches of {options.micro_batch_size}"
    facts = f"{options.clock} time, {options.matmul_precision} products, {size}, median of {options.repeats}"
    print(f"{resolve_device('auto')}, {torch.get_num_threads()} threads, {facts}\n")
    print("| case | steps | ours, images/s | plain, images/s | ratio | ours, MiB | plain, MiB | ratio | gradient |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case in options.case:
        print(measure(options.generator, case, options), flush=True)


if __name__ == "__main__":
    main()
