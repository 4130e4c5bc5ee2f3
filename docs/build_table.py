"""Print the README's table of results from a run of notebook 05_frontier.

python docs/build_table.py outputs/results
"""

import sys
from pathlib import Path

import pandas as pd

COLUMNS = {
    "accuracy": ("exact counts", 2), "accuracy2": ("second detector", 2), "clip": ("CLIP", 3), "psnr": ("PSNR (dB)", 1),
    "kid2": ("KID", 3), "diversity": ("diversity", 1),
}  # fmt: skip


SHOWN = (1, 2, 3, 4, 5, 8)
"""Budgets that every model is shown at; the base at all that cost more, own paces always."""


def main(results: Path) -> None:
    table = pd.read_csv(results / "frontier.csv").sort_values("forwards", kind="stable")
    slow, own = (
        table.model.str.startswith("base") & (table.forwards > max(SHOWN)),
        table.model.str.contains("pace|adanat"),
    )
    table = table[slow | own | table.budget.isin(SHOWN)]
    titles = ["model", "passes", *(title for title, _ in COLUMNS.values())]
    print("|", " | ".join(titles), "|")
    print("|" + "---|" * len(titles))
    for _, row in table.iterrows():
        cells = [row.model, f"{row.forwards:.1f}"]
        for name, (_, digits) in COLUMNS.items():
            cells.append(f"{row[name]:.{digits}f} [{row[f'{name}_low']:.{digits}f}, {row[f'{name}_high']:.{digits}f}]")
        print("|", " | ".join(cells), "|")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
