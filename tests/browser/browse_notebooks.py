"""Notebooks as a person uses them: a real JupyterLab in headless Chromium. Not part of the fast tests.

    pip install playwright        (and a Chromium: $CHROMIUM, else /usr/bin/chromium)
    SPEEDRL_SCREENSHOTS=shots python -m pytest tests/browser/browse_notebooks.py

Each test opens a copy of a notebook with preset `smoke`, runs all cells, moves controls and looks whether
pictures change. `SPEEDRL_BROWSER_SECONDS` (180) is how long one wait may take.
"""

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api")
ROOT = Path(__file__).resolve().parent.parent.parent
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
PATIENCE = 1000 * int(os.environ.get("SPEEDRL_BROWSER_SECONDS", "180"))
FLAGS = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--no-first-run"]  # fmt: skip
FINISHED = r"""() => { const prompts = [...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt')];
  const said = [...document.querySelectorAll('[data-mime-type="application/vnd.jupyter.stderr"]')];
  return said.some(e => /Traceback|Error/.test(e.textContent))
    || prompts.length && prompts.every(e => /^\[\d+\]:$/.test(e.textContent.trim())) }"""


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address and folder of a JupyterLab that knows nothing of the user's settings."""
    home = tmp_path_factory.mktemp("lab")
    notebooks, settings = home / "notebooks", home / "settings"
    (settings / "@jupyterlab" / "apputils-extension").mkdir(parents=True)
    quiet = settings / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    shutil.copytree(ROOT / "notebooks", notebooks, ignore=shutil.ignore_patterns(".*"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTERLAB_SETTINGS_DIR": str(settings),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"), "IPYTHONDIR": str(home / "ipython"),
        "SPEEDRL_OUTPUTS": str(home / "outputs"), "SPEEDRL_PRESET": "smoke",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    }  # fmt: skip
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
        "--ServerApp.port_retries=0", "--IdentityProvider.token=t", f"--ServerApp.root_dir={notebooks}",
    ]  # fmt: skip
    with (home / "log.txt").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE / 1000
    while True:
        try:
            urllib.request.urlopen(f"{address}/api/status?token=t", timeout=5).close()
            break
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, (home / "log.txt").read_text()
            time.sleep(0.5)
    yield address, home
    server.terminate()
    server.wait(30)


@pytest.fixture(scope="session")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


class Notebook:
    """A notebook open in JupyterLab, all cells run; `errors` are those of the page."""

    def __init__(self, browser: "playwright.Browser", address: str, name: str, shots: Path | None):
        self.page, self.errors, self.name, self.shots = browser.new_page(), [], name, shots
        self.page.set_viewport_size({"width": 1400, "height": 1500})
        self.page.set_default_timeout(PATIENCE)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        # A workspace of its own: the usual one would open the notebooks of earlier tests as well.
        self.page.goto(f"{address}/lab/workspaces/{uuid.uuid4().hex}/tree/{name}.ipynb?token=t")
        self.page.locator(".jp-NotebookPanel .jp-Notebook").wait_for()
        # A run that is asked for before the kernel is idle is lost without a word.
        playwright.expect(self.page.locator("#jp-main-statusbar")).to_contain_text("| Idle", timeout=PATIENCE)
        for item in ("Run", "Run All Cells"):
            self.page.get_by_role("menuitem", name=item, exact=True).click()
        try:
            playwright.expect.set_options(timeout=PATIENCE)
            self.page.wait_for_function(FINISHED, timeout=PATIENCE)
        finally:
            self.shot("run")
        failed = self.page.locator('[data-mime-type="application/vnd.jupyter.stderr"]').all_inner_texts()
        assert not [text for text in failed if re.search("Traceback|Error", text)], failed

    def shot(self, what: str) -> None:
        """Keep a screenshot where a folder was given."""
        if self.shots:
            self.page.screenshot(path=self.shots / f"{self.name}-{what}.png")

    def pictures(self, within: str) -> list[str]:
        """A fingerprint of every widget image below a selector."""
        # A widget image is a blob: read the pixels' bytes through its own address.
        script = """async selector => Promise.all([...document.querySelectorAll(selector + ' img.widget-image')].map(
            async image => { const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
              return bytes.reduce((text, byte) => text + String.fromCharCode(byte), ''); }))"""
        return [hashlib.sha1(text.encode()).hexdigest() for text in self.page.evaluate(script, within)]

    def changed(self, within: str, before: list[str]) -> list[str]:
        """Wait until the pictures differ from `before` and stay as they are for a second; returns them."""
        deadline, last = time.monotonic() + PATIENCE / 1000, before
        while (now := self.pictures(within)) == before or now != last:
            assert time.monotonic() < deadline, f"the pictures below {within} did not change and settle"
            last = now
            self.page.wait_for_timeout(1000)
            playwright.expect(self.page.locator("#jp-main-statusbar")).to_contain_text("| Idle", timeout=PATIENCE)
        return now

    def slide(self, label: str, keys: int) -> None:
        """Press the right (or left) arrow on the slider of that description."""
        handle = self.page.locator(f'.widget-hslider:has(label:text-is("{label}")) .noUi-handle').first
        handle.scroll_into_view_if_needed()
        handle.focus()
        for _ in range(abs(keys)):
            handle.press("ArrowRight" if keys > 0 else "ArrowLeft")

    def choose(self, label: str, option: str) -> None:
        """Select in the dropdown of that description."""
        self.page.locator(f'.widget-dropdown:has(label:text-is("{label}")) select').first.select_option(label=option)

    def press(self, text: str) -> None:
        """Click the widget button of that text."""
        self.page.locator(f'button.jupyter-button:text-is("{text}")').first.click()


@pytest.fixture
def opened(lab: tuple[str, Path], browser: "playwright.Browser") -> Iterator:
    """Open a notebook by its name; every page is closed in the end, without a JavaScript error."""
    books: list[Notebook] = []
    shots = os.environ.get("SPEEDRL_SCREENSHOTS")

    def open_notebook(name: str) -> Notebook:
        if shots:
            Path(shots).mkdir(parents=True, exist_ok=True)
        books.append(Notebook(browser, lab[0], name, Path(shots) if shots else None))
        return books[-1]

    yield open_notebook
    for book in books:
        errors = book.errors
        book.page.close()
        assert errors == []


def test_microscope_plays_and_steps(opened):
    book, where = opened("01_watch_sampling"), ".widget-vbox"
    first = book.pictures(where)
    assert len(first) >= 9
    book.slide("step", 2)
    playwright.expect(book.page.locator("text=/^2 of 8 steps/")).to_be_visible()
    second = book.changed(where, first)
    book.shot("slider")
    book.press("best guess")
    third = book.changed(where, second)
    book.press(">")
    fourth = book.changed(where, third)
    book.choose("prompt", book.page.locator(".widget-dropdown select option").nth(1).inner_text())
    fifth = book.changed(where, fourth)
    book.page.locator(".jupyter-widgets.widget-play button").first.click()
    playwright.expect(book.page.locator("text=/^8 of 8 steps, 100% known/")).to_be_visible()
    book.changed(where, fifth)
    book.shot("played")


def test_whatif_explorer_answers_every_kind_of_control(opened, lab):
    book, where = opened("02_rewards"), ".widget-vbox"
    before = book.pictures(where)
    assert len(before) == 2
    book.slide("clip", -10)
    before = book.changed(where, before)
    book.slide("speed weight", 20)
    before = book.changed(where, before)
    book.shot("weights")
    book.choose("speed form", "multiplicative")
    before = book.changed(where, before)
    book.choose("low quality", "drop")
    book.changed(where, before)
    playwright.expect(book.page.locator("text=/Filtered \\([1-9]/").last).to_be_visible()
    book.choose("low quality", "off")
    playwright.expect(book.page.locator("text=/Filtered \\(0/").last).to_be_visible()
    book.press("Use these")
    playwright.expect(book.page.locator("text=/papermill --engine speedrl/").first).to_be_visible()
    book.shot("chosen")
    assert list((lab[1] / "outputs" / "02_rewards").glob("*.json"))


def test_whatif_explorer_trains_and_stops(opened, lab):
    book = opened("02_rewards")
    book.press("Train")
    playwright.expect(book.page.locator('button.jupyter-button:text-is("Stop")')).to_be_enabled()
    playwright.expect(book.page.locator("text=/iteration \\d|no iteration/").first).to_be_visible()
    book.press("Stop")
    playwright.expect(book.page.locator("text=/^stopped /").first).to_be_visible()
    book.shot("stopped")
    assert list((lab[1] / "outputs" / "02_rewards").glob("*/log.txt"))
