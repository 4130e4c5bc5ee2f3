"""Run folders: nothing overwritten, nothing half-written, clear words."""

import json
import os
from pathlib import Path

import pytest
import torch

from speedrl_lab.runs import Run

SETTINGS = {"seed": 0, "iterations": 6, "quality_weights": {"clip": 1.0}, "budgets": (1, 2)}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_name_lands_in_the_outputs_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEEDRL_OUTPUTS", str(tmp_path))
    run = Run.open("sweep/one", SETTINGS)
    assert run.path == tmp_path / "sweep" / "one"
    assert json.loads((run.path / "config.json").read_text())["budgets"] == [1, 2]


def test_an_existing_run_is_refused_untouched(tmp_path):
    Run.open(tmp_path / "run", SETTINGS).log({"iteration": 1})
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match="run .* exists; go on with resume=True, or choose another"):
        Run.open(tmp_path / "run", SETTINGS)
    assert snapshot(tmp_path) == before


def test_a_run_is_gone_on_with_under_the_same_settings_only(tmp_path):
    Run.open(tmp_path / "run", SETTINGS)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="was started with seed=0, now 1; resume with the same settings"):
        Run.open(tmp_path / "run", {**SETTINGS, "seed": 1}, resume=True)
    with pytest.raises(ValueError, match="was started with budgets="):
        Run.open(tmp_path / "run", {k: v for k, v in SETTINGS.items() if k != "budgets"}, resume=True)
    assert snapshot(tmp_path) == before
    Run.open(tmp_path / "run", SETTINGS, resume=True)
    assert snapshot(tmp_path) == before


def test_a_run_keeps_its_length(tmp_path):
    """Learning rates fall to 0 at the last iteration, so another length is another run."""
    Run.open(tmp_path / "run", SETTINGS)
    with pytest.raises(ValueError, match="started with iterations="):
        Run.open(tmp_path / "run", {**SETTINGS, "iterations": 9}, resume=True)


def test_a_new_run_may_say_resume(tmp_path):
    assert Run.open(tmp_path / "run", SETTINGS, resume=True).load_checkpoint() is None


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write run folder .*; set SPEEDRL_OUTPUTS") as error:
        Run.open(tmp_path / "file" / "run", SETTINGS)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="cannot write run folder .*Permission denied; set SPEEDRL_OUTPUTS"):
        Run.open(tmp_path / "run", SETTINGS)


def test_records_become_a_table(tmp_path):
    run = Run.open(tmp_path / "run", SETTINGS)
    assert run.records().empty
    for iteration in (1, 2):
        run.log({"iteration": iteration, "rewards": {"clip": iteration / 2}, "kl": torch.tensor(0.5)})
    table = run.records()
    assert table.iteration.tolist() == [1, 2] and table["rewards.clip"].tolist() == [0.5, 1.0]


def test_checkpoints_round_trip_and_drop_later_records(tmp_path):
    run = Run.open(tmp_path / "run", SETTINGS)
    for iteration in (1, 2, 3):
        run.log({"iteration": iteration})
        if iteration == 2:
            run.save_checkpoint({"iteration": 2, "weights": {"a": torch.arange(3.0)}, "best": None})
    state = run.load_checkpoint()
    assert state["iteration"] == 2 and state["weights"]["a"].tolist() == [0, 1, 2]
    assert run.records().iteration.tolist() == [1, 2]
    assert not list(run.path.glob("*.partial"))


def test_records_without_a_checkpoint_are_dropped(tmp_path):
    run = Run.open(tmp_path / "run", SETTINGS)
    run.log({"iteration": 1})
    assert run.load_checkpoint() is None and run.records().empty


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "foreign"])
def test_broken_checkpoints_are_one_line_and_stay(tmp_path, damage):
    run = Run.open(tmp_path / "run", SETTINGS)
    run.log({"iteration": 1})
    run.save_checkpoint({"iteration": 1, "weights": torch.zeros(1000)})
    run.log({"iteration": 2})
    path = run.path / "checkpoint.pt"
    whole = path.read_bytes()
    if damage == "foreign":
        torch.save({"something": 1}, path)
    else:
        path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"hello"}[damage])
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="checkpoint.pt is (truncated|not a version 2)") as e:
        run.load_checkpoint()
    assert "\n" not in str(e.value)
    assert snapshot(tmp_path) == before


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    run = Run.open(tmp_path / "run", SETTINGS)
    run.save_checkpoint({"iteration": 1})

    def disk_full(state, path):
        Path(path).write_bytes(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="No space left"):
        run.save_checkpoint({"iteration": 2})
    monkeypatch.undo()
    assert run.load_checkpoint()["iteration"] == 1


def test_checkpoints_hold_no_code(tmp_path):
    run = Run.open(tmp_path / "run", SETTINGS)
    run.save_checkpoint({"iteration": 1, "path": Path("/")})
    with pytest.raises(ValueError, match="is truncated or no checkpoint"):
        run.load_checkpoint()


def test_the_card_tells_facts_and_settings(tmp_path):
    run = Run.open(tmp_path / "run", SETTINGS)
    text = run.write_card({"accuracy": 0.75}).read_text()
    assert text.startswith("# Run `run`") and "**accuracy**: 0.75" in text and '"seed": 0' in text
