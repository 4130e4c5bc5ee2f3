"""Tables with intervals, from frames that have one row an image.

Everything here is a two-level bootstrap. Prompts are drawn with replacement, all samples and sampling
seeds of a prompt together. Where a model was trained several times (`training_seed`), its S trainings are
drawn too, S - 1 of S, which makes the variance of the mean unbiased (with S of S three trainings would look
a third less different than they are). With one training an interval says nothing of another one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

METRICS = (
    "accuracy", "color", "relation", "accuracy2", "color2", "relation2", "clip", "psnr", "diversity",
    "style_entropy", "size_entropy", "position_entropy", "background_entropy",
)  # fmt: skip
"""Judges of single images or of the samples of a prompt; `evaluate` says what each sees."""
SET_METRICS = ("kid", "fd", "kid2", "fd2", "kid_surface", "fd_surface")
"""Judges of whole sets; less is better."""
COSTS = ("steps", "forwards", "seconds_loop", "seconds_total")


@dataclass
class Resamples:
    """Draws of trainings and prompts that several points share, so that their differences are paired.

    Points of one model share the draws of its trainings; all points share those of the prompts.
    """

    prompts: list[str]
    draws: int
    rng: np.random.Generator

    def __post_init__(self) -> None:
        count = len(self.prompts)
        self._of_prompts = self.rng.multinomial(count, np.full(count, 1 / count), self.draws)  # (D, P)
        self._of_models: dict[str, np.ndarray] = {}

    def __call__(self, part: pd.DataFrame, metric: str) -> tuple[float, np.ndarray]:
        """Mean of a metric over one model and budget, and its resampled means (draws,).

        Missing values (an entropy of what a caption does not leave open) are left out of every mean.
        """
        values = _table(part, metric).reindex(columns=self.prompts).to_numpy()  # (S, P)
        trainings = self._trainings(part.model.iloc[0], len(values))  # (D, S)
        known = ~np.isnan(values)
        values = np.where(known, values, 0.0)
        totals = ((trainings @ values) * self._of_prompts).sum(1)
        counts = ((trainings @ known) * self._of_prompts).sum(1)
        missing = np.full(self.draws, np.nan)
        drawn = np.divide(totals, counts, out=missing, where=counts > 0)
        return (values.sum() / known.sum() if known.any() else np.nan), drawn

    def _trainings(self, model: str, count: int) -> np.ndarray:
        if model not in self._of_models:
            weights = self.rng.multinomial(max(1, count - 1), np.full(count, 1 / count), self.draws)
            self._of_models[model] = weights
        known = self._of_models[model]
        if known.shape[1] != count:
            raise ValueError(f"{model!r} has {count} trainings at one budget and {known.shape[1]} at another")
        return known


def _table(part: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Mean of each training (row) on each prompt (column)."""
    if "training_seed" not in part:
        part = part.assign(training_seed=0)
    return part.groupby(["training_seed", "prompt"])[metric].mean().unstack("prompt")


def _bounds(drawn: np.ndarray) -> tuple[float, float]:
    """The central 95% of the draws; draws without a value are left out, infinite ones count."""
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        return np.nan, np.nan
    low, high = np.quantile(drawn, [0.025, 0.975], method="nearest" if np.isinf(drawn).any() else "linear")
    return float(low), float(high)


def _point(frame: pd.DataFrame, model: str, budget: int) -> pd.DataFrame:
    part = frame[(frame.model == model) & (frame.budget == budget)]
    if part.empty:
        known = frame[["model", "budget"]].drop_duplicates().itertuples(index=False, name=None)
        raise ValueError(f"{model!r} at budget {budget} is not in the frame; there are: {sorted(known)}")
    return part


def frontier(frame: pd.DataFrame, draws: int = 1000) -> pd.DataFrame:
    """One row a model and budget with 95% intervals, from the frame of `score_samples`.

    Intervals are percentiles of the two-level bootstrap over trainings and prompts; for judges of a set
    two standard errors over the trainings, or over the sampling seeds where there is one training.
    Metrics that the frame lacks are left out.
    """
    rng = np.random.default_rng(0)
    metrics, set_metrics = ([name for name in names if name in frame] for names in (METRICS, SET_METRICS))
    rows = []
    for (model, budget), part in frame.groupby(["model", "budget"], sort=False):
        resampled = Resamples(sorted(part.prompt.unique()), draws, rng)
        row = {"model": model, "budget": budget, **part[list(COSTS)].mean().to_dict()}
        for metric in metrics:
            mean, drawn = resampled(part, metric)
            row[metric] = mean
            row[f"{metric}_low"], row[f"{metric}_high"] = _bounds(drawn)
        several = "training_seed" in part and part.training_seed.nunique() > 1
        sets = part.groupby("training_seed" if several else "seed")[set_metrics].mean()
        for metric in set_metrics:
            center, error = sets[metric].mean(), 2 * sets[metric].std() / len(sets) ** 0.5  # NaN for one set
            row |= {metric: center, f"{metric}_low": center - error, f"{metric}_high": center + error}
        rows.append(row)
    return pd.DataFrame(rows)


def paired_difference(
    frame: pd.DataFrame, left: tuple[str, int], right: tuple[str, int], metric: str, draws: int = 1000
) -> tuple[float, float, float]:
    """Mean of (left - right) for two (model, budget) on the prompts they share, with its 95% interval."""
    parts = [frame[(frame.model == model) & (frame.budget == budget)] for model, budget in (left, right)]
    shared = sorted(set(parts[0].prompt) & set(parts[1].prompt))
    if not shared:
        raise ValueError(f"{left} and {right} share no prompts in this frame")
    resampled = Resamples(shared, draws, np.random.default_rng(0))
    (mean, drawn), (other_mean, other_drawn) = (resampled(part[part.prompt.isin(shared)], metric) for part in parts)
    low, high = _bounds(drawn - other_drawn)
    return float(mean - other_mean), low, high


def passes_at_quality(table: pd.DataFrame, metric: str = "accuracy", baseline: str = "base") -> pd.DataFrame:
    """For each budget of the baseline, the fewest passes with which another model is not worse.

    From the table of `frontier`. Not worse: the other's mean is at least the baseline's mean (at most,
    for judges of a set). `passes` and `ratio` are NaN where no budget gets there. Only measured budgets
    count and there is no interval: see `passes_to_reach`.
    """
    sign = -1 if metric in SET_METRICS else 1
    rows = []
    base = table[table.model == baseline]
    if base.empty:
        raise ValueError(f"baseline {baseline!r} is not in the table; models: {sorted(table.model.unique())}")
    for _, point in base.iterrows():
        for model, part in table[table.model != baseline].groupby("model", sort=False):
            enough = part[sign * part[metric] >= sign * point[metric]]
            passes = enough.forwards.min() if len(enough) else np.nan
            rows.append(
                {
                    "baseline_budget": point.budget,
                    "baseline_passes": point.forwards,
                    metric: point[metric],
                    "model": model,
                    "passes": passes,
                    "ratio": point.forwards / passes,
                }
            )
    return pd.DataFrame(rows)


def first_crossing(passes: np.ndarray, quality: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The fewest passes (D,) at which curves (D, K) of quality reach what is wanted (D,).

    Linear between neighbouring points; a curve that is there at its cheapest point gives that point,
    because nothing is known below it; one that never gets there gives inf.
    """
    order = passes.argsort(1, kind="stable")
    passes, quality = np.take_along_axis(passes, order, 1), np.take_along_axis(quality, order, 1)
    enough = quality >= wanted[:, None]  # (D, K)
    rows, after = np.arange(len(wanted)), enough.argmax(1)  # the first point that is good enough
    before = np.maximum(after - 1, 0)
    rise = quality[rows, after] - quality[rows, before]
    share = np.divide(wanted - quality[rows, before], rise, out=np.ones(len(wanted)), where=rise > 0)
    between = passes[rows, before] + share * (passes[rows, after] - passes[rows, before])
    found = np.where(after > 0, between, passes[:, 0])
    return np.where(enough.any(1), found, np.inf)


def passes_to_reach(
    frame: pd.DataFrame,
    baseline: str = "base",
    budgets: Sequence[int] = (8, 16, 32),
    metric: str = "accuracy",
    draws: int = 1000,
) -> pd.DataFrame:
    """Forward passes that each model needs for the quality of the baseline at some of its budgets.

    From the frame of `score_samples`. Between a model's budgets its quality is taken as linear in the
    mean passes; below its cheapest budget nothing is claimed: a model that is good enough there gets that
    cost. `passes` is inf where no budget gets there. The intervals (95%) come from one bootstrap in which
    all models see the same prompts, and each its own draws of trainings; `reached` is the share of draws
    that get there. `ratio` is the baseline's own need (its cheapest point of that quality, interpolated
    too) over the model's; 0 where the model never gets there.
    Raises ValueError for a metric of whole sets, an unknown baseline or budget, or unshared prompts.
    """
    if metric not in METRICS or metric not in frame:
        raise ValueError(f"metric={metric!r}: expected a judge of single images: {', '.join(METRICS)}")
    targets = {budget: _point(frame, baseline, budget) for budget in budgets}
    prompts = sorted(set(frame.prompt))
    resampled = Resamples(prompts, draws, np.random.default_rng(0))
    curves = {}
    for model, rows in frame.groupby("model", sort=False):
        points = [part for _, part in rows.groupby("budget")]
        if any(part.prompt.nunique() < len(prompts) for part in points):
            raise ValueError(f"{model!r} has not all {len(prompts)} prompts at every budget; they must be the same")
        curves[model] = [
            np.column_stack([np.append(*resampled(part, name)) for part in points]) for name in ("forwards", metric)
        ]  # both (1 + draws, budgets); row 0 holds the means themselves
    table = []
    for budget, target in targets.items():
        wanted = np.append(*resampled(target, metric))  # (1 + draws,)
        own = first_crossing(*curves[baseline], wanted)
        for model, curve in curves.items():
            passes = first_crossing(*curve, wanted)
            row = {"baseline_budget": budget, metric: wanted[0], "model": model}
            for name, values in (("passes", passes), ("ratio", own / passes)):
                row[name] = values[0]
                row[f"{name}_low"], row[f"{name}_high"] = _bounds(values[1:])
            table.append(row | {"reached": float(np.isfinite(passes[1:]).mean())})
    return pd.DataFrame(table)
