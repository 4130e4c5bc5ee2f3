"""Print how the committed Speed-RL policy does with a hot first step, which keeps samples of a prompt apart.

    python docs/keep_diversity.py outputs/results

Settings were chosen on validation prompts; differences are paired with the base in a run of notebook 05_frontier.
"""

import sys
from pathlib import Path

import pandas as pd

import speedrl_lab as lab
from speedrl_lab.evaluate import score_samples
from speedrl_lab.intervals import frontier, paired_difference
from speedrl_lab.scenes import DATA

FIRST = {4: 3.0, 5: 2.5, 8: 3.0}  # steps -> temperature of the first, in units of that of the others
METRICS = ("accuracy", "accuracy2", "clip", "psnr", "kid2", "diversity")
NAME = "speed-rl, hot first step"


def main(results: Path) -> None:
    tuned = lab.load_generator("emoji", device="cpu", policy=DATA / "weights" / "speed_rl.safetensors")
    samplers = {
        steps: lab.SamplerConfig(
            steps=steps, schedule="cosine", revise=True, temperature=0.8, first_temperature=first
        )
        for steps, first in FIRST.items()
    }  # fmt: skip
    measured = score_samples({NAME: tuned}, lab.load_prompts("test", 64), list(FIRST), 3, {NAME: samplers})
    columns = ["budget", *(f"{name}{end}" for name in METRICS for end in ("", "_low", "_high"))]
    print(frontier(measured)[columns].round(3).to_string(index=False))
    together = pd.concat([pd.read_csv(results / "samples.csv"), measured], ignore_index=True)
    for steps in FIRST:
        for rival in (("base, usual", 16), ("base", 16)):
            for metric in ("accuracy", "accuracy2", "clip", "psnr", "diversity"):
                mean, low, high = paired_difference(together, (NAME, steps), rival, metric)
                print(f"{steps} passes minus {rival[0]} at {rival[1]}, {metric}: {mean:+.3f} [{low:+.3f}, {high:+.3f}]")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
