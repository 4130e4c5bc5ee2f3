"""Two processes train what one would: the same records, the same weights, each its own noise."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import make_toy, weights_of
from parallel_worker import CONFIGS, FIXED, PROMPTS, REWARDS, trained

from speedrl_lab import parallel, training
from speedrl_lab.rl import rollout, train
from speedrl_lab.runs import Run

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where two processes have left their runs, and one file each of what they found."""
    path = tmp_path_factory.mktemp("two")
    worker = Path(__file__).parent / "parallel_worker.py"
    places = [str(worker.parent), str(worker.parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, places))}
    ended = subprocess.run([*LAUNCH, worker, path], env=environment, timeout=300, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return path


@pytest.fixture(scope="module")
def both(folder) -> list[dict]:
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def numbers(record: dict) -> dict[str, float]:
    """The numbers of a record, nested ones too."""
    flat = {}
    for name, value in record.items():
        inside = value if isinstance(value, dict) else {"": value}
        flat |= {f"{name}.{key}": part for key, part in inside.items() if isinstance(part, int | float)}
    return flat


@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_learn_what_one_learns(both, name, tmp_path):
    generator, records = trained(CONFIGS[name], tmp_path / "one")
    one = weights_of(generator)
    assert len(records) == 3 and all(record["gradient_norm"] > 1e-3 for record in records)
    for found in both:
        assert torch.allclose(found[name]["weights"], one, rtol=0, atol=1e-5)
        for left, right in zip(found[name]["records"], records, strict=True):
            assert numbers(left) == pytest.approx(numbers(right), rel=1e-4, abs=1e-5)
            assert left["warnings"] == right["warnings"]
    left, right = (found[name] for found in both)
    assert torch.equal(left["weights"], right["weights"]) and left["records"] == right["records"]


def test_each_draws_its_own_groups(both):
    whole = rollout(make_toy(), PROMPTS, REWARDS, FIXED, 0)
    drawn = [found["drawn"] for found in both]
    assert [found["rank"] for found in both] == [0, 1] and {found["size"] for found in both} == {2}
    assert not set(drawn[0]["prompts"]) & set(drawn[1]["prompts"])
    assert not torch.equal(drawn[0]["tokens"], drawn[1]["tokens"])
    assert torch.equal(torch.cat([part["tokens"] for part in drawn]), whole.trajectory.tokens)
    for part in drawn:
        assert torch.equal(part["rewards"]["twos"], whole.rewards["twos"])


def test_one_process_writes(folder, both):
    for name in CONFIGS:
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["iteration"] for line in lines] == [1, 2, 3]
        assert (folder / name / "policy.safetensors").is_file()
        assert torch.load(folder / name / "checkpoint.pt")["world_size"] == 2


def test_a_stopped_run_goes_on_bit_for_bit(both):
    for found in both:
        assert torch.equal(found["resumed"], found["rich"]["weights"])


def test_another_number_of_processes_is_refused(folder):
    before = (folder / "fixed" / "checkpoint.pt").read_bytes()
    run = Run(folder / "fixed", asdict(FIXED))
    with pytest.raises(ValueError, match="started with 2 processes, now 1; launch 2 processes, or") as error:
        next(train(make_toy(), PROMPTS, REWARDS, FIXED, run))
    assert "\n" not in str(error.value) and (folder / "fixed" / "checkpoint.pt").read_bytes() == before


def test_groups_are_never_split(both):
    for found in both:
        assert found["odd"] == "num_groups=3: expected a multiple of the 2 processes; nearest: 2 or 4"


def test_the_main_process_decides(both):
    assert torch.equal(both[1]["start"], weights_of(make_toy(seed=0)))
    assert [found["steered"] for found in both] == [([1], {"kl": 0.5}), ([], {"kl": 0.5})]


def test_alone_there_is_one():
    with parallel.joined():
        assert parallel.world_size() == 1 and parallel.is_main() and parallel.own([1, 2, 3]) == [1, 2, 3]
        parallel.require_whole_groups(3)


def test_a_run_without_a_notebook_is_strict_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEEDRL_OUTPUTS", str(tmp_path))
    knobs = {"preset": "smoke", "run": "mine", "device": "cpu", "iterations": 1, "quality_weights": {"clip": 1.0}}
    folder = training.run(knobs | {"watched": []})
    assert folder == tmp_path / "mine" and (folder / "policy.safetensors").is_file()
    assert "**processes**: 1" in (folder / "card.md").read_text()
    assert list(Run(folder, {}).records().filter(like="rewards.").columns) == ["rewards.clip", "rewards.speed"]
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="go on with resume=True"):
        training.run(knobs)
    training.run(knobs | {"resume": True})
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "knobs, kind, words",
    [
        ({"iteratons": 3}, TypeError, "unknown parameter 'iteratons'; nearest: 'iterations'"),
        ({"resume": 1}, TypeError, "parameter resume=1 has type int, expected bool"),
        ({"watched": "clip"}, TypeError, "parameter watched='clip' has type str, expected list or None"),
        ({"preset": "smoke", "group_size": 1}, ValueError, "group_size=1: expected at least 2"),
    ],
)
def test_knobs_that_cannot_be_are_refused(knobs, kind, words, tmp_path, monkeypatch):
    monkeypatch.setenv("SPEEDRL_OUTPUTS", str(tmp_path))
    with pytest.raises(kind, match=words):
        training.run(knobs)
    assert not list(tmp_path.iterdir())
