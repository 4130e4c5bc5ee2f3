"""A real JupyterLab and a headless Chromium, for the tests beside this file and for `docs/build_boards.py`.

`$CHROMIUM` is the browser (/usr/bin/chromium); `$SPEEDRL_BROWSER_SECONDS` (180) is how long one wait may take.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
from playwright.sync_api import Browser, Locator, expect, sync_playwright

ROOT = Path(__file__).resolve().parent.parent.parent
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
PATIENCE = 1000 * int(os.environ.get("SPEEDRL_BROWSER_SECONDS", "180"))
FLAGS = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--no-first-run"]  # fmt: skip
FINISHED = r"""() => { const prompts = [...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt')];
  const said = [...document.querySelectorAll('[data-mime-type="application/vnd.jupyter.stderr"]')];
  return said.some(e => /Traceback|Error/.test(e.textContent))
    || prompts.length && prompts.every(e => /^\[\d+\]:$/.test(e.textContent.trim())) }"""


@contextmanager
def serve(home: Path, dark: bool = False) -> Iterator[str]:
    """Address of a JupyterLab that knows nothing of the user's settings, on copies of the notebooks in `home`.

    Runs go to `home/outputs`; the preset is `smoke` where a notebook says nothing else.
    """
    look = home / "settings" / "@jupyterlab" / "apputils-extension"
    look.mkdir(parents=True)
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    (look / "notification.jupyterlab-settings").write_text(json.dumps(quiet))
    theme = {"theme": f"JupyterLab {'Dark' if dark else 'Light'}"}
    (look / "themes.jupyterlab-settings").write_text(json.dumps(theme))
    shutil.copytree(ROOT / "notebooks", home / "notebooks", ignore=shutil.ignore_patterns(".*"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"), "IPYTHONDIR": str(home / "ipython"),
        "SPEEDRL_OUTPUTS": str(home / "outputs"), "SPEEDRL_PRESET": "smoke",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    }  # fmt: skip
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
        "--ServerApp.port_retries=0", "--IdentityProvider.token=t", f"--ServerApp.root_dir={home / 'notebooks'}",
    ]  # fmt: skip
    with (home / "log.txt").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE / 1000
        while not _answers(f"{address}/api/status?token=t"):
            assert server.poll() is None and time.monotonic() < deadline, (home / "log.txt").read_text()
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()  # its kernels end with it
        server.wait(30)


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=5).close()
    except OSError:
        return False
    return True


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser."""
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


def with_parameters(notebooks: Path, name: str, copy: str, given: Mapping[str, Any], more: str = "") -> None:
    """Write a copy of a notebook with other defaults in its parameters cell, and lines below them."""
    book = nbformat.read(notebooks / f"{name}.ipynb", as_version=4)
    (cell,) = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]
    for knob, value in given.items():
        line = rf"^({knob}: [^=]+) = [^#\n]*"
        said = f" = {value!r}  "
        cell.source, found = re.subn(line, lambda match, said=said: match[1] + said, cell.source, flags=re.MULTILINE)
        assert found == 1, f"{name} has no parameter {knob}"
    cell.source += f"\n{more}" if more else ""
    nbformat.write(book, notebooks / f"{copy}.ipynb")


class Notebook:
    """A notebook open in JupyterLab; `errors` are those of the page. `shots`: a folder for screenshots."""

    def __init__(self, browser: Browser, address: str, name: str, shots: Path | None = None, size=(1400, 1500)):
        self.page, self.errors, self.name, self.shots = browser.new_page(), [], name, shots
        self.page.set_viewport_size({"width": size[0], "height": size[1]})
        self.page.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        # A workspace of its own: the usual one would open the notebooks of earlier tests as well.
        self.page.goto(f"{address}/lab/workspaces/{uuid.uuid4().hex}/tree/{name}.ipynb?token=t")
        self.page.locator(".jp-NotebookPanel .jp-Notebook").wait_for()

    def idle(self) -> None:
        """Wait until the kernel has nothing to do."""
        expect(self.page.locator("#jp-main-statusbar")).to_contain_text("| Idle", timeout=PATIENCE)

    def menu(self, *items: str) -> None:
        """Click through a menu of JupyterLab; a shortcut may stand behind an item's name."""
        for item in items:
            self.page.get_by_role("menuitem", name=re.compile(rf"^{item}\b")).first.click()

    def start(self) -> None:
        """Run all cells; a run that is asked for before the kernel is idle is lost without a word."""
        self.idle()
        self.menu("Run", "Run All Cells")

    def run(self) -> None:
        """Run all cells to the end; an AssertionError says what failed."""
        self.start()
        try:
            self.page.wait_for_function(FINISHED, timeout=PATIENCE)
        finally:
            self.shot("run")
        failed = self.page.locator('[data-mime-type="application/vnd.jupyter.stderr"]').all_inner_texts()
        assert not [text for text in failed if re.search("Traceback|Error", text)], failed

    def shot(self, what: str) -> None:
        """Keep a screenshot where a folder was given."""
        if self.shots:
            self.shots.mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=self.shots / f"{self.name}-{what}.png")

    def wait(self, holds: Callable[[], bool], what: str) -> None:
        """Look five times a second until it holds."""
        deadline = time.monotonic() + PATIENCE / 1000
        while not holds():
            if time.monotonic() > deadline:
                self.shot("stuck")
                raise AssertionError(f"waited in vain for {what}")
            self.page.wait_for_timeout(200)

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
            self.idle()
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

    def enter(self, label: str, text: str) -> None:
        """Type into the last field of that description, and press Enter."""
        field = self.page.locator(f'.widget-text:has(label:text-is("{label}")) input').last
        field.fill(text)
        field.press("Enter")

    def button(self, text: str) -> Locator:
        """The last widget button of that text."""
        return self.page.locator(f'button.jupyter-button:text-is("{text}")').last

    def press(self, text: str) -> None:
        """Click the last widget button of that text."""
        self.button(text).click()
