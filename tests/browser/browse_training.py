"""The training board as a person uses it, in a real JupyterLab: pause, change a weight, go on, stop, kill, resume,
interrupt.

    SPEEDRL_SCREENSHOTS=shots python -m pytest tests/browser/browse_training.py

Needs what `browse_notebooks` needs. Each test trains a copy of 03_speed_rl with preset `smoke`, made longer.
"""

import json
import os
import re
import signal
import time
from pathlib import Path

import nbformat
import pytest
import torch

pytest_plugins = ["browse_notebooks"]  # its fixtures: a JupyterLab and a browser
playwright = pytest.importorskip("playwright.sync_api")
PATIENCE = 1000 * int(os.environ.get("SPEEDRL_BROWSER_SECONDS", "180"))

ITERATIONS = 400


class Training:
    """A copy of 03_speed_rl that is open in JupyterLab; `run` is its folder."""

    def __init__(self, browser, lab, name):
        self.address, self.home = lab
        self.name, self.run = name, self.home / "outputs" / name
        self.shots = os.environ.get("SPEEDRL_SCREENSHOTS")
        book = nbformat.read(self.home / "notebooks" / "03_speed_rl.ipynb", as_version=4)
        given = {"run": name, "resume": True, "iterations": ITERATIONS}
        for cell in book.cells:
            if "parameters" in cell.metadata.get("tags", []):
                for knob, value in given.items():
                    line = rf"^({knob}: \w+) = [^#\n]*"
                    cell.source, found = re.subn(line, rf"\1 = {value!r}  ", cell.source, flags=re.MULTILINE)
                    assert found == 1, knob
                cell.source += f"\nimport os; open({str(self.home / f'{name}.pid')!r}, 'w').write(str(os.getpid()))"
        nbformat.write(book, self.home / "notebooks" / f"{name}.ipynb")
        self.page, self.errors = browser.new_page(), []
        self.page.set_viewport_size({"width": 1400, "height": 1500})
        self.page.set_default_timeout(PATIENCE)
        playwright.expect.set_options(timeout=PATIENCE)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        # A workspace of its own: else the status bar may speak of another notebook's kernel.
        self.page.goto(f"{self.address}/lab/workspaces/{name}/tree/{name}.ipynb?token=t")
        self.page.locator(".jp-NotebookPanel .jp-Notebook").wait_for()
        self.train()

    def train(self):
        """Run all cells, once the kernel is idle; returns when iterations are logged."""
        before = len(self.logged())
        playwright.expect(self.page.locator("#jp-main-statusbar")).to_contain_text("| Idle", timeout=PATIENCE)
        for item in ("Run", "Run All Cells"):
            self.page.get_by_role("menuitem", name=item, exact=True).click()
        self.wait(lambda: len(self.logged()) > before + 4, "iterations")
        self.button("Stop").scroll_into_view_if_needed()

    def logged(self):
        """Records on disk, of complete lines."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []
        return [json.loads(line) for line in lines]

    def wait(self, holds, what):
        deadline = time.monotonic() + PATIENCE / 1000
        while not holds():
            if time.monotonic() > deadline:
                self.shot("stuck")
                raise AssertionError(f"waited in vain for {what}")
            self.page.wait_for_timeout(200)

    def button(self, text):
        return self.page.locator(f'button.jupyter-button:has-text("{text}")').last

    def press(self, text):
        self.button(text).click()

    def shot(self, what):
        if self.shots:
            Path(self.shots).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=Path(self.shots) / f"{self.name}-{what}.png")

    def kill(self):
        """End the kernel as the system does when memory runs out."""
        os.kill(int((self.home / f"{self.name}.pid").read_text()), signal.SIGKILL)


@pytest.fixture
def training(lab, browser):
    books = []

    def start(name):
        books.append(Training(browser, lab, name))
        return books[-1]

    yield start
    for book in books:
        book.page.close()
        assert book.errors == []


def test_pause_change_go_on_and_stop(training):
    book = training("board")
    book.shot("training")
    book.press("Pause")
    book.button("Paused").wait_for()
    paused = len(book.logged())
    book.page.wait_for_timeout(15_000)
    assert len(book.logged()) == paused, "training goes on while it pauses"
    field = book.page.locator('.widget-text:has(label:text-is("speed")) input').last
    field.fill("2.5")
    field.press("Enter")
    playwright.expect(book.page.locator("text=/speed = 2.5 from the next iteration on/").last).to_be_visible()
    book.shot("paused")
    book.press("Go on")
    book.wait(lambda: len(book.logged()) > paused + 2, "iterations after the pause")
    changed = book.logged()[paused]
    assert changed["changed"] == {"speed": 2.5} and changed["weights"]["speed"] == 2.5
    assert book.logged()[paused - 1]["weights"]["speed"] != 2.5
    book.shot("changed")
    book.press("Stop")
    playwright.expect(book.page.locator("text=/Stopped after iteration \\d+ of/").last).to_be_visible()
    book.page.wait_for_timeout(1000)
    book.shot("stopped")
    saved = torch.load(book.run / "checkpoint.pt", weights_only=True)
    assert saved["iteration"] == len(book.logged()) < ITERATIONS
    assert saved["changed"]["speed"] == (paused + 1, 2.5)
    book.train()
    assert [row["iteration"] for row in book.logged()] == list(range(1, len(book.logged()) + 1))
    assert book.logged()[-1]["weights"]["speed"] == 2.5
    book.press("Stop")
    playwright.expect(book.page.locator("text=/Stopped after iteration \\d+ of/").last).to_be_visible()


def test_a_killed_kernel_goes_on_and_an_interrupt_saves(training):
    book = training("killed")
    book.kill()
    killed = len(book.logged())
    book.page.locator(".jp-Dialog").wait_for()
    book.shot("killed")
    book.page.locator(".jp-Dialog button.jp-mod-accept").click()
    book.train()
    rows = book.logged()
    assert [row["iteration"] for row in rows] == list(range(1, len(rows) + 1)) and len(rows) > killed
    book.shot("resumed")
    for item in ("Kernel", "Interrupt Kernel"):
        book.page.get_by_role("menuitem", name=item, exact=True).click()
    playwright.expect(book.page.locator("#jp-main-statusbar")).to_contain_text("| Idle")
    assert torch.load(book.run / "checkpoint.pt", weights_only=True)["iteration"] == len(book.logged()) < ITERATIONS
    book.shot("interrupted")
