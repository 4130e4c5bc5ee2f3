"""Print what models make of that which captions leave open, beside real scenes: the table "Layouts" of results.md.

    python docs/build_layouts.py outputs/results

Policies and samplers are those of a run of notebook 05_frontier. All test prompts of one object, and of two whose
places the caption does not say; four samples each. Under two minutes of one core.
"""

import argparse
import json
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from speedrl_lab import SamplerConfig, compositor, contenders, load_generator, load_prompts, scenes
from speedrl_lab.evaluate import draw_pictures
from speedrl_lab.judges import NearestScene, nearest_scene

SHOWN = {"base": (4, 16), "base, usual": (16,), "dimo": (4,), "speed-rl": (4, 8), "speed-rl, own pace": (4,)}
"""Models and the budgets they are shown at."""
SAMPLES, FAR = 4, compositor.IMAGE_SIZE - compositor.SMALL
PLACES = ("first above", "second above", "first left", "second left", "corner to corner")


def arrangement(nearest: NearestScene, row: int) -> str:
    """How the two sprites of a picture lie; "corner to corner" where both ways of saying it are true."""
    down, right = (int(place[row, 1] - place[row, 0]) for place in (nearest.tops, nearest.lefts))
    if abs(down) == abs(right):
        return "corner to corner"
    if abs(down) == FAR:
        return "first above" if down > 0 else "second above"
    return "first left" if right > 0 else "second left"


def shares(images: Tensor, prompts: list[str]) -> list[float]:
    """The share of single objects that are large, then those of PLACES among the pairs."""
    nearest = nearest_scene(images, prompts)
    single = [scenes.parse_caption(prompt).kind == "one" for prompt in prompts]
    large = [int(size) == compositor.LARGE for size, one in zip(nearest.sizes, single, strict=True) if one]
    found = pd.Series([arrangement(nearest, row) for row, one in enumerate(single) if not one])
    return [sum(large) / len(large), *((found == place).mean() for place in PLACES)]


def main(results: Path) -> None:
    settings = pd.read_csv(results / "samplers.csv")
    files = contenders.read_policies(json.loads((results / "config.json").read_text())["policies"])
    prompts = [text for text in load_prompts("test") if scenes.parse_caption(text).kind in ("one", "and")]
    repeated = [prompt for prompt in prompts for _ in range(SAMPLES)]
    print("| | passes | large, if one |", " | ".join(PLACES), "|")
    print("|" + "---|" * (3 + len(PLACES)))
    real = scenes.real_pictures(repeated, torch.Generator().manual_seed(0))
    print_row("real scenes", "", shares(real, repeated))
    for model, budgets in SHOWN.items():
        policy = files.get(model.split(",")[0])
        generator = load_generator("emoji", device="cpu", policy=policy[0] if policy else None)
        for budget in budgets:
            row = settings[(settings.model == model) & (settings.budget == budget)].iloc[0]
            sampler = SamplerConfig(**row.drop(["model", "budget", "trainings"]).to_dict())
            images, costs = draw_pictures(generator, repeated, sampler, seed=0)
            print_row(model, f"{costs['forwards'].mean():.1f}".removesuffix(".0"), shares(images, repeated))


def print_row(model: str, passes: str, values: list[float]) -> None:
    print("|", " | ".join([model, passes, *(f"{value:.2f}" for value in values)]), "|", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    main(**vars(parser.parse_args()))
