"""Two short trainings, so that a comparison has something to show where nothing has been trained yet."""

from datetime import UTC, datetime
from pathlib import Path

from speedrl_lab.comparison import folders
from speedrl_lab.config import RunConfig
from speedrl_lab.generators import load_generator
from speedrl_lab.prompts import load_prompts
from speedrl_lab.rewards import build_rewards
from speedrl_lab.rl import train
from speedrl_lab.runs import Run, outputs_root

WEIGHTS = (0.2, 0.8)


def ensure_two_runs() -> list[Path]:
    """Train with preset `smoke` and each of WEIGHTS if fewer than two runs have records; the folders made.

    Seconds; for trying out what compares runs.
    """
    trained = [path for path in folders(outputs_root()) if (path / "metrics.jsonl").is_file()]
    if len(trained) >= 2:
        return []
    base, prompts = load_generator("emoji"), load_prompts("train")
    made, stamp = [], f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    for weight in WEIGHTS:
        config = RunConfig.from_flat("smoke", speed_weight=weight)
        names = [*config.train.quality_weights, "speed", "detector"]
        run = Run.open(f"examples/{stamp}/speed_weight={weight}", config.flat())
        records = list(train(base.copy(), prompts, build_rewards(names, base.device), config.train, run))
        run.write_card({"start": "the committed base", "iterations": f"{len(records)} of {config.train.iterations}"})
        made.append(run.path)
    return made
