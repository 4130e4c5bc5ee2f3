"""What each of two processes does for test_parallel.py: `torchrun --nproc-per-node 2 parallel_worker.py FOLDER`."""

import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from conftest import ToyGenerator, make_toy, share_of_twos, weights_of

from speedrl_lab import parallel
from speedrl_lab.config import SamplerConfig, TrainConfig
from speedrl_lab.rewards.speed import speed_reward
from speedrl_lab.rl import rollout, train
from speedrl_lab.runs import Run

PROMPTS = ["a dog", "two cats", "a frog left of a pig", "a star", "a car"]
REWARDS = {"twos": share_of_twos, "speed": speed_reward}
FIXED = TrainConfig(
    sampler=SamplerConfig(steps=2), iterations=3, num_groups=4, group_size=4, learning_rate=0.02,
    warmup_iterations=0, quality_weights={"twos": 1.0}, save_every=1,
)  # fmt: skip
PACED = replace(FIXED, sampler=SamplerConfig(steps=3, schedule="paced"), speed_weight=0.3, practice_steps=(2,))
CONFIGS = {
    "fixed": FIXED,
    "rich": replace(
        PACED, ema_decay=0.8, inner_epochs=2, speed_form="lagrangian", target_steps=2.0, filter_quantile=0.3,
        low_quality="drop", micro_batch_size=3,
    ),
    "masks": replace(FIXED, estimator="random_mask", inner_epochs=2, advantage_std="group"),
    "confident": replace(FIXED, sampler=SamplerConfig(steps=2, order="confidence"), kl_estimator="k3"),
    "lora": replace(FIXED, lora_rank=2),
    "frozen": replace(
        PACED, sampler=SamplerConfig(steps=3, schedule="adaptive"), trained="schedule", practice_steps=(),
    ),
}  # fmt: skip


def trained(config: TrainConfig, folder: Path, stop_after: int | None = None) -> tuple[ToyGenerator, list[dict]]:
    """A toy after training, and its records; stopped early where asked for."""
    generator, records = make_toy(), []
    if parallel.is_main():
        Run.open(folder, asdict(config), resume=True)
    for record in train(generator, PROMPTS, REWARDS, config, Run(folder, asdict(config))):
        records.append({name: value for name, value in record.items() if name != "seconds"})
        if record["iteration"] == stop_after:
            break
    return generator, records


def main(folder: Path) -> None:
    found = {"rank": parallel.rank(), "size": parallel.world_size()}
    for name, config in CONFIGS.items():
        generator, records = trained(config, folder / name)
        found[name] = {"weights": weights_of(generator), "records": records}
    trained(CONFIGS["rich"], folder / "parts", stop_after=1)
    generator, _ = trained(CONFIGS["rich"], folder / "parts")
    found["resumed"] = weights_of(generator)
    drawn = rollout(make_toy(), PROMPTS, REWARDS, FIXED, 0)
    found["drawn"] = {"prompts": drawn.prompts, "tokens": drawn.trajectory.tokens, "rewards": drawn.rewards}
    try:
        next(train(make_toy(), PROMPTS, REWARDS, replace(FIXED, num_groups=3)))
    except ValueError as error:
        found["odd"] = str(error)
    other = make_toy(seed=parallel.rank())
    parallel.same_start([other.policy])
    found["start"] = weights_of(other)
    steered = make_toy()
    asked = []
    record = next(train(steered, PROMPTS, REWARDS, FIXED, steer=lambda number: asked.append(number) or {"kl": 0.5}))
    found["steered"] = (asked, record["changed"])
    torch.save(found, folder / f"{parallel.rank()}.pt")


if __name__ == "__main__":
    with parallel.joined():
        main(Path(sys.argv[1]))
