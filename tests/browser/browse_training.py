"""The training board as a person uses it, in a real JupyterLab: pause, change a weight, go on, stop, kill, resume,
interrupt, and explore what the run left.

    SPEEDRL_SCREENSHOTS=shots python -m pytest tests/browser/browse_training.py

Needs what `browse_notebooks` needs. Each test trains a copy of 03_speed_rl with preset `smoke`, most made longer.
"""

import json
import os
import signal
from pathlib import Path

import pytest

pytest_plugins = ["browser_fixtures"]
playwright = pytest.importorskip("playwright.sync_api")
torch = pytest.importorskip("torch")

from workbench import Notebook, with_parameters  # noqa: E402

ITERATIONS = 400


class Training:
    """A copy of 03_speed_rl that is open in JupyterLab and trains; `run` is its folder."""

    def __init__(self, book: Notebook, home: Path):
        self.book, self.page, self.run = book, book.page, home / "outputs" / book.name
        self.pid = home / f"{book.name}.pid"

    def train(self) -> None:
        """Run all cells; returns when iterations are logged."""
        before = len(self.logged())
        self.book.start()
        self.book.wait(lambda: len(self.logged()) > before + 4, "iterations")
        self.book.button("Stop").scroll_into_view_if_needed()

    def logged(self) -> list[dict]:
        """Records on disk, of complete lines."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []
        return [json.loads(line) for line in lines]

    def numbers(self) -> list[int]:
        return [row["iteration"] for row in self.logged()]

    def saved(self) -> dict:
        return torch.load(self.run / "checkpoint.pt", weights_only=True)

    def stop(self) -> None:
        self.book.press("Stop")
        playwright.expect(self.page.locator("text=/Stopped after iteration \\d+ of/").last).to_be_visible()

    def kill(self) -> None:
        """End the kernel as the system does when memory runs out."""
        os.kill(int(self.pid.read_text()), signal.SIGKILL)


@pytest.fixture
def training(lab, opened):
    def start(name: str) -> Training:
        # Many small groups and small steps: chance would soon be taken for a collapse, which ends a run.
        given = {"run": name, "resume": True, "iterations": ITERATIONS, "num_groups": 8, "group_size": 2,
                 "learning_rate": 1e-6}  # fmt: skip
        pid = f"import os; open({str(lab[1] / f'{name}.pid')!r}, 'w').write(str(os.getpid()))"
        with_parameters(lab[1] / "notebooks", "03_speed_rl", name, given, pid)
        started = Training(opened(name), lab[1])
        started.train()
        return started

    return start


def test_pause_change_go_on_and_stop(training):
    board = training("board")
    board.book.shot("training")
    board.book.press("Pause")
    board.book.button("Paused").wait_for()
    paused = len(board.logged())
    board.page.wait_for_timeout(15_000)
    assert len(board.logged()) == paused, "training goes on while it pauses"
    board.book.enter("speed", "2.5")
    playwright.expect(board.page.locator("text=/speed = 2.5 from the next iteration on/").last).to_be_visible()
    board.book.enter("kl", "-1")
    playwright.expect(board.page.locator("text=/weight kl=-1.*: expected a finite number/").last).to_be_visible()
    field = board.page.locator('.widget-text:has(label:text-is("kl")) input').last
    playwright.expect(field).to_have_value("0.01")
    board.book.shot("paused")
    board.book.press("Go on")
    board.book.wait(lambda: len(board.logged()) > paused + 2, "iterations after the pause")
    changed = board.logged()[paused]
    assert changed["changed"] == {"speed": 2.5} and changed["weights"]["speed"] == 2.5
    assert board.logged()[paused - 1]["weights"]["speed"] != 2.5
    board.page.wait_for_timeout(3000)  # until it is drawn
    board.book.shot("changed")
    board.stop()
    board.page.wait_for_timeout(1000)
    board.book.shot("stopped")
    saved = board.saved()
    assert saved["iteration"] == len(board.logged()) < ITERATIONS
    assert saved["changed"]["speed"] == (paused + 1, 2.5)
    board.train()
    assert board.numbers() == list(range(1, len(board.logged()) + 1))
    assert board.logged()[-1]["weights"]["speed"] == 2.5
    board.stop()


def test_a_killed_kernel_goes_on_and_an_interrupt_saves(training):
    board = training("killed")
    board.kill()
    killed = len(board.logged())
    board.page.locator(".jp-Dialog").wait_for()
    board.book.shot("killed")
    board.page.locator(".jp-Dialog button.jp-mod-accept").click()
    board.train()
    assert board.numbers() == list(range(1, len(board.numbers()) + 1)) and len(board.numbers()) > killed
    board.book.shot("resumed")
    board.book.menu("Kernel", "Interrupt Kernel")
    playwright.expect(board.page.locator('button.jupyter-button:text-is("Stop")')).to_have_count(0)
    board.book.idle()
    assert board.saved()["iteration"] == len(board.logged()) < ITERATIONS
    board.book.shot("interrupted")


def test_a_finished_run_is_explored(lab, opened):
    """What 03 leaves, 02 opens by the name of the run; a name without a run is told of in one line."""
    notebooks = lab[1] / "notebooks"
    with_parameters(notebooks, "03_speed_rl", "finished", {"run": "finished"})
    opened("finished").run()
    with_parameters(notebooks, "02_rewards", "explored", {"run": "finished"})
    book = opened("explored")
    book.run()
    (folder,) = lab[1].glob("outputs/finished")
    playwright.expect(book.page.locator("text=/8 samples, 4 a prompt/").first).to_be_visible()
    assert (folder / "rollouts.pt").is_file()
    before = book.pictures(".widget-vbox")
    book.slide("clip", -10)
    book.changed(".widget-vbox", before)
    book.shot("moved")
    with_parameters(notebooks, "02_rewards", "missing", {"run": "finishes"})
    book = opened("missing")
    book.start()
    said = "there is no run 'finishes'; 03_speed_rl leaves one where it ends; nearest that has one: 'finished'"
    playwright.expect(book.page.locator(f"text={said}").first).to_be_visible()
    book.shot("said")
