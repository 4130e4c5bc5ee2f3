"""Samples behind a frontier: rows of the frame of `score_samples` in, their pictures drawn again out."""

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from speedrl_lab import plots
from speedrl_lab.contenders import Contender
from speedrl_lab.intervals import SET_METRICS
from speedrl_lab.sampler import sample

RANKS = ("worst", "best", "first")


def redraw(field: Mapping[str, Contender], rows: pd.DataFrame) -> Tensor:
    """The pictures (B, 3, H, W) of rows of `score_samples`, on the CPU: same policy, sampler, prompt, seed and sample.

    Raises ValueError for a model or a budget that the field has not.
    """
    pictures: list[Tensor | None] = [None] * len(rows)
    numbered = rows.reset_index(drop=True)
    for (model, budget, training, seed), part in numbered.groupby(["model", "budget", "training_seed", "seed"]):
        if model not in field or budget not in field[model].samplers:
            raise ValueError(f"{model!r} at budget {budget} is not among the models: {', '.join(field)}")
        contender = field[model]
        counts = part.groupby("prompt")["sample"].max() + 1  # a prompt's samples are numbered in their batch
        prompts = [prompt for prompt, count in counts.items() for _ in range(count)]
        starts = counts.cumsum() - counts
        generator = contender.trainings[training]
        drawn = generator.decode(sample(generator, prompts, contender.samplers[budget], seed=seed).tokens).cpu()
        for row in part.itertuples():
            pictures[row.Index] = drawn[starts[row.prompt] + row.sample]
    return torch.stack(pictures) if pictures else torch.zeros(0, 3, 1, 1)


def chosen(part: pd.DataFrame, judge: str, rank: str, count: int) -> pd.DataFrame:
    """The `worst`, `best` or `first` rows of a point by a judge of images; judges of sets rank by PSNR."""
    if rank not in RANKS:
        raise ValueError(f"rank={rank!r}: expected {', '.join(RANKS)}")
    if rank == "first":
        return part.head(count)
    judge = "psnr" if judge in SET_METRICS else judge
    known = part.dropna(subset=[judge])
    # Judges that say yes or no leave ties: the less crisp is the worse.
    return known.sort_values([judge, "psnr"], ascending=rank == "worst", kind="stable").head(count)


def best_models(table: pd.DataFrame, passes: float, count: int = 3, judge: str = "accuracy") -> list[tuple[str, int]]:
    """The models that score best within so many passes, each at its best budget there, from the table of `frontier`."""
    within = table[table.forwards <= passes + 1e-6]
    sign = -1 if judge in SET_METRICS else 1
    best = within.assign(rank=sign * within[judge]).sort_values("rank", ascending=False, kind="stable")
    return [(row.model, int(row.budget)) for row in best.drop_duplicates("model").head(count).itertuples()]


def failures(
    field: Mapping[str, Contender], samples: pd.DataFrame, points: Sequence[tuple[str, int]], count: int = 8
) -> Figure:
    """The samples of each point (model, budget) that are furthest from any valid scene, with PSNR; a row a point."""
    parts = [samples[(samples.model == model) & (samples.budget == budget)] for model, budget in points]
    rows = pd.concat([chosen(part, "psnr", "worst", count) for part in parts], ignore_index=True)
    titles = [f"{model}\n{part.forwards.mean():.3g} passes" for (model, _), part in zip(points, parts, strict=True)]
    scores = [f"{psnr:.1f} dB" for psnr in rows.psnr]
    columns = min(count, *(len(part) for part in parts))
    return plots.image_grid(redraw(field, rows), list(rows.prompt), scores, columns=columns, row_titles=titles)
