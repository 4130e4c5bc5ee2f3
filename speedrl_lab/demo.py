"""`make demo`: a short Speed-RL run, then the frontier page.

The run starts halfway between two distillations of the base (`data/weights/rivals`): one draws a scene in few steps,
the other has learned to draw anew what contradicts itself, and RL on top of both does in minutes what takes RL from
the base hours. The page shows base, start, short run and the weights that were trained for longer. Two notebooks, run
by papermill into one folder. An interrupted demo goes on where it stopped when it is called again; a finished one is
never touched: the next call takes the next free folder.
"""

from pathlib import Path

from tqdm import tqdm

from speedrl_lab import notebooks
from speedrl_lab.average import mix
from speedrl_lab.generators import load_generator
from speedrl_lab.generators.emoji import WEIGHTS
from speedrl_lab.runs import outputs_root

FAST, REVISING = WEIGHTS / "rivals" / "dimo.safetensors", WEIGHTS / "rivals" / "revise.safetensors"
COMMITTED = WEIGHTS / "speed_rl.safetensors"
START, TRAINED, PAGE = "start.safetensors", "policy.safetensors", "frontier.html"


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
    run, start = folder / "speed_rl", folder / START
    tqdm.write(f"demo folder: {folder}")
    if not start.exists():
        _write_start(start)
    if not (run / TRAINED).exists():
        _execute("03_speed_rl", folder, run=str(run), resume=run.exists(), preset="demo", policy=str(start))
    policies = [f"before RL={start}", f"speed-rl, short={run / TRAINED}", f"speed-rl={COMMITTED}"]
    begun = (folder / "config.json").exists()
    searching = {"search_prompts": 12, "own_steps": [8]}  # a short demo
    _execute("05_frontier", folder, policies=policies, run=str(folder), resume=begun, preset="demo", **searching)
    tqdm.write(f"frontier page: {folder / PAGE}")
    return folder / PAGE


def _write_start(file: Path) -> None:
    """Half of each distillation, in one file."""
    generator = load_generator("emoji", "cpu", policy=FAST)
    mix(generator, load_generator("emoji", "cpu", policy=REVISING), 0.5)
    generator.save_policy(file, origin=f"half of {FAST.name}, half of {REVISING.name}")


def _execute(name: str, folder: Path, **knobs: object) -> None:
    """Run one notebook into the folder; a part left by an interrupted demo is replaced."""
    executed = folder / f"{name}.ipynb"
    executed.unlink(missing_ok=True)
    notebooks.run(name, output=folder, **knobs)
