"""How the tool's own cost grows with steps, batch, grid and groups, on the embedded architecture with random weights.

    python benchmarks/scaling.py --output outputs/scaling

Writes points.csv and scaling.png, and prints laws fitted to the points by least squares of the relative error. Seconds
are processor seconds of one thread, the least of interleaved repeats, so that other work on the machine hardly shows;
on a GPU they are seconds of the clock. Peak memory is counted from shapes (`speedrl_lab.footprint`), weights left out.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from speedrl_lab import canvas, planner, plots, rl
from speedrl_lab.config import SamplerConfig, TrainConfig
from speedrl_lab.footprint import rollout_peak, shadow, update_peak
from speedrl_lab.generator import StepInfo
from speedrl_lab.generators import resolve_device
from speedrl_lab.generators.emoji import EmojiGenerator
from speedrl_lab.learner import Learner
from speedrl_lab.networks import MaskedTransformer, Tokenizer
from speedrl_lab.prompts import load_prompts
from speedrl_lab.sampler import sample
from speedrl_lab.scenes import MAX_WORDS

STEPS, BATCHES = (1, 2, 4, 8), (1, 4, 16, 64)
SIDES = (4, 6, 8, 12, 16, 24, 32)
IMAGES = 2  # of a grid's pass
UPDATES = ((1, 8), (1, 16), (2, 8), (2, 16), (4, 8), (4, 16), (8, 8), (8, 16))  # steps, samples
GROUPED = 16  # samples that are split into groups of every size
MIB = 2**20


@dataclass(frozen=True)
class Point:
    """One piece of work: what is varied, and how it is done once."""

    part: str  # sampling, grid, update or groups
    run: Callable[[], object]
    steps: int
    images: int
    side: int = 8
    groups: int = 1
    passes: int = 0
    peak: int = 0  # bytes


def embedded(side: int, device: torch.device) -> EmojiGenerator:
    """The embedded generator's networks on a grid of side x side tokens, with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, tokenizer = MaskedTransformer(grid=(side, side)), Tokenizer()
    return EmojiGenerator(network.eval().to(device), tokenizer.to(device))


def config_of(steps: int, samples: int, groups: int = 2) -> TrainConfig:
    sampler = SamplerConfig(steps=steps, order="halton", schedule="power")
    return TrainConfig(sampler=sampler, num_groups=groups, group_size=samples // groups)


def sampling_points(generator: EmojiGenerator, prompts: Sequence[str]) -> list[Point]:
    points = []
    for steps in STEPS:
        for images in BATCHES:
            config = config_of(steps, max(images, 2), groups=1)
            chosen = [prompts[index % len(prompts)] for index in range(images)]
            run = lambda chosen=chosen, sampler=config.sampler: sample(generator, chosen, sampler)  # noqa: E731
            peak = rollout_peak(shadow(generator), config)
            points.append(Point("sampling", run, steps, images, passes=steps * images, peak=peak))
    return points


def grid_points(device: torch.device) -> list[Point]:
    points = []
    for side in SIDES:
        generator = embedded(side, device)
        tokens = torch.full((IMAGES, side**2), generator.spec.mask_id, device=device)
        cond, step = generator.null(IMAGES), StepInfo(0, 1)
        run = torch.no_grad()(lambda g=generator, t=tokens, c=cond, s=step: g.logits(t, c, s))
        peak = rollout_peak(shadow(generator), config_of(1, IMAGES, groups=1))
        points.append(Point("grid", run, 1, IMAGES, side, passes=IMAGES, peak=peak))
    return points


def update_points(device: torch.device, prompts: Sequence[str]) -> list[Point]:
    """Updates of other steps and samples, and of the same samples in other groups."""
    sizes = [("update", steps, samples, 2) for steps, samples in UPDATES]
    sizes += [("groups", 4, GROUPED, groups) for groups in (1, 2, 4, 8)]
    points = []
    for part, steps, samples, groups in sizes:
        config, generator = config_of(steps, samples, groups), embedded(8, device)
        learner = Learner(generator, config)
        reward = {"clip": lambda images, prompts, trajectory: trajectory.tokens.float().mean(1)}
        drawn = rl.rollout(generator, prompts, reward, config, 0)
        advantages = rl.weigh(drawn, config, learner.weights)
        run = lambda learner=learner, drawn=drawn, given=advantages: learner.update(drawn, given)  # noqa: E731
        passes = planner.passes(config, generator.spec.num_tokens, generator.spec.codebook_size)["update"]
        peak = update_peak(shadow(generator), config)
        points.append(Point(part, run, steps, samples, groups=groups, passes=passes, peak=peak))
    return points


def seconds(point: Point, device: torch.device) -> float:
    cuda = device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    began = clock()
    point.run()
    if cuda:
        torch.cuda.synchronize(device)
    return clock() - began


def measure(points: Sequence[Point], repeats: int, device: torch.device) -> pd.DataFrame:
    """One row a point; `seconds` is the least of the repeats, which take turns."""
    turns = [[seconds(point, device) for point in points] for _ in range(repeats)]
    rows = [
        {"part": point.part, "steps": point.steps, "images": point.images, "tokens": point.side**2,
         "groups": point.groups, "passes": point.passes, "seconds": least, "peak_mib": point.peak / MIB}
        for point, least in zip(points, np.min(turns, axis=0), strict=True)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def fit(columns: Sequence[np.ndarray], values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients of `columns` with the least relative error, and fitted values."""
    matrix = np.stack([np.broadcast_to(column, values.shape) for column in columns], 1).astype(float)
    weights = np.linalg.lstsq(matrix / values[:, None], np.ones(len(values)), rcond=None)[0]
    return weights, matrix @ weights


def flops(side: int) -> int:
    """Of one pass of one image, from torch's counter."""
    generator = embedded(side, torch.device("cpu"))
    tokens = torch.full((1, side**2), generator.spec.mask_id)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        generator.logits(tokens, generator.null(1), StepInfo(0, 1))
    return counter.get_total_flops()


def fitted(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The table with a column `fitted`, and the laws in words."""
    table = table.assign(fitted=np.nan)
    laws = []
    own = table[table.part == "sampling"]
    (call, step, each), values = fit([np.ones(1), own.steps, own.passes], own.seconds.to_numpy())
    table.loc[own.index, "fitted"] = values
    laws.append(
        f"sampling: {1e3 * call:.1f} ms + {1e3 * step:.1f} ms a step + {1e3 * each:.2f} ms a pass{_errors(own, values)}"
    )
    own = table[table.part == "update"]
    (call, each), values = fit([np.ones(1), own.passes], own.seconds.to_numpy())
    table.loc[own.index, "fitted"] = values
    laws.append(
        f"update: {1e3 * call:.0f} ms + {1e3 * each:.2f} ms a pass, backward passes counted twice{_errors(own, values)}"
    )
    own = table[table.part == "grid"]
    length = own.tokens + MAX_WORDS
    (call, linear, square), values = fit([np.ones(1), length, length**2], (own.seconds / own.images).to_numpy())
    table.loc[own.index, "fitted"] = values * own.images
    counted = np.array([flops(round(tokens**0.5)) for tokens in own.tokens])
    (counted_linear, counted_square), _ = fit([length, length**2], counted)
    shares = [
        f"{tokens} tokens {square * n / (call / n + linear + square * n):.0%} (of the operations "
        f"{counted_square * n / (counted_linear + counted_square * n):.0%})"
        for tokens, n in zip(own.tokens, length, strict=True) if tokens in (64, 256, 1024)
    ]  # fmt: skip
    laws.append(
        f"grid: {1e3 * call:.1f} ms + {1e6 * linear:.1f} us a position + {1e9 * square:.1f} ns a pair of positions, "
        f"{MAX_WORDS} words among them{_errors(own, values * own.images)}; the pairs' share: {', '.join(shares)}"
    )
    slopes = np.diff(np.log(own.seconds)) / np.diff(np.log(own.tokens))
    laws.append(f"grid: seconds grow as tokens to the power {', '.join(f'{slope:.2f}' for slope in slopes)}, from "
                f"{' to '.join(str(tokens) for tokens in own.tokens)}")  # fmt: skip
    rates = counted / (own.seconds / own.images) / 1e9
    laws.append(f"grid: {', '.join(f'{rate:.0f}' for rate in rates)} GFLOP/s there")
    own = table[table.part == "groups"]
    laws.append(f"groups: an update of {GROUPED} samples in {', '.join(map(str, own.groups))} groups takes "
                f"{', '.join(f'{value:.2f}' for value in own.seconds)} s")  # fmt: skip
    return table, laws


def _errors(own: pd.DataFrame, values: np.ndarray) -> str:
    errors = np.abs(values / own.seconds - 1)
    return f" (relative error: median {errors.median():.0%}, most {errors.max():.0%})"


def draw(table: pd.DataFrame, path: Path, clock: str) -> None:
    """Three panels: points and their laws."""
    figure, (left, middle, right) = canvas.panels(3, 3, 3.4, 2.9)
    colors = dict(zip(sorted(table.steps.unique()), canvas.COLORS, strict=False))
    for axes, part, varied in ((left, "sampling", "images"), (right, "update", "passes")):
        for steps, line in table[table.part == part].sort_values(varied).groupby("steps"):
            axes.plot(line[varied], line.seconds, "o", color=colors[steps], markersize=4)
            axes.plot(line[varied], line.fitted, color=colors[steps], label=f"{steps}")
    left.legend(title="steps", fontsize=7, title_fontsize=7, frameon=False, labelcolor=canvas.INK)
    left.get_legend().get_title().set_color(canvas.INK)
    own = table[table.part == "grid"]
    middle.plot(own.tokens, own.seconds / own.images, "o", color=canvas.COLORS[0], markersize=4)
    middle.plot(own.tokens, own.fitted / own.images, color=canvas.COLORS[0])
    canvas.label(left, "a sampling call", "images", f"seconds ({clock})")
    canvas.label(middle, "a pass of one image", "tokens of the grid", f"seconds ({clock})")
    canvas.label(right, "an RL update", "passes, backward ones twice", f"seconds ({clock})")
    for axes in (left, middle, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    figure.tight_layout()
    path.write_bytes(plots.png(figure))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/scaling"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device, prompts = resolve_device(options.device), load_prompts()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    generator = embedded(8, device)
    points = sampling_points(generator, prompts) + grid_points(device) + update_points(device, prompts)
    table, laws = fitted(measure(points, options.repeats, device))
    table.round(6).to_csv(options.output / "points.csv", index=False)
    draw(table, options.output / "scaling.png", "clock" if device.type == "cuda" else "processor, one thread")
    print(table.to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    print("\n".join(["", *laws, f"{options.output / 'points.csv'}, {options.output / 'scaling.png'}"]))


if __name__ == "__main__":
    main()
