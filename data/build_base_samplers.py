"""Search the base generator's best sampler for each number of steps: the fair rival of every tuned policy.

    python data/build_base_samplers.py [PROMPTS]

Tries orders, guidance, schedules and temperatures on validation prompts (default 32), two samples each,
and writes data/base_samplers.json. About 5 minutes on two CPU cores.
"""

import sys

from tqdm import tqdm

from speedrl_lab import SamplerConfig, load_generator, load_prompts
from speedrl_lab.evaluate import save_base_samplers, search_samplers

BUDGETS = (1, 2, 3, 4, 6, 8, 12, 16)
CANDIDATES = [
    SamplerConfig(order=order, schedule=schedule, guidance_scale=scale, temperature=temperature, **more)
    for scale in (1.0, 2.0, 3.0)
    for order, schedule, temperature, more in (
        ("confidence", "cosine", 1.0, {"choice_temperature": 1.0}),
        ("confidence", "cosine", 1.0, {"choice_temperature": 4.0}),
        ("confidence", "cosine", 0.8, {"choice_temperature": 1.0}),
        ("halton", "cosine", 1.0, {}),
        ("halton", "power", 1.0, {"power": 3.0}),
    )
]


def main(num_prompts: int) -> None:
    best = search_samplers(load_generator(), load_prompts("validation", num_prompts), BUDGETS, CANDIDATES)
    save_base_samplers(best)
    for budget, sampler in best.items():
        tqdm.write(f"{budget:3d} steps: {sampler}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 32)
