"""Notebooks as a person uses them: a real JupyterLab in headless Chromium. Not part of the fast tests.

    pip install playwright        (and a Chromium: $CHROMIUM, else /usr/bin/chromium)
    SPEEDRL_SCREENSHOTS=shots python -m pytest tests/browser/browse_notebooks.py

Each test opens a copy of a notebook with preset `smoke`, runs all cells, moves controls and looks whether
pictures change. `SPEEDRL_BROWSER_SECONDS` (180) is how long one wait may take, `SPEEDRL_DARK=1` a dark theme.
"""

import pytest

pytest_plugins = ["browser_fixtures"]
playwright = pytest.importorskip("playwright.sync_api")


def test_microscope_plays_and_steps(opened):
    book, where = opened("01_watch_sampling"), ".widget-vbox"
    book.run()
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
    book.run()
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
    book.run()
    book.press("Train")
    playwright.expect(book.page.locator('button.jupyter-button:text-is("Stop")')).to_be_enabled()
    playwright.expect(book.page.locator("text=/iteration \\d|no iteration/").first).to_be_visible()
    book.press("Stop")
    playwright.expect(book.page.locator("text=/^stopped /").first).to_be_visible()
    book.shot("stopped")
    assert list((lab[1] / "outputs" / "02_rewards").glob("*/log.txt"))
