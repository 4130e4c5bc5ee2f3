"""Deleting takes a run's folder and nothing else, and can be undone."""

import os
import time

import pytest

from speedrl_lab.runs import Run
from speedrl_lab.trash import QUIET, delete, emptying


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEEDRL_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path / "outputs"


def make(name, quiet=True):
    run = Run.open(name, {"seed": 0})
    run.log({"iteration": 1, "kl": 0.1})
    run.save_checkpoint({"iteration": 1})
    run.write_card({"kl": 0.1})
    (run.path / "03_speed_rl.ipynb").write_text("{}")
    (run.path / "figures").mkdir()
    (run.path / "figures" / "curves.png").write_bytes(b"")
    if quiet:
        for file in run.path.iterdir():
            os.utime(file, (time.time() - QUIET - 60,) * 2)
    return run.path


def contents(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_run_moves_to_the_trash_whole(outputs):
    path = make("group/one")
    make("group/two")
    before = contents(path)
    target = delete("group/one")
    assert target == outputs / ".trash" / "group" / "one" and contents(target) == before
    assert not path.exists() and (outputs / "group" / "two" / "config.json").exists()
    make("group/one")
    assert delete("group/one") == outputs / ".trash" / "group" / "one-2"
    assert contents(target) == before
    assert f"rm -r '{outputs}/.trash'" in emptying()


def test_a_run_that_may_be_going_on_needs_force(outputs):
    path = make("run", quiet=False)
    with pytest.raises(OSError, match=r"run run changed \d+ seconds ago and may be going on; stop it, or --force"):
        delete("run")
    assert path.exists()
    delete("run", force=True)
    assert not path.exists()


@pytest.mark.parametrize("other", ["notes.txt", "weights/generator.safetensors", "speed_rl/config.json", "clip.pt",
                                   "figures/deeper/a.png", "figures/notes.txt"])  # fmt: skip
@pytest.mark.parametrize("force", [False, True])
def test_a_folder_with_other_things_stays(outputs, other, force):
    path = make("run")
    (path / other).parent.mkdir(exist_ok=True)
    (path / other).write_text("")
    with pytest.raises(ValueError, match="which is no file of a run; move that away first"):
        delete("run", force)
    assert path.exists() and not (outputs / ".trash").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "run/../../outside", "/outside"])
def test_nothing_outside_the_root_is_touched(outputs, name):
    outside = make(outputs.parent / "outside")
    make("run")
    with pytest.raises(ValueError, match="is not a run below"):
        delete(name, force=True)
    with pytest.raises(ValueError, match="is not a run below"):
        delete(outside, force=True)
    assert outside.exists() and (outputs / "run").exists()


def test_links_are_not_followed(outputs):
    outside = make(outputs.parent / "outside")
    make("run")
    (outputs / "link").symlink_to(outside)
    (outputs / "folder").symlink_to(outputs.parent)
    for name in ("link", "folder/outside"):
        with pytest.raises(ValueError, match="is a link; links are not followed"):
            delete(name, force=True)
    (outputs / "run" / "policy.safetensors").symlink_to(outside / "config.json")
    with pytest.raises(ValueError, match="holds policy.safetensors, which is no file of a run"):
        delete("run", force=True)
    make("other")
    (outputs / ".trash").symlink_to(outside)
    with pytest.raises(ValueError, match="leads through a link"):
        delete("other", force=True)
    assert (outputs / "other").exists() and not (outside / "other").exists()


def test_an_unknown_name_and_a_deleted_run_are_one_line(outputs):
    make("weights")
    with pytest.raises(FileNotFoundError, match=r"no run 'wieghts' .*; nearest: 'weights'"):
        delete("wieghts")
    (outputs / "group").mkdir()
    with pytest.raises(FileNotFoundError, match="no run 'group'"):
        delete("group")
    delete("weights")
    with pytest.raises(ValueError, match="is deleted already"):
        delete(".trash/weights")
