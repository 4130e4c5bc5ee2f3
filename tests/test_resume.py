"""A run that was stopped and gone on with equals one that was not, bit for bit."""

import json
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import make_toy, share_of_twos, weights_of

from speedrl_lab.config import SamplerConfig, TrainConfig
from speedrl_lab.rewards.speed import speed_reward
from speedrl_lab.rl import train
from speedrl_lab.runs import Run

PROMPTS = ["a dog", "two cats", "a frog left of a pig"]
REWARDS = {"twos": share_of_twos, "speed": speed_reward}
FIXED = TrainConfig(
    sampler=SamplerConfig(steps=2), iterations=6, num_groups=2, group_size=4, learning_rate=0.02,
    warmup_iterations=4, quality_weights={"twos": 1.0}, save_every=2,
)  # fmt: skip
PACED = replace(FIXED, sampler=SamplerConfig(steps=3, schedule="paced"), speed_weight=0.3)
RICH = replace(PACED, ema_decay=0.8, inner_epochs=2, speed_form="lagrangian", weight_schedules={"kl": [[0, 0], [5, 1]]})
CONFIDENT = replace(FIXED, sampler=SamplerConfig(steps=2, order="confidence"), estimator="coupled", inner_epochs=2)
LORA = replace(FIXED, lora_rank=2)
ADAPTIVE = replace(PACED, sampler=SamplerConfig(steps=3, schedule="adaptive"), inner_epochs=2)
FROZEN = replace(ADAPTIVE, trained="schedule", speed_form="lagrangian")
CONFIGS = pytest.mark.parametrize(
    "config",
    [FIXED, PACED, RICH, CONFIDENT, LORA, ADAPTIVE, FROZEN],
    ids=["fixed", "paced", "rich", "confident", "lora", "adaptive", "frozen"],
)


def opened(folder: Path, config: TrainConfig) -> Run:
    return Run.open(folder, asdict(config), resume=True)


def trained(generator, config: TrainConfig, folder: Path, stop_after: int | None = None) -> torch.Tensor:
    for record in train(generator, PROMPTS, REWARDS, config, opened(folder, config)):
        if record["iteration"] == stop_after:
            break
    return weights_of(generator)


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(records: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


@CONFIGS
@pytest.mark.parametrize("stop_after", [1, 3, 4, 6])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, config, stop_after):
    whole = trained(make_toy(), config, tmp_path / "whole")
    trained(make_toy(), config, tmp_path / "parts", stop_after)
    parts = trained(make_toy(), config, tmp_path / "parts")
    assert torch.equal(parts, whole)
    start = weights_of(make_toy())
    assert torch.equal(whole[: len(start)], start) == (config.trained == "schedule")
    assert [record["iteration"] for record in logged(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6]
    assert without_times(logged(tmp_path / "parts")) == without_times(logged(tmp_path / "whole"))


@CONFIGS
@pytest.mark.parametrize("stop_after", [1, 3])
def test_going_on_in_the_same_session_keeps_the_reference(tmp_path, config, stop_after):
    whole = trained(make_toy(), config, tmp_path / "whole")
    generator = make_toy()
    trained(generator, config, tmp_path / "parts", stop_after)
    assert torch.equal(trained(generator, config, tmp_path / "parts"), whole)
    assert without_times(logged(tmp_path / "parts")) == without_times(logged(tmp_path / "whole"))


def test_a_finished_run_is_left_as_it_is(tmp_path):
    whole = trained(make_toy(), FIXED, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert torch.equal(trained(make_toy(), FIXED, tmp_path / "run"), whole)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


KILLED = """
import os, signal, sys
from test_resume import *
generator = make_toy()
config = replace(PACED, save_every=1)
for record in train(generator, PROMPTS, REWARDS, config, opened(Path(sys.argv[1]), config)):
    if record["iteration"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    config = replace(PACED, save_every=1)
    folder = Path(__file__).parent
    script = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(folder.parent)!r}]\n" + KILLED
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path / "parts")], timeout=300)
    assert ended.returncode == -signal.SIGKILL
    assert [record["iteration"] for record in logged(tmp_path / "parts")] == [1, 2, 3]
    assert not (tmp_path / "parts" / "policy.safetensors").exists()
    parts = trained(make_toy(), config, tmp_path / "parts")
    assert torch.equal(parts, trained(make_toy(), config, tmp_path / "whole"))
    assert without_times(logged(tmp_path / "parts")) == without_times(logged(tmp_path / "whole"))
    assert (tmp_path / "parts" / "policy.safetensors").is_file()


def test_the_guards_go_on_too(tmp_path):
    """Smoothed quality and best weights belong to the checkpoint: a collapse is seen across a stop."""
    config = replace(FIXED, iterations=30, save_every=1, collapse_drop=4000.0, quality_weights={"told": 1.0})

    def run(folder: Path, stop_after: int | None) -> tuple[int, torch.Tensor]:
        def told(images, prompts, trajectory):
            done = logged(folder)[-1]["iteration"] if (folder / "metrics.jsonl").is_file() else 0
            return torch.linspace(0, 1e-3, len(prompts)) + (3.0 if done < 3 else 0.0)

        generator = make_toy()
        for record in train(generator, PROMPTS, {"told": told}, config, opened(folder, config)):
            if record["iteration"] == stop_after:
                break
        return record["iteration"], weights_of(generator)

    whole = run(tmp_path / "whole", None)
    run(tmp_path / "parts", 4)
    parts = run(tmp_path / "parts", None)
    assert parts[0] == whole[0] < 30 and torch.equal(parts[1], whole[1])


def test_a_truncated_checkpoint_is_refused_and_stays(tmp_path):
    trained(make_toy(), FIXED, tmp_path / "run", stop_after=3)
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:5000])
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    generator = make_toy()
    with pytest.raises(ValueError, match="checkpoint.pt is truncated or no checkpoint") as error:
        trained(generator, FIXED, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()} == before
    assert torch.equal(weights_of(generator), weights_of(make_toy()))


def test_other_settings_are_refused(tmp_path):
    trained(make_toy(), FIXED, tmp_path / "run", stop_after=3)
    with pytest.raises(ValueError, match="was started with learning_rate=0.02, now 0.5"):
        opened(tmp_path / "run", replace(FIXED, learning_rate=0.5))
    with pytest.raises(FileExistsError, match="go on with resume=True"):
        Run.open(tmp_path / "run", asdict(FIXED))


@pytest.mark.parametrize("config", [LORA, FROZEN], ids=["lora", "frozen"])
def test_a_run_that_leaves_the_base_as_it_is_goes_on_from_its_own(tmp_path, config):
    whole = trained(make_toy(), config, tmp_path / "whole")
    trained(make_toy(), config, tmp_path / "parts", stop_after=3)
    assert torch.equal(trained(make_toy(seed=1), config, tmp_path / "parts"), whole)


def test_a_record_cut_short_by_a_kill_is_left_out(tmp_path):
    whole = trained(make_toy(), FIXED, tmp_path / "whole")
    trained(make_toy(), FIXED, tmp_path / "parts", stop_after=3)
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "rew')
    assert torch.equal(trained(make_toy(), FIXED, tmp_path / "parts"), whole)
    assert [record["iteration"] for record in logged(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6]
