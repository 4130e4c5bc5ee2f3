"""Print a table of results from a run of notebook 05_frontier: all of it, or the rows of the README.

    python docs/build_table.py outputs/results
    python docs/build_table.py outputs/results --short
"""

import argparse
from pathlib import Path

import pandas as pd

COLUMNS = {
    "accuracy": ("exact counts", 2, 1), "accuracy2": ("second detector", 2, 1), "clip": ("CLIP", 3, 1),
    "psnr": ("PSNR (dB)", 1, 1), "kid2": ("KID x 1000", 1, 1000), "diversity": ("diversity", 1, 1),
}  # fmt: skip
"""Title, digits and unit of each column."""
BUDGETS = (1, 2, 3, 4, 5, 8)
"""What every model is shown at; the base at all that cost more, own paces always."""
SHORT = {
    "models": ("base", "base, usual", "dimo", "speed-rl", "speed-rl, own pace"),
    "budgets": (1, 2, 4, 5, 8),
    "columns": ("clip",),
}
"""The README's models and budgets, and the columns that it leaves out."""


def rows(table: pd.DataFrame, short: bool) -> pd.DataFrame:
    slow = table.model.str.startswith("base") & (table.forwards > max(BUDGETS))
    if short:
        return table[table.model.isin(SHORT["models"]) & (slow | table.budget.isin(SHORT["budgets"]))]
    return table[slow | table.model.str.contains("pace|adanat") | table.budget.isin(BUDGETS)]


def main(results: Path, short: bool) -> None:
    table = rows(pd.read_csv(results / "frontier.csv").sort_values("forwards", kind="stable"), short)
    columns = {name: shown for name, shown in COLUMNS.items() if not (short and name in SHORT["columns"])}
    print("| model | passes |", " | ".join(title for title, *_ in columns.values()), "|")
    print("|" + "---|" * (2 + len(columns)))
    for _, row in table.iterrows():
        cells = [row.model, f"{row.forwards:.1f}".removesuffix(".0")]
        for name, (_, digits, unit) in columns.items():
            mean, low, high = (f"{unit * row[name + end]:.{digits}f}" for end in ("", "_low", "_high"))
            cells.append(f"{mean} [{low}, {high}]")
        print("|", " | ".join(cells), "|")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--short", action="store_true", help="the README's rows")
    main(**vars(parser.parse_args()))
