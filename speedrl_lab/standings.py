"""Who is ahead: a frontier in, tables and plain sentences out."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from speedrl_lab.frontier_plots import METRICS as LABELS
from speedrl_lab.intervals import METRICS, SET_METRICS, paired_difference, passes_at_quality, passes_to_reach

JUDGES = ("accuracy", "accuracy2", "relation", "relation2", "color", "color2", "psnr", "clip", "diversity", "kid2")
"""What a comparison is about, where nothing else is asked for."""
TARGETS = (8, 16, 32)
"""Passes of the base whose quality others are asked for."""
TOLERANCE = 1e-9
"""Differences up to this are none."""
SLACK = 1e-6
"""Of mean passes, which are sums of floats."""


def standings(table: pd.DataFrame, ours: Sequence[str], judges: Sequence[str] = JUDGES) -> pd.DataFrame:
    """The best of ours and the best rival by each judge at each number of passes, from the table of `frontier`.

    `ours` are models; all others are rivals. Points are compared at the whole numbers of passes that are in the
    table, each at the smallest that covers it: one at its own pace with 3.3 passes at 4. Columns: judge, passes,
    and model, value, low, high of `our_` and `rival_`; `ahead` (the rival's lead in the judge's units, below 0
    where it is behind) and `overlap` (whether the intervals do; None where one is unknown). Numbers of passes
    without ours or without a rival are left out. Raises ValueError for unknown models, or judges that the table lacks.
    """
    if unknown := [name for name in ours if name not in set(table.model)] or (["no model"] if not ours else []):
        raise ValueError(f"ours: {unknown[0]!r} is not in the table; models: {sorted(table.model.unique())}")
    if missing := [judge for judge in judges if judge not in table]:
        raise ValueError(f"the table has no judge {missing[0]!r}")
    mine = table.model.isin(ours)
    allowed = whole_passes(table)
    place = np.searchsorted(allowed, table.forwards - SLACK)
    rows = []
    for judge in judges:
        sign = -1 if judge in SET_METRICS else 1
        for index, passes in enumerate(allowed):
            here = table[place == index].dropna(subset=[judge])
            groups = [here[mine[here.index]], here[~mine[here.index]]]
            if any(group.empty for group in groups):
                continue
            our, rival = (group.loc[(sign * group[judge]).idxmax()] for group in groups)
            row = {"judge": judge, "passes": int(passes)}
            for name, point in (("our", our), ("rival", rival)):
                row |= {f"{name}_model": point.model, f"{name}_value": point[judge]}
                row |= {f"{name}_{end}": point[f"{judge}_{end}"] for end in ("low", "high")}
            row["ahead"] = sign * (rival[judge] - our[judge])
            ends = [point[f"{judge}_{end}"] for point in (our, rival) for end in ("low", "high")]
            overlap = ends[0] <= ends[3] and ends[2] <= ends[1]
            row["overlap"] = None if np.isnan(ends).any() else bool(overlap)
            rows.append(row)
    return pd.DataFrame(rows)


def best_keeping(table: pd.DataFrame, least_diversity: float, judge: str = "accuracy2") -> pd.DataFrame:
    """Points of at least so much diversity that are better than all that cost no more, from `frontier`'s table.

    In order of cost; what is dearer than another point and not better is left out. Columns: model, forwards, the judge
    with its low and high, and diversity.
    """
    sign = -1 if judge in SET_METRICS else 1
    kept = table.assign(worth=sign * table[judge])[table.diversity >= least_diversity]
    kept = kept.sort_values(["forwards", "worth"], ascending=[True, False], kind="stable")
    kept = kept[kept.worth > kept.worth.cummax().shift(fill_value=-np.inf)]
    columns = ["model", "forwards", judge, f"{judge}_low", f"{judge}_high", "diversity"]
    return kept[columns].reset_index(drop=True)


def whole_passes(table: pd.DataFrame) -> np.ndarray:
    """The whole numbers of passes at which something was measured, ascending; the largest covers all points."""
    rounded = table.forwards.round()
    whole = rounded[(table.forwards - rounded).abs() <= SLACK]
    return np.unique(np.append(whole, np.ceil(table.forwards.max() - SLACK)))


def verdicts(table: pd.DataFrame, ours: Sequence[str], judges: Sequence[str] = JUDGES) -> list[str]:
    """Plain sentences on where a rival wins: first how often, then one for every such judge and budget.

    And one for every judge by which no rival wins. From the table of `frontier`; see `standings`.
    """
    found = standings(table, ours, judges)
    if found.empty:
        return ["There is no rival at any number of passes."]
    wins = found[found.ahead > TOLERANCE]
    clear = int(wins.overlap.isin([False]).sum())  # unknown is no
    sentences = [
        f"A rival wins {len(wins)} of {len(found)} comparisons with {' and '.join(ours)} (judge and number of passes), "
        f"{clear} of them with 95% intervals that do not overlap."
    ]
    for judge, rows in found.groupby("judge", sort=False):
        lost = rows[rows.ahead > TOLERANCE]
        sentences += [_sentence(row) for row in lost.to_dict("records")]
        if lost.empty:
            passes = ", ".join(str(count) for count in rows.passes)
            sentences.append(f"{_label(judge)}: no rival wins at {passes} {_passes(rows.passes.iloc[-1])}.")
    return sentences


def _sentence(row: dict[str, object]) -> str:
    overlap = {None: "one has no interval", True: "the intervals overlap", False: "the intervals do not overlap"}
    shown = {}
    for name in ("our", "rival"):
        shown[name] = f"{row[f'{name}_model']} {row[f'{name}_value']:.3g}"
        if not np.isnan(row[f"{name}_low"]):
            shown[name] += f" [{row[f'{name}_low']:.3g}, {row[f'{name}_high']:.3g}]"
    return (
        f"{_label(row['judge'])}, {row['passes']} {_passes(row['passes'])}: {row['rival_model']} wins by "
        f"{row['ahead']:.3g} ({shown['rival']} against {shown['our']}); {overlap[row['overlap']]}."
    )


def _label(judge: str) -> str:
    text = LABELS[judge].split(" (")[0]
    return text[0].upper() + text[1:]


def _passes(count: int) -> str:
    return "pass" if count == 1 else "passes"


def equal_quality(
    samples: pd.DataFrame,
    table: pd.DataFrame,
    judge: str = "accuracy",
    x: str = "forwards",
    models: Sequence[str] | None = None,
    baseline: str = "base",
    targets: Sequence[int] = TARGETS,
) -> pd.DataFrame:
    """What each model needs for the quality of the baseline at some of its budgets, with 95% intervals.

    From the frame of `score_samples` and its `frontier`. `x` is the cost that counts: forwards, seconds_loop or
    seconds_total. Targets that the baseline was not measured at are left out; if that leaves none, its
    largest budget is the target. One row a target and model: `target`, `quality`, `model`, `cost` (inf: never reached),
    `ratio` (the baseline's own need over the cost) and `_low`, `_high` of both; judges of whole sets have no
    intervals. See `passes_to_reach` and `passes_at_quality`.
    """
    measured = sorted(samples[samples.model == baseline].budget.unique())
    if not measured:
        raise ValueError(f"baseline {baseline!r} is not in the frame; models: {sorted(samples.model.unique())}")
    wanted = [int(budget) for budget in targets if budget in measured] or [int(measured[-1])]
    shown = set(samples.model.unique()) if models is None else {*models, baseline}
    if judge in METRICS:
        frame = samples[samples.model.isin(shown)]
        found = passes_to_reach(frame.assign(forwards=frame[x]), baseline, wanted, judge)
        ends = [f"{name}_{end}" for name in ("passes", "ratio") for end in ("low", "high")]
    else:
        part = table[table.model.isin(shown)]
        found = passes_at_quality(part.assign(forwards=part[x]), judge, baseline)
        found = found[found.baseline_budget.isin(wanted)].fillna({"passes": np.inf, "ratio": 0.0})
        ends = []
    found = found[found.model != baseline].rename(columns={"baseline_budget": "target", judge: "quality"})
    columns = ["target", "quality", "model", "passes", "ratio", *ends]
    found = found.reindex(columns=columns).rename(columns=lambda name: name.replace("passes", "cost"))
    return found.reset_index(drop=True)


def readable(equal: pd.DataFrame, x: str = "forwards", baseline: str = "base") -> pd.DataFrame:
    """The table of `equal_quality` for people: a row a model, a column a target, cost and how many times fewer."""
    unit, less, more = ("passes", "fewer", "more") if x == "forwards" else ("s", "faster", "slower")

    def cell(row: pd.Series) -> str:
        if np.isinf(row.cost):
            return "never"
        between = f" [{_number(row.cost_low)}, {_number(row.cost_high)}]" if "cost_low" in row else ""
        times = f"{row.ratio:.2g}x {less}" if row.ratio >= 1 else f"{1 / row.ratio:.2g}x {more}"
        return f"{_number(row.cost)}{between} {unit}, {times}"

    if equal.empty:
        return pd.DataFrame({"model": []})
    heads = {row.target: f"{baseline} at {row.target} passes ({row.quality:.3g})" for row in equal.itertuples()}
    cells = equal.assign(text=equal.apply(cell, axis=1)).pivot(index="model", columns="target", values="text")
    order = list(dict.fromkeys(equal.model))
    return cells.loc[order].rename(columns=heads).rename_axis(columns=None).reset_index()


def _number(value: float) -> str:
    return "never" if np.isinf(value) else f"{value:.3g}"


def differences(
    samples: pd.DataFrame, ours: str, rivals: Sequence[str], judges: Sequence[str] = ("accuracy", "psnr")
) -> pd.DataFrame:
    """Ours minus each rival on the same prompts at each of our numbers of passes, with 95% intervals.

    A rival at its own pace stands at the smallest of our numbers that covers its passes; of several there, the
    one with most passes. Columns: judge, passes (ours), rival, difference, low, high. Narrower than two bands
    side by side, because prompts differ more than models do. Judges are those of single images.
    """
    costs = samples.groupby(["model", "budget"], sort=False).forwards.mean()
    allowed = costs[ours].sort_values()
    rows = []
    for judge in judges:
        for rival in rivals:
            theirs = costs[rival].sort_values()  # the last of several at one place is the one with most passes
            place = np.searchsorted(allowed, theirs - SLACK)
            at = {int(index): int(budget) for index, budget in zip(place, theirs.index, strict=True)}
            for index, budget in sorted(at.items()):
                if index == len(allowed):
                    continue
                found = paired_difference(samples, (ours, int(allowed.index[index])), (rival, budget), judge)
                row = {"judge": judge, "passes": float(f"{allowed.iloc[index]:.3g}"), "rival": rival}
                rows.append(row | dict(zip(("difference", "low", "high"), found, strict=True)))
    return pd.DataFrame(rows, columns=["judge", "passes", "rival", "difference", "low", "high"])


def differences_table(found: pd.DataFrame) -> pd.DataFrame:
    """The frame of `differences` for people: a row a judge and budget, a column a rival."""
    if found.empty:
        return pd.DataFrame({"judge": [], "passes": []})
    if not (found.passes % 1).any():
        found = found.astype({"passes": int})
    text = [f"{row.difference:+.3g} [{row.low:+.3g}, {row.high:+.3g}]" for row in found.itertuples()]
    order, judges = list(dict.fromkeys(found.rival)), list(dict.fromkeys(found.judge))
    cells = found.assign(text=text).pivot(index=["judge", "passes"], columns="rival", values="text")
    return cells[order].rename_axis(columns=None).loc[judges].reset_index().fillna("")
