"""Train Speed-RL and its rivals with equal budgets of passes and three seeds each, from the committed base.

    python data/build_rivals.py                       # all of them, one after the other; goes on where it stopped
    python data/build_rivals.py sdtt dimo --seeds 0 1  # some; several processes may share the work

About 120,000 passes each, that of a start included; `dimo-long` has 353,000, `dimo-longest` 1,060,000,
`revise-then-rl` 394,000, `both-then-rl` 816,000: from halfway between `dimo-long` and `revise` of the same seed.

Runs land in outputs/rivals/<method>-<seed>.
Seconds depend on the machine; passes (forward passes of every network, a backward pass counted as two) do not.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm
from weigh_prompts import weighted

import speedrl_lab as lab
from speedrl_lab.average import mix
from speedrl_lab.generator import MaskedGenerator
from speedrl_lab.runs import outputs_root

RL = {
    "quality_weights": {"verified": 1.0, "coherence": 0.5, "clip": 0.3, "variety": 0.8}, "practice_steps": [1, 2],
    "kl_weight": 0.05,
    "speed_form": "lagrangian", "speed_weight": 0.3, "target_steps": 3.0, "ema_decay": 0.9,
}  # fmt: skip
METHODS = {
    "sdtt": {"method": "sdtt", "distill_iterations": 190, "pool_size": 512, "distill_learning_rate": 2e-4,
             "reverse_share": 1.0},
    "dimo": {"method": "dimo", "distill_iterations": 82, "start_noise": 0.4},
    "adanat": {"iterations": 180, "schedule": "adaptive", "trained": "schedule", "pace_learning_rate": 4e-3,
               "quality_weights": {"verified": 1.0, "coherence": 0.5, "clip": 0.3, "novelty": 0.4},
               "speed_form": "lagrangian", "speed_weight": 0.3, "target_steps": 4.0},
    "speed-rl": {"iterations": 92, **RL},
    "dimo-half": {"method": "dimo", "distill_iterations": 41},
    "distil-then-rl": {"iterations": 46, "learning_rate": 1e-4, **RL},
    "dimo-long": {"method": "dimo", "distill_iterations": 240, "start_noise": 0.4, "compiled": True},
    "dimo-longest": {"method": "dimo", "distill_iterations": 720, "start_noise": 0.4, "compiled": True},
    "revise": {"method": "revise", "distill_iterations": 560, "pool_size": 2560, "teacher_guidance": 1.0,
               "teacher_temperature": 0.6, "power": 2.0, "distill_learning_rate": 5e-4, "distill_ema": 0.98,
               "compiled": True},
    "revise-then-rl": {"iterations": 78, "revise": True, "power": 2.0, "learning_rate": 2e-4, "warmup_iterations": 4,
                       "quality_weights": {"verified": 1.0, "coherence": 0.7, "clip": 0.3, "variety": 1.0},
                       "practice_steps": [2, 4, 1], "kl_weight": 0.05, "speed_form": "lagrangian",
                       "speed_weight": 0.3, "target_steps": 3.2, "ema_decay": 0.9, "compiled": True},
    "both-then-rl": {"iterations": 130, "revise": True, "power": 2.0, "temperature": 0.8, "start_noise": 0.05,
                     "learning_rate": 2e-4, "warmup_iterations": 4, "kl_weight": 0.03, "practice_steps": [2, 4, 3, 1],
                     "quality_weights": {"verified": 1.6, "coherence": 0.7, "clip": 0.3, "variety": 0.5},
                     "speed_form": "lagrangian", "speed_weight": 0.5, "target_steps": 3.7, "ema_decay": 0.9,
                     "micro_batch_size": 48, "compiled": True},
}  # fmt: skip
START = {"distil-then-rl": ["dimo-half"], "revise-then-rl": ["revise"], "both-then-rl": ["dimo-long", "revise"]}
"""Methods that start from another one's policy of the same seed, or halfway between two; their passes count."""
WEIGHTED = {"both-then-rl": ("and", 500)}
"""Methods that practise one kind of scene more than others, and of how many captions."""


def settings(method: str, seed: int) -> lab.RunConfig:
    knobs = METHODS[method]
    distilled = {"schedule": "power", "speed_weight": 0.0} if "method" in knobs else {}
    return lab.RunConfig.from_flat("emoji", device="cpu", seed=seed, **distilled, **knobs)


def start(method: str, seed: int) -> MaskedGenerator:
    places = [outputs_root() / "rivals" / f"{name}-{seed}" / "policy.safetensors" for name in START.get(method, [])]
    policy, *others = places or [None]
    generator = lab.load_generator("emoji", device="cpu", policy=policy, compiled="compiled" in METHODS[method])
    for other in others:
        mix(generator, lab.load_generator("emoji", device="cpu", policy=other), 0.5)
    return generator


def records(method: str, config: lab.RunConfig, seed: int) -> Iterator[dict[str, Any]]:
    generator = start(method, seed)
    prompts = weighted(*WEIGHTED[method]) if method in WEIGHTED else lab.load_prompts("train")
    before = " and ".join(START.get(method, []))
    run = lab.Run.open(f"rivals/{method}-{seed}", {**config.flat(), "policy": before}, resume=True)
    if "method" in METHODS[method]:
        yield from lab.distill(generator, prompts, config.distillation, config.train.sampler, run, seed)
    else:
        names = dict.fromkeys([*config.train.quality_weights, "speed", "detector"])
        rewards = lab.build_rewards(list(names), "cpu")
        yield from lab.train(generator, prompts, rewards, config.train, run)
    run.write_card(card(method, run.records(), before))


def card(method: str, table: pd.DataFrame, before: str) -> dict[str, Any]:
    return {
        "method": method + (f", from {before} of the same seed" if before else ""),
        "passes": f"{table.passes.sum():,}" + (", after those of its start" if before else ""),
        "minutes": f"{table.seconds.sum() / 60:.1f}",
        "iterations": len(table),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", default=list(METHODS), help=", ".join(METHODS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, help="of torch (default: all cores)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    for method in options.methods:
        if method not in METHODS:
            parser.error(f"unknown method {method!r}; expected some of {', '.join(METHODS)}")
    for seed in options.seeds:
        for method in options.methods:
            config = settings(method, seed)
            torch.set_float32_matmul_precision(config.matmul_precision)
            total = config.distillation.distill_iterations if "method" in METHODS[method] else config.train.iterations
            if not (outputs_root() / "rivals" / f"{method}-{seed}" / "policy.safetensors").is_file():
                for _ in tqdm(records(method, config, seed), total=total, desc=f"{method}, seed {seed}"):
                    pass


if __name__ == "__main__":
    main()
