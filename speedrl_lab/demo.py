"""`make demo`: a short Speed-RL run, then the frontier page.

The run starts from a distillation of the base (`data/weights/rivals`): RL on top of it does in minutes what takes
RL from the base hours. The page shows base, start, short run and the weights that were trained for longer. Two
notebooks, run by papermill into one folder. An interrupted demo goes on where it stopped when it is called again; a
finished one is never touched: the next call takes the next free folder.
"""

from pathlib import Path

from tqdm import tqdm

from speedrl_lab import notebooks
from speedrl_lab.runs import outputs_root
from speedrl_lab.scenes import DATA

START = DATA / "weights" / "rivals" / "dimo.safetensors"
COMMITTED = DATA / "weights" / "speed_rl.safetensors"
TRAINED, PAGE = "policy.safetensors", "frontier.html"


def next_folder(root: Path) -> Path:
    """`demo`, or the first `demo-2`, `demo-3`, ... that holds no finished page."""
    number, folder = 1, root / "demo"
    while (folder / PAGE).exists():
        number += 1
        folder = root / f"demo-{number}"
    return folder


def main(output: Path | None = None) -> Path:
    """Train shortly, evaluate, print where the page is, and return its path.

    Raises FileExistsError when `output` already holds a finished demo.
    """
    folder = Path(output).resolve() if output else next_folder(outputs_root())
    if (folder / PAGE).exists():
        raise FileExistsError(f"{folder} holds a finished demo; choose another --output")
    run = folder / "speed_rl"
    tqdm.write(f"demo folder: {folder}")
    if not (run / TRAINED).exists():
        _execute("03_speed_rl", folder, run=str(run), resume=run.exists(), preset="demo", policy=str(START))
    policies = [f"before RL={START}", f"speed-rl, short={run / TRAINED}", f"speed-rl={COMMITTED}"]
    begun = (folder / "config.json").exists()
    searching = {"search_prompts": 12, "own_steps": [8]}  # a short demo
    _execute("05_frontier", folder, policies=policies, run=str(folder), resume=begun, preset="demo", **searching)
    tqdm.write(f"frontier page: {folder / PAGE}")
    return folder / PAGE


def _execute(name: str, folder: Path, **knobs: object) -> None:
    """Run one notebook into the folder; a part left by an interrupted demo is replaced."""
    executed = folder / f"{name}.ipynb"
    executed.unlink(missing_ok=True)
    notebooks.run(name, output=folder, **knobs)
