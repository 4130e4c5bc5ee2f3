"""Draw the README's pictures from a run of notebook 05_frontier.

    python docs/build_figures.py outputs/results
"""

import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

import speedrl_lab as lab
from speedrl_lab.scenes import DATA

PROMPTS = [
    "a pig and a ball",
    "a house on a black background",
    "a rocket left of an apple on a white background",
    "a cake and a heart",
    "a frog above a pig on a white background",
    "a ball above a house",
    "a tree and a rocket on a purple background",
    "an apple above a heart",
]


def main(results: Path) -> None:
    folder = Path(__file__).parent
    table = pd.read_csv(results / "frontier.csv")
    (folder / "frontier.png").write_bytes(lab.plots.png(lab.plots.frontier_print(table)))
    base = lab.load_generator(device="cpu")
    tuned = lab.load_generator(device="cpu", policy=DATA / "weights" / "speed_rl.safetensors")
    searched = lab.load_base_samplers_by_passes()
    usual = lab.SamplerConfig(steps=16, order="confidence", guidance_scale=3.0)
    revised = lab.SamplerConfig(revise=True, temperature=0.8, start_noise=0.05)
    own = replace(revised, steps=8, schedule="paced", greedy_pace=True)
    rows = {
        "base\n2 passes": (base, searched[2]),
        "Speed-RL\n2 passes": (tuned, replace(revised, steps=2)),
        "base\n4 passes": (base, searched[4]),
        "Speed-RL\n4 passes": (tuned, replace(revised, steps=4)),
        "Speed-RL\nown pace": (tuned, own),
        "base\n32 passes": (base, usual),
    }
    pictures = [model.decode(lab.sample(model, PROMPTS, sampler, seed=1).tokens) for model, sampler in rows.values()]
    figure = lab.plots.image_grid(torch.cat(pictures), row_titles=list(rows), column_titles=PROMPTS)
    (folder / "samples.png").write_bytes(lab.plots.png(figure))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
