"""Fixtures of the browser tests, loaded by their `pytest_plugins`: a conftest here would hide the one above."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api")

from workbench import Browser, Notebook, chromium, serve

SHOTS = Path(os.environ["SPEEDRL_SCREENSHOTS"]) if "SPEEDRL_SCREENSHOTS" in os.environ else None


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address and folder of a JupyterLab; `SPEEDRL_DARK=1` shows it in the dark."""
    home = tmp_path_factory.mktemp("lab")
    with serve(home, bool(os.environ.get("SPEEDRL_DARK"))) as address:
        yield address, home


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    with chromium() as started:
        yield started


@pytest.fixture
def opened(lab: tuple[str, Path], browser: Browser) -> Iterator[Callable[[str], Notebook]]:
    """Open a notebook by its name; every page is closed in the end, without a JavaScript error."""
    books: list[Notebook] = []

    def open_notebook(name: str) -> Notebook:
        books.append(Notebook(browser, lab[0], name, SHOTS))
        return books[-1]

    yield open_notebook
    for book in books:
        book.page.close()
        assert book.errors == []
