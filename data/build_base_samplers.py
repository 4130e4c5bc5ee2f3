"""Search the base generator's best sampler at each cost: the fair rival of every tuned policy.

    python data/build_base_samplers.py [PROMPTS]

Tries orders, guidance, schedules and temperatures on validation prompts (default 48), two samples each.
Writes data/base_samplers.json, the best for each number of steps, and data/base_samplers_by_passes.json, the
best for each number of forward passes, where guided samplers take half the steps. About 25 minutes on one CPU
core.
"""

import sys
from dataclasses import replace

from tqdm import tqdm

from speedrl_lab import load_generator, load_prompts
from speedrl_lab.contenders import KINDS, UNGUIDED
from speedrl_lab.search import best_samplers, save_base_samplers, with_passes, with_steps

STEPS = (1, 2, 3, 4, 6, 8, 12, 16)
PASSES = (*STEPS, 5, 24, 32)
CANDIDATES = [
    *UNGUIDED,
    *(replace(kind, guidance_scale=scale, temperature=temperature)
      for kind in KINDS for scale in (1.5, 2.0, 3.0) for temperature in (1.0, 0.7)),
]  # fmt: skip
"""What tuned policies may be sampled with, and guidance of three scales."""


def main(num_prompts: int) -> None:
    pools = {("steps", steps): with_steps(CANDIDATES, steps) for steps in STEPS}
    pools |= {("passes", passes): with_passes(CANDIDATES, passes) for passes in PASSES}
    best = best_samplers(load_generator(), load_prompts("validation", num_prompts), pools)
    for (cost, budget), sampler in best.items():
        tqdm.write(f"{budget:3d} {cost}: {sampler}")
    by_steps, by_passes = (
        {budget: sampler for (cost, budget), sampler in best.items() if cost == wanted}
        for wanted in ("steps", "passes")
    )
    save_base_samplers(by_steps, by_passes)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 48)
